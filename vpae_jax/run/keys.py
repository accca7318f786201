"""The keys of a config: their list in `--help`, and the message for a mistyped one.

The description of a key is read from the docstring of the dataclass that has it as a field.
"""

from __future__ import annotations

import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

from ml_collections import ConfigDict

from vpae_jax.config import Experiment, nearest
from vpae_jax.config_files import given, load
from vpae_jax.methods import METHODS
from vpae_jax.models.heads import HeadsConfig
from vpae_jax.types import UserError

PREFIX = "--config."
# The syntax of absl's flags and of ml_collections' keys: "--config.model.init_scale['a pattern']=3".
_NAME = r"""\.([^=.\[\]]*)|\['([^']*)'\]|\["([^"]*)"\]"""
_OVERRIDE = re.compile(rf"--?(?:no)?config(?P<names>(?:{_NAME})+)(?:=|$)")
# "      name, other: description", and continuation lines with more indentation.
_ATTRIBUTE = re.compile(r"^ {2}(?P<names>\w+(?:, \w+)*): (?P<text>.*(?:\n {4,}.*)*)", re.M)


def check(argv: Sequence[str]) -> None:
    """Raises `UserError` for the first override on a command line whose key does not exist in its config."""
    path = given(argv)
    if path is None:
        return
    config = load(path)
    for argument in argv:
        if (found := _OVERRIDE.match(argument)) is not None:
            _find(config, [one or two or three for one, two, three in re.findall(_NAME, found["names"])])


def _find(config: ConfigDict, key: Sequence[str]) -> None:
    """Raises `UserError` for a key that does not exist in a config, or that is a group of keys."""
    holder: Any = config
    path = "config"
    for name in key:
        if not isinstance(holder, ConfigDict):
            raise UserError(f"{path}: is a value and has no key {name!r}")
        if name not in holder:
            raise UserError(f"{path}.{name}: unknown key{nearest(name, holder)}")
        holder, path = holder[name], f"{path}.{name}"
    if isinstance(holder, ConfigDict):
        raise UserError(f"{path}: is a group of keys; set one of these: {', '.join(sorted(holder)) or 'none'}")


def page(argv: Sequence[str]) -> str:
    """Returns a page with every key of the config on a command line, its value and its description; or how to see it if
    the command line has no config.

    Raises:
      UserError: as `load`.
    """
    path = given(argv)
    if path is None:
        return f"With --config=FILE.py[:PRESET], --help lists the config's keys, which are set by {PREFIX}KEY=VALUE."
    config = load(path)
    lines = [f"Keys of {path}, set by {PREFIX}KEY=VALUE:", ""]
    for key, value, meaning in _keys(config.to_dict(), Experiment, ""):
        lines.append(f"  {key} = {value!r}" if isinstance(value, str) else f"  {key} = {value}")
        lines += textwrap.wrap(meaning, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _keys(config: Mapping[str, Any], owner: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
    """Yields each key in a part of a config: its path, its value and its description.

    Args:
      owner: the dataclass that the part is converted to; None if there is none.
    """
    known = meanings(owner) if owner is not None else {}
    for name in config:
        value, path = config[name], f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _keys(value, _type_of(owner, name, config), f"{path}.")
        else:
            yield path, value, known.get(name, "")


def _type_of(owner: Any, name: str, config: Mapping[str, Any]) -> Any:
    """Returns the dataclass that a part of a config is converted to; None if there is none."""
    if owner is Experiment and name == "method":
        return METHODS[config[name]["name"]]
    if owner is Experiment and name == "networks":
        return Mapping[str, HeadsConfig]
    if typing.get_origin(owner) is not None:  # a mapping of names to parts of one kind
        return _dataclass_in(typing.get_args(owner)[-1])
    return _dataclass_in(typing.get_type_hints(owner).get(name)) if is_dataclass(owner) else None


def _dataclass_in(hint: Any) -> Any:
    """Returns the dataclass in a type hint, possibly inside a union or a mapping."""
    if is_dataclass(hint):
        return hint
    inner = [found for found in map(_dataclass_in, typing.get_args(hint)) if found is not None]
    mapped = isinstance(typing.get_origin(hint), type) and issubclass(typing.get_origin(hint), Mapping)
    return (hint if mapped else inner[0]) if inner else None


def meanings(owner: Any) -> dict[str, str]:
    """Returns the descriptions of a dataclass's fields, from its docstring and those of its base classes."""
    found: dict[str, str] = {}
    for cls in reversed(owner.__mro__ if inspect.isclass(owner) else ()):
        _, _, attributes = inspect.cleandoc(cls.__dict__.get("__doc__") or "").partition("Attributes:\n")
        for match in _ATTRIBUTE.finditer(attributes.partition("\n\n")[0]):
            found |= dict.fromkeys(match["names"].split(", "), " ".join(match["text"].split()))
    return found
