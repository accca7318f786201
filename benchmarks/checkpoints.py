"""Measures the cost of checksums in a run: saves and restores its state with and without them, alternately.

    python benchmarks/checkpoints.py [--folder=DIR] [--gib=1] [--rounds=5] [--markdown=docs/benchmarks.md]

A state of random float32 matrices is saved and restored as in a training run, with and without computing and comparing
checksums. Saving is timed until training can continue, and until the checkpoint is complete; restoring is timed from
disk (after dropping the page cache) and from memory.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
from report import GIB, machine, paste, progress, ratios, table

from vpae_jax import cli
from vpae_jax.config import OptimizerConfig
from vpae_jax.methods.base import Role
from vpae_jax.train import checksums
from vpae_jax.train.checkpoint import Checkpoints
from vpae_jax.train.newest import FOLDER
from vpae_jax.train.optim import make_optimizer
from vpae_jax.train.state import TrainState, create

BEGIN = "<!-- made by benchmarks/checkpoints.py -->"
WIDTH = 2048  # of a matrix: 16 MiB; a state holds three of each, the weights and Adam's moments
NAMES = ("save, until training continues", "save, until complete", "restore, from disk", "restore, from memory")


@dataclasses.dataclass(frozen=True)
class Took:
    """Wall-clock seconds, and CPU seconds of this process."""

    seconds: float
    cpu: float


def make_state(size: int) -> TrainState:
    """A state of about `size` bytes."""
    count = max(1, round(size / (3 * 4 * WIDTH**2)))
    keys = jax.random.split(jax.random.key(0), count)
    params = {"net": {f"{i:03}": jax.random.normal(key, (WIDTH, WIDTH)) for i, key in enumerate(keys)}}
    state = create(0, params, {"net": Role("fresh", True, part="vae")}, {"net": make_optimizer(OptimizerConfig(0.1))})
    # Initial moments are zeros, which would be compressed to nothing.
    opt = jax.tree.map(lambda x: jax.random.normal(keys[0], x.shape) if x.ndim == 2 else x, state.opt)
    return jax.block_until_ready(dataclasses.replace(state, step=jnp.int32(1), opt=opt))


@contextmanager
def without_checksums() -> Iterator[None]:
    """Disables computing and comparing checksums in its body."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(checksums, "of_process", lambda folder, index: {}))
        stack.enter_context(patch.object(checksums, "write", lambda folder, told: None))
        stack.enter_context(patch.object(checksums, "fault", lambda folder, index, count: None))
        yield


def measure(state: TrainState, folder: Path) -> dict[str, Took]:
    """Times one save and two restores, in a workdir of their own."""
    took = {}
    with tempfile.TemporaryDirectory(dir=folder) as workdir, Checkpoints(Path(workdir)) as checkpoints:
        begun = _clock()
        checkpoints.save(state, {})
        took[NAMES[0]] = _since(begun)
        checkpoints.wait()
        took[NAMES[1]] = _since(begun)
        for name in NAMES[2:]:
            if name == NAMES[2]:
                _forget(Path(workdir) / FOLDER)
            begun = _clock()
            moment = checkpoints.newest()
            assert moment is not None
            jax.block_until_ready(checkpoints.restore(moment, state)[0])
            took[name] = _since(begun)
    return took


def _clock() -> Took:
    return Took(time.perf_counter(), time.process_time())


def _since(begun: Took) -> Took:
    now = _clock()
    return Took(now.seconds - begun.seconds, now.cpu - begun.cpu)


def _forget(folder: Path) -> None:
    """Asks the system to drop the cached pages of all files."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(argv: list[str]) -> None:
    parser = cli.Parser("python benchmarks/checkpoints.py", __doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where checkpoints are written"
    )
    parser.add_argument("--gib", type=float, default=1.0, help="size of a checkpoint in GiB")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds")
    parser.add_argument("--markdown", type=Path, help="file for the table; replaces the text between its marks, if any")
    given = parser.parse_args(argv)
    state = make_state(int(given.gib * GIB))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt)))
    ways: dict[str, Callable[[], Any]] = {"with": ExitStack, "without": without_checksums}
    found: dict[str, list[dict[str, Took]]] = {way: [] for way in ways}
    measure(state, given.folder)  # warm-up: loads libraries, compiles programs
    for number in range(given.rounds):
        for way in list(ways)[:: 1 if number % 2 == 0 else -1]:
            progress(f"round {number + 1}, {way} checksums")
            with ways[way]():
                found[way].append(measure(state, given.folder))
    progress("")
    rows = []
    for name in NAMES:
        ours, theirs = ([took[name] for took in found[way]] for way in ways)
        medians = [statistics.median(took.seconds for took in one) for one in (ours, theirs)]
        clock = ratios([took.seconds for took in ours], [took.seconds for took in theirs])
        cpu = ratios([took.cpu for took in ours], [took.cpu for took in theirs])
        rows.append([name, *(f"{seconds:.2f}" for seconds in medians), clock, cpu])
    head = ("", "seconds", "without checksums, s", "ratio", "CPU time ratio")
    versions = machine("jax", "orbax-checkpoint", "tensorstore", "xxhash")
    lines = [f"A state of {size / GIB:.2f} GiB, {given.rounds} rounds; {versions}.", "", *table(head, rows)]
    print("\n".join(lines))
    if given.markdown is not None:
        paste(given.markdown, "\n".join(("", *lines, "")), BEGIN)


if __name__ == "__main__":
    cli.run(main)
