"""Compares loading, converting and verifying weights with diffusers.

    python benchmarks/weights.py [--preset=t2v-1.3b] [--layers=N] [--rounds=N] [--folder=TMP] [--json=FILE]
        [--markdown=FILE]

It creates a checkpoint with random weights, and measures every action in a separate process (`measure.py`), ours and
diffusers' alternately, in several rounds; ratios are within a round. The file is in the page cache. Host memory, bytes
read and values are checked along the way; if a check fails, the program exits with one line and status 1.

Needs Linux, torch and diffusers, disk space for about three times the checkpoint, and memory for five times.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import PART, Facts, measure
from report import GIB, machine, paste, progress, ratios
from report import table as markdown
from synthetic import random_values

from vpae_jax import cli
from vpae_jax.models.presets import PRESETS
from vpae_jax.weights.writing import write_part

LIMIT = 2 * GIB  # maximum host memory of a load in addition to the resulting arrays
BEGIN = "<!-- made by benchmarks/weights.py -->"
Spec = Mapping[str, Any]
Round = dict[str, Facts]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      label: what was measured.
      ours: key of our measurement.
      theirs: key of diffusers' measurement.
    """

    label: str
    ours: str
    theirs: str


# Keys of `_actions`.
ROWS = (
    Row("load, bfloat16", "load bfloat16", "diffusers' load bfloat16"),
    Row("the same, Diffusers with a copy", "load bfloat16", "diffusers' load bfloat16, copied"),
    Row("the same, second load of the process", "load again", "diffusers' load bfloat16, copied"),
    Row("load, float32", "load float32", "diffusers' load float32"),
    Row("load, bfloat16, sharded over 8 devices", "load sharded", "diffusers' load bfloat16, copied"),
    Row("the same, 2 processes of 4 devices", "load in two", "diffusers' load bfloat16, copied"),
    Row("convert, Diffusers to Diffusers", "to diffusers", "diffusers' rewrite"),
    Row("convert, Diffusers to Wan", "to wan", "diffusers' rewrite"),
    Row("verify", "verify", "diffusers' comparison"),
)
LOADS = tuple(dict.fromkeys(row.ours for row in ROWS if row.ours.startswith("load")))


class Checks:
    """Checks that must hold; each method exits the program if one fails."""

    def __init__(self, file_bytes: int):
        self._file_bytes = file_bytes

    def load(self, name: str, facts: Facts) -> None:
        """Checks memory in addition to the arrays, and bytes of tensors read."""
        self._hold(facts["extra"] < LIMIT, f"{name}: {facts['extra']} bytes of memory besides arrays, limit {LIMIT}")
        read = facts["bytes_read"]
        self._hold(read <= self._file_bytes, f"{name}: {read} bytes read from a file of {self._file_bytes}")

    def equal(self, name: str, found: Mapping[str, int], expected: Mapping[str, int]) -> None:
        """Checks that checksums of values are equal."""
        different = [key for key in {**found, **expected} if found.get(key) != expected.get(key)]
        self._hold(not different, f"{name}: {len(different)} arrays differ, the first is {different[:1]}")

    def _hold(self, holds: bool, line: str) -> None:
        if not holds:
            sys.exit(f"error: {line}")


def run(source: Path, folder: Path, rounds: int) -> list[Round]:
    """Measures everything.

    Args:
      source: the checkpoint.
      folder: where copies of it may be written.
      rounds: number of rounds.
    """
    file_bytes = sum(path.stat().st_size for path in (source / PART).glob("*.safetensors"))
    checks, touch = Checks(file_bytes), 3 * file_bytes
    _warm(source)
    _check_values(source, checks)
    write = {"action": "convert", "folder": str(source), "target": str(folder / "copy"), "form": "diffusers"}
    measure(write)
    os.sync()
    result = []
    for number in range(1, rounds + 1):
        measured = {}
        for name, specs in _actions(source, folder).items():
            progress(f"round {number} of {rounds}: {name}")
            measured[name] = _together(measure(*specs, touch=touch))
            shutil.rmtree(folder / "written", ignore_errors=True)
            os.sync()
            if name in LOADS:
                checks.load(name, measured[name])
        result.append(measured)
    progress("")
    return result


def _actions(source: Path, folder: Path) -> dict[str, list[Spec]]:
    """The actions to measure in each round; several specs run concurrently."""
    at, copy, written = ({"folder": str(source)}, {"target": str(folder / "copy")}, {"target": str(folder / "written")})
    theirs, ours = {"action": "diffusers", **at, "dtype": "bfloat16"}, {"action": "ours", **at, "dtype": "bfloat16"}
    return {
        "load bfloat16": [ours],
        "diffusers' load bfloat16": [theirs],
        "load again": [{**ours, "repeat": True}],
        "diffusers' load bfloat16, copied": [{**theirs, "copy": True}],
        "load sharded": [{**ours, "devices": 8}],
        "load float32": [{**ours, "dtype": "float32"}],
        "diffusers' load float32": [{**theirs, "dtype": "float32"}],
        "load in two": _pair(ours),
        "to diffusers": [{"action": "convert", **at, **written, "form": "diffusers"}],
        "diffusers' rewrite": [{"action": "diffusers_convert", **at, **written}],
        "to wan": [{"action": "convert", **at, **written, "form": "wan"}],
        "verify": [{"action": "verify", **at, **copy}],
        "diffusers' comparison": [{"action": "diffusers_verify", **at, **copy}],
    }


def _pair(spec: Spec) -> list[Spec]:
    """A load by two processes, which connect through a currently free port."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    return [{**spec, "devices": 4, "rank": rank, "address": address} for rank in range(2)]


def _together(facts: list[Facts]) -> Facts:
    """Combines the measurements of concurrent processes: maximum time and memory, total of everything else."""
    combine = {"seconds": max, "extra": max}
    return {key: combine.get(key, sum)(one[key] for one in facts) for key in facts[0] if key != "digests"}


def _check_values(source: Path, checks: Checks) -> None:
    """Checks that the weights are the same however they are sharded, over one process or two."""
    progress("checking values")
    load = {"action": "ours", "folder": str(source), "dtype": "bfloat16"}
    whole = {**load, "digest": "whole"}
    alone, sharded = measure(whole)[0], measure({**whole, "devices": 8})[0]
    checks.equal("load sharded", sharded["digests"], alone["digests"])
    shards = {**load, "digest": "shards"}
    together, pair = measure({**shards, "devices": 8})[0], measure(*_pair(shards))
    merged = {key: value for facts in pair for key, value in facts["digests"].items()}
    checks.equal("load in two", merged, together["digests"])


def _warm(source: Path) -> None:
    """Reads the checkpoint into the page cache, so that no measurement waits for the disk."""
    for path in (source / PART).glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(2**24):
                pass


def table(rounds: list[Round], file_bytes: int) -> Iterator[str]:
    """The lines of a Markdown table."""
    head = ("", "seconds", "Diffusers, s", "ratio", "CPU time ratio", "memory", "Diffusers, memory", "read")
    rows = []
    for row in ROWS:
        ours, theirs = [one[row.ours] for one in rounds], [one[row.theirs] for one in rounds]
        read = f"{max(facts['bytes_read'] for facts in ours) / file_bytes:.2%}" if row.ours in LOADS else ""
        cells = (
            row.label,
            f"{_median(ours, 'seconds'):.1f}",
            f"{_median(theirs, 'seconds'):.1f}",
            _ratios(ours, theirs, "seconds"),
            _ratios(ours, theirs, "cpu"),
            f"{max(facts['extra'] for facts in ours) / GIB:.2f} GiB",
            f"{max(facts['extra'] for facts in theirs) / GIB:.2f} GiB",
            read,
        )
        rows.append(cells)
    return markdown(head, rows)


def _median(facts: list[Facts], key: str) -> float:
    return statistics.median(one[key] for one in facts)


def _ratios(ours: list[Facts], theirs: list[Facts], key: str) -> str:
    return ratios([one[key] for one in ours], [one[key] for one in theirs])


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser("python benchmarks/weights.py", __doc__)
    add = parser.add_argument
    add("--preset", default="t2v-1.3b", choices=PRESETS, help="preset that determines the checkpoint's sizes")
    add("--layers", type=int, help="number of blocks; by default the preset's")
    add("--rounds", type=int, default=3, help="number of rounds")
    add("--folder", type=Path, help="where to create a temporary folder")
    add("--json", type=Path, help="file for all measurements")
    add("--markdown", type=Path, help="file for the table; replaces the text between its marks, if any")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    given = _arguments(argv)
    if given.folder is not None:
        given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        source = Path(folder) / "source"
        progress("making the checkpoint")
        write_part(source, PART, random_values(given.preset, given.layers))
        file_bytes = sum(path.stat().st_size for path in (source / PART).glob("*.safetensors"))
        rounds = run(source, Path(folder), given.rounds)
    layers = "" if given.layers is None else f" with {given.layers} layers"
    size = f"{file_bytes / 1e9:.2f} GB of bfloat16"
    where = machine("jax", "torch", "diffusers", "safetensors")
    about = f"{given.preset}'s transformer{layers}, {size}; {where}; {given.rounds} rounds."
    text = "\n".join(("", about, "", *table(rounds, file_bytes), ""))
    print(text)
    if given.json is not None:
        given.json.write_text(json.dumps({"about": about, "bytes": file_bytes, "rounds": rounds}, indent=2) + "\n")
    if given.markdown is not None:
        paste(given.markdown, text, BEGIN)


if __name__ == "__main__":
    cli.run(main)
