"""Compares reading latent records with reading raw bytes, and a training step on records with one on clips in memory.

    python benchmarks/data.py [--folder=DIR] [--clips=64] [--rounds=5] [--steps=10] [--markdown=FILE]

The records are random clips of 81 frames of 480x832 with all arrays of image-to-video. They are written to the folder,
which should be on the disk to be measured, and read in random order in as many threads as in training; for comparison,
the same files are read sequentially in large pieces. "Cold" is after asking the system to drop them from its cache
(`posix_fadvise`; a virtual disk's host may still cache them), "warm" right after they were read. Reading takes seconds
and varies much, so it has three times as many rounds.

A step is one of the real loop, with a network that treats every token of a clip alike, on one clip per step. On a CPU,
training and reading share the cores, which is harder than next to an accelerator.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from flax import nnx
from report import machine, paste, progress, ratios, table
from rounds import Times

from vpae_jax import cli
from vpae_jax.config import Experiment, OptimizerConfig
from vpae_jax.data.batches import latent_batches
from vpae_jax.data.loader import READ
from vpae_jax.data.records import LatentRecords, unpack
from vpae_jax.encoding.units import Units
from vpae_jax.methods.base import Role, Update
from vpae_jax.train.loop import Hook, train
from vpae_jax.train.metrics import read_metrics
from vpae_jax.train.optim import make_optimizer
from vpae_jax.train.roles import RoleModels, split
from vpae_jax.train.state import TrainState, create
from vpae_jax.types import Batch

BEGIN = "<!-- made by benchmarks/data.py -->"
LATENTS, TEXT, PROMPT, IMAGE = (21, 60, 104, 16), (512, 4096), 100, (257, 1280)
UNIT, PIECE = 8, 8 << 20
THREADS = READ.num_threads
HIDDEN = 1024
WARM_UP = 3  # steps for compiling and filling the queue


def write(folder: Path, clips: int) -> LatentRecords:
    """Writes random clips, unless they exist."""
    units = Units(folder, {"clips": f"{clips} random ones"}, -(-clips // UNIT))
    rng = np.random.default_rng(0)
    for unit in units.pending():
        progress(f"writing unit {unit + 1} of {units.count}")
        with units.write(unit) as writer:
            for number in range(unit * UNIT, min(clips, (unit + 1) * UNIT)):
                frames = np.zeros((*LATENTS[:-1], 4 + LATENTS[-1]), np.float32)
                frames[0, ..., :4], frames[..., 4:] = 1, rng.standard_normal(LATENTS, np.float32)
                arrays = {"latents": LATENTS, "text": (PROMPT, TEXT[1]), "image": IMAGE}
                values = {name: rng.standard_normal(shape, np.float32) for name, shape in arrays.items()}
                writer.add(str(number), {**values, "frames": frames}, {"caption": "random"})
    null = {"text": np.zeros(TEXT, np.float32), "text_mask": np.arange(TEXT[0]) < 1}
    units.finish(null, {"text_tokens": TEXT[0], "takes_image": True})
    return LatentRecords(folder)


def readers(records: LatentRecords) -> dict[str, Callable[[], object]]:
    """Functions that read all records, by name."""
    paths = [records.folder / shard["file"] for shard in records.index["shards"]]
    order = [int(i) for i in np.random.default_rng(1).permutation(len(records))]

    def raw() -> None:
        buffer = bytearray(PIECE)
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def own() -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(lambda i: records[i]["latents"].shape, order):
                pass

    def theirs() -> None:
        """ArrayRecord's reader, with the same check of each record."""
        opened = [ArrayRecordReader(str(path), options="readahead_buffer_size:0") for path in paths]

        def read(index: int) -> None:
            unpack(np.frombuffer(opened[index // UNIT].read([index % UNIT])[0], np.uint8))

        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(read, order):
                pass
        for reader in opened:
            reader.close()

    return {"raw": raw, "records": own, "ArrayRecord's reader": theirs}


def forget(records: LatentRecords) -> None:
    """Asks the system to drop the files from the page cache."""
    for shard in records.index["shards"]:
        number = os.open(records.folder / shard["file"], os.O_RDONLY)
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def reading(records: LatentRecords, rounds: int) -> Iterator[str]:
    """Lines of a table: throughput of each reader, and its ratio to raw reading in the same round."""
    total = sum(shard["bytes"] for shard in records.index["shards"])
    found = readers(records)
    times = {(name, cold): Times() for cold in (True, False) for name in found}
    for number in range(rounds):
        progress(f"reading, round {number + 1} of {rounds}")
        for name in list(found)[:: 1 if number % 2 == 0 else -1]:
            for cold in (True, False):
                if cold:
                    forget(records)
                cpu, start = time.process_time(), time.perf_counter()
                found[name]()
                times[name, cold].seconds.append(time.perf_counter() - start)
                times[name, cold].cpu.append(time.process_time() - cpu)
    rows = []
    for (name, cold), taken in times.items():
        rates = [total / seconds for seconds in taken.seconds]
        against = [total / seconds for seconds in times["raw", cold].seconds]
        rate, cpu = statistics.median(rates) / 1e6, statistics.median(taken.cpu) / len(records) * 1e3
        rows.append([name, "cold" if cold else "warm", f"{rate:,.0f}", ratios(rates, against), f"{cpu:.1f}"])
    yield from table(["", "cache", "MB/s", "ratio to raw", "CPU ms per clip"], rows)


class Network(nnx.Module):
    """A network that treats every token alike."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(LATENTS[-1], HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, LATENTS[-1], rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.silu(self.up(x)))


@dataclasses.dataclass(frozen=True)
class Predict:
    """A method that predicts the clip from its condition frames and text, so that all of a batch is read."""

    batch: ClassVar[type] = Batch

    @property
    def roles(self):
        return {"generator": Role("fresh", "all", model="vae")}

    @property
    def updates(self):
        return (Update("generator", self.loss),)

    def loss(self, trainable, others, batch, key):
        shift = batch.condition.text.mean((1, 2)) + batch.condition.image.mean((1, 2))
        found = trainable(batch.condition.frames[..., 4:]) + shift[:, None, None, None, None]
        return ((found - batch.latents) ** 2).mean((1, 2, 3, 4)), {}


class Repeated(Iterator[Batch]):
    """The same batch, repeated forever."""

    bad = 0

    def __init__(self, batch: Batch):
        self.batch = batch

    def __next__(self) -> Batch:
        return self.batch

    def get_state(self) -> dict[str, int]:
        return {}

    def set_state(self, state: Any) -> None:
        del state


def step_times(batches: Any, steps: int) -> tuple[float, float, float]:
    """Median seconds of a step of the loop, CPU seconds per step, and the median fraction of waiting for data."""
    method, options = Predict(), OptimizerConfig(1e-3)
    last = WARM_UP + steps
    experiment = Experiment("benchmark", {}, {"generator": options}, last, 1, log_every=1, checkpoint_every=last)
    graph, params = split(Network(nnx.Rngs(0)))
    optimizers = {"generator": make_optimizer(options)}
    state = create(0, {"generator": params}, method.roles, optimizers)
    models = RoleModels(method.roles, {"generator": graph})
    cpu: dict[int, float] = {}

    def note(step: int, state: TrainState) -> dict[str, float]:
        jax.block_until_ready(state.params)
        cpu[step] = time.process_time()
        return {}

    with tempfile.TemporaryDirectory() as workdir:
        train(
            experiment,
            method,
            models,
            optimizers,
            state,
            {},
            batches,
            lambda x: x,
            Path(workdir),
            (Hook(1, note, "noting"),),
        )
        # The last record covers two steps' reading, and saving a checkpoint.
        found = read_metrics(Path(workdir))[WARM_UP:-1]
    seconds, waits = ([record[name] for record in found] for name in ("seconds_per_step", "data_wait"))
    return statistics.median(seconds), (cpu[last - 1] - cpu[WARM_UP]) / (steps - 1), statistics.median(waits)


def stepping(records: LatentRecords, rounds: int, steps: int) -> Iterator[str]:
    """Lines of a table: a step on records compared with one on a batch in memory, alternately."""
    times = {name: [] for name in ("clips in memory", "records")}
    for number in range(rounds):
        progress(f"steps, round {number + 1} of {rounds}")
        for name in list(times)[:: 1 if number % 2 == 0 else -1]:
            batches = latent_batches([(records, 1.0)], 1, seed=0)
            with contextlib.redirect_stdout(io.StringIO()):  # the loop's lines
                times[name].append(step_times(batches if name == "records" else Repeated(next(batches)), steps))
            batches.close()
    seconds, cpu, waits = ({name: [t[i] for t in taken] for name, taken in times.items()} for i in range(3))
    base = "clips in memory"
    rows = [
        [
            name,
            f"{statistics.median(seconds[name]):.2f}",
            ratios(seconds[name], seconds[base]),
            ratios(cpu[name], cpu[base]),
            f"{statistics.median(waits[name]):.1%}",
        ]
        for name in times
    ]
    yield from table(["step on", "seconds", "ratio", "CPU time ratio", "waiting for data"], rows)


def main(argv: list[str]) -> None:
    parser = cli.Parser("benchmarks/data.py", __doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--markdown", type=Path)
    options: argparse.Namespace = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        records = write(options.folder or Path(scratch) / "records", options.clips)
        size = sum(shard["bytes"] for shard in records.index["shards"]) / 1e6
        rounds = f"{options.rounds} rounds, {3 * options.rounds} for reading"
        head = f"{len(records)} clips, {size:,.0f} MB; {machine('jax', 'array_record')}; {rounds}."
        lines = [head, "", *reading(records, 3 * options.rounds), "", *stepping(records, options.rounds, options.steps)]
    progress("")
    print("\n".join(lines))
    if options.markdown:
        paste(options.markdown, "\n" + "\n".join(lines) + "\n", BEGIN)


if __name__ == "__main__":
    cli.run(main)
