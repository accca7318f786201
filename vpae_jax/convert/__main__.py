"""Writes a model directory for Diffusers.

    python -m vpae_jax.convert SRC DST --format=diffusers [--weights=generator|ema] [--dtype=...] [--verify]

SRC is a model directory, whose weights are read and written anew, or the workdir of a training run: then DST is the
model directory that the run started from, with the generator of its newest checkpoint as the transformer.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vpae_jax import cli
from vpae_jax.convert.diffusers import read_part
from vpae_jax.convert.files import read_json
from vpae_jax.convert.layout import read_index, write_model
from vpae_jax.convert.parts import PARTS, read_config
from vpae_jax.convert.settings import Scheduler
from vpae_jax.pipeline import embedded_model
from vpae_jax.train.checkpoint import CONFIG_FILE, FOLDER, read_state
from vpae_jax.types import UserError
from vpae_jax.weights import resolve


class SourceParts(Mapping[str, tuple[Any, Any]]):
    """A model directory's parts, each read when it is asked for, so that one is in memory at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.names = [name for name in PARTS if (folder / name).is_dir()]

    def __getitem__(self, name: str) -> tuple[Any, Any]:
        if name not in self.names:
            raise KeyError(name)
        return read_part(self.folder, name, None, lambda path, value: value)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def convert(source: Path, target: Path, weights: str | None, dtype: str | None, verify: bool) -> None:
    """Writes `target`; see the module's docstring.

    Raises:
      UserError: a source that is neither kind of folder, a role or average that the checkpoint lacks, a target that
        exists, or weights that `verify` does not read back as they were written.
    """
    if (source / FOLDER).is_dir():
        base, parts, scheduler = _from_run(source, weights)
    elif weights is not None:
        raise UserError(f"--weights={weights}: {source} is not a training run's workdir; leave --weights out")
    else:
        read_index(source)
        base, parts, scheduler = source, SourceParts(source), None
    stored = None if dtype is None else np.dtype(dtype)
    write_model(target, base, parts, scheduler=scheduler, dtype=stored)
    if verify:
        _verify(target, parts, stored)


def _from_run(workdir: Path, weights: str | None) -> tuple[Path, Mapping[str, tuple[Any, Any]], Scheduler]:
    """The model directory that a run started from, the transformer that it trained, and how to sample that."""
    run = read_json(workdir / CONFIG_FILE)
    path = run["model"]["path"]
    base = embedded_model() if path == "tiny" else resolve(path, workdir)
    state = read_state(workdir)
    average = weights == "ema" or (weights is None and "generator" in state["ema"])
    trained = state["ema" if average else "params"]
    if "generator" not in trained:
        raise UserError(
            f"{workdir}: the checkpoint has no {'average of the ' if average else ''}generator; it was not trained"
        )
    config = read_config(base / "transformer" / "config.json", PARTS["transformer"])
    params = jax.tree.map(np.asarray, trained["generator"])
    return base, {"transformer": (config, params)}, Scheduler("euler", float(run["sample_shift"]))


def _verify(folder: Path, parts: Mapping[str, tuple[Any, Any]], dtype: np.dtype | None) -> None:
    """Reads every written part back and compares bits; removes the folder when they differ."""
    for name in parts:
        _, expected = parts[name]
        _, found = read_part(folder, name, None, lambda path, value: value)
        pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True)
        if not all(np.array_equal(_bits(a.astype(dtype or a.dtype)), _bits(b)) for a, b in pairs):
            shutil.rmtree(folder)
            raise UserError(f"{folder}: {name} does not read back as it was written; removed. Is the disk sound?")
        print(f"{name}: {len(jax.tree.leaves(found))} parameters read back, bit for bit")


def _bits(value: Any) -> Any:
    """The array as unsigned integers, so that NaN equals itself and 0 is not -0."""
    value = np.ascontiguousarray(value)
    return value.view(f"u{value.dtype.itemsize}")


def main(argv: list[str]) -> None:
    parser = cli.Parser("python -m vpae_jax.convert", __doc__)
    parser.add_argument("source", type=Path, metavar="SRC", help="model directory, or workdir of a training run")
    parser.add_argument("target", type=Path, metavar="DST", help="folder to write; must not exist")
    parser.add_argument("--format", choices=["diffusers"], required=True, help="what DST becomes")
    parser.add_argument("--weights", choices=["generator", "ema"], help="of a workdir; by default the average if kept")
    parser.add_argument("--dtype", choices=cli.DTYPES, help="of the written weights; by default as they are")
    parser.add_argument("--verify", action="store_true", help="read DST back and compare it bit for bit")
    given = parser.parse_args(argv)
    convert(given.source, given.target, given.weights, given.dtype, given.verify)
    print(given.target)


if __name__ == "__main__":
    cli.run(main)
