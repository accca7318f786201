"""Config files: `get_config(preset)` in a file of the user's, or in one that comes with the package.

A config is named as `--config` takes it: FILE.py or FILE.py:PRESET for a file, NAME or NAME:PRESET for a bundled
config. Where there is no file `configs/NAME.py`, that path names the bundled config too, so that the documented
commands work outside a checkout.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from vpae_jax.config import nearest
from vpae_jax.types import UserError

BUNDLED = Path(__file__).parent / "configs"
NOT_CONFIGS = ("__init__", "common")


def bundled() -> dict[str, Path]:
    """The configs that come with the package, by name."""
    return {path.stem: path for path in sorted(BUNDLED.glob("*.py")) if path.stem not in NOT_CONFIGS}


def find(place: str) -> tuple[Path, str | None]:
    """The file that a `--config` value names, and its preset if it names one.

    Raises:
      UserError: there is no such file, and no bundled config of that name.
    """
    text, colon, preset = place.partition(":")
    path, known = Path(text), bundled()
    if not path.is_file():
        name = path.stem if path == Path("configs") / f"{path.stem}.py" else text
        if name not in known:
            raise UserError(f"{place}: no such config file or bundled config{nearest(name, known)}")
        path = known[name]
    return path, preset if colon else None


def load(place: str) -> ConfigDict:
    """The config that a `--config` value names, as its file makes it.

    Raises:
      UserError: as `find`; or the file defines no `get_config`, or does not have the preset.
    """
    path, preset = find(place)
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{place}: expected a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up the names in their annotations
    spec.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"{place}: defines no get_config, as the files of configs/ do")
    return module.get_config(*[] if preset is None else [preset])


def given(argv: Sequence[str]) -> str | None:
    """The `--config` value of a command line."""
    return next((argv[index][start:] for index, start in _places(argv)), None)


def resolved(argv: Sequence[str]) -> list[str]:
    """A command line whose `--config` names an existing file, as absl's flag expects it.

    Raises:
      UserError: as `find`.
    """
    result = list(argv)
    for index, start in _places(argv):
        path, preset = find(argv[index][start:])
        result[index] = f"{argv[index][:start]}{path}" + ("" if preset is None else f":{preset}")
    return result


def _places(argv: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Where a command line has its `--config` value: index of the argument, and where in it the value starts."""
    for index, argument in enumerate(argv):
        flag, equals, _ = argument.partition("=")
        if flag in ("-config", "--config"):
            if equals:
                yield index, len(flag) + 1
            elif index + 1 < len(argv):
                yield index + 1, 0
