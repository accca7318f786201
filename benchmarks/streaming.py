"""Measures latency, frame rate and memory of streamed clips.

    python benchmarks/streaming.py [--model=tiny] [--num_frames=9,33] [--chunk=1] [--rounds=5] [--lengths=9,33,129,513]
        [--window=6] [--sink=1] [--markdown=docs/benchmarks.md]

The model's weights are sampled as a one-step student that generates whole clips, and as causal students that generate
them chunk by chunk; they were not trained for it, but this does not affect times. A clip is timed from its prompt to
frames on the host. All students alternate, and a round's time is the shortest of three.

Memory is that of one clip of a causal student with a window, streamed and generated whole, each in a separate process:
on CPU, the peak growth of the resident set; on accelerators, the peak bytes in use on the device.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from report import machine, paste, progress, ratios, table

from vpae_jax import cli
from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.draws import noise_of_seed
from vpae_jax.flow.sampler import ONE_STEP, Sampler
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.types import UserError

BEGIN, BEGIN_MEMORY = "<!-- made by benchmarks/streaming.py -->", "<!-- made by benchmarks/streaming.py, memory -->"
PROMPT, SHIFT = "a three moves up", 5.0
MIB, REPEATS = 2**20, 3
WHOLE, STREAMED = "whole", "streamed"
Clip = Callable[[], Iterator[Any]]


def students(chunks: Chunks) -> dict[str, Sampler]:
    """The students that are compared; the first one generates whole clips."""
    one, four = replace(ONE_STEP, chunks=chunks), Sampler.even(4, SHIFT, solver="consistency")
    return {
        "bidirectional, 1 step": ONE_STEP,
        "causal, 1 step": one,
        "causal, 4 steps in the first chunk, then 1": replace(one, solver="consistency", first=four.times),
        "causal, 4 steps": replace(four, chunks=chunks),
    }


def whole(pipe: Pipeline, sampler: Sampler, num_frames: int) -> Iterator[Any]:
    """All frames of a clip at once."""
    noise, key = noise_of_seed(0, pipe.latent_shape(1, num_frames))
    latents = pipe.sample(noise, pipe.condition([PROMPT], None, num_frames), None, sampler, key[None])
    yield np.asarray(pipe.decode(latents))[0]


def clip(pipe: Pipeline, sampler: Sampler, num_frames: int) -> Iterator[Any]:
    """A clip, streamed if its sampler is causal."""
    if sampler.chunks is None:
        return whole(pipe, sampler, num_frames)
    return pipe.stream(PROMPT, sampler=sampler, num_frames=num_frames)


@dataclass(frozen=True)
class Took:
    """Times of a clip.

    Attributes:
      first, last: seconds until its first frame, and until its last.
      first_cpu, last_cpu: CPU seconds of this process until then.
    """

    first: float
    last: float
    first_cpu: float
    last_cpu: float


def took(make: Clip) -> Took:
    """Times one clip."""
    begun, cpu, came = time.perf_counter(), time.process_time(), []
    for _ in make():
        came.append((time.perf_counter() - begun, time.process_time() - cpu))
    (first, first_cpu), (last, last_cpu) = came[0], came[-1]
    return Took(first, last, first_cpu, last_cpu)


def measure(clips: dict[str, Clip], rounds: int) -> dict[str, list[Took]]:
    """The shortest times of each clip in every round; every other round runs in reverse order."""
    for name, make in clips.items():
        progress(f"compiling: {name}")
        took(make)
    found: dict[str, list[Took]] = {name: [] for name in clips}
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        for name in list(clips)[:: 1 if number % 2 == 0 else -1]:
            some = [took(clips[name]) for _ in range(REPEATS)]
            found[name].append(Took(*(min(getattr(one, field.name) for one in some) for field in fields(Took))))
    return found


def rows(found: dict[str, list[Took]], num_frames: int) -> Iterator[list[str]]:
    """Lines of the table of times, with ratios to the first clip's."""

    def compared(times: list[Took], key: str) -> str:
        return ratios([getattr(one, key) for one in times], [getattr(one, key) for one in found[next(iter(found))]])

    for name, times in found.items():
        first, last = (statistics.median(getattr(one, key) for one in times) for key in ("first", "last"))
        soon, all_of_it = ([compared(times, key), compared(times, f"{key}_cpu")] for key in ("first", "last"))
        yield [f"{num_frames}", name, f"{first:.3f}", *soon, f"{num_frames / last:.1f}", *all_of_it]


HEAD = ("frames", "", "first frame, s", "ratio", "CPU time ratio", "frames/s", "time ratio", "CPU time ratio")


def memory(model: str, way: str, num_frames: int, chunks: Chunks) -> int:
    """Bytes that one clip needs in addition to the weights, in this process."""
    pipe, sampler = load_pipeline(model), replace(ONE_STEP, chunks=chunks)
    make = whole if way == WHOLE else clip
    for _ in make(pipe, sampler, num_frames):
        pass  # warm-up: compiles programs
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return device.memory_stats()["peak_bytes_in_use"]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    for _ in make(pipe, sampler, num_frames):
        pass
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def apart(argv: Sequence[str], way: str, num_frames: int) -> int:
    """`memory` in a separate process."""
    command = [sys.executable, str(Path(__file__).resolve()), *argv, f"--memory={way}:{num_frames}"]
    done = subprocess.run(command, env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, capture_output=True)
    if done.returncode:
        raise UserError(f"a clip of {num_frames} frames, {way}: {done.stderr.decode(errors='replace').strip()}")
    return json.loads(done.stdout.decode().splitlines()[-1])


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser("python benchmarks/streaming.py", __doc__)
    add = parser.add_argument
    add("--model", default="tiny", help="model whose weights are sampled")
    add("--num_frames", default="9,33", help="frames of the clips that are timed")
    add("--chunk", type=int, default=1, help="latent frames per chunk")
    add("--rounds", type=int, default=5, help="number of rounds")
    add("--lengths", default="9,33,129,513", help="frames of the clips whose memory is measured; empty for none")
    add("--window", type=int, default=6, help="number of latest latent frames that a chunk sees, for memory")
    add("--sink", type=int, default=1, help="number of first latent frames that it sees in addition")
    add("--markdown", type=Path, help="file for the tables; replaces the text between its marks, if any")
    add("--memory", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(argv: list[str]) -> None:
    given = _arguments(argv)
    windowed = Chunks(given.chunk, window=given.window, sink=given.sink)
    if given.memory is not None:
        way, _, frames = given.memory.partition(":")
        print(memory(given.model, way, int(frames), windowed))
        return
    pipe = load_pipeline(given.model)
    size, own = f"{pipe.defaults.height}x{pipe.defaults.width}", given.model
    where = f"{jax.devices()[0].device_kind}; {machine('jax')}"
    latent = f"{given.chunk} latent frame{'s' if given.chunk > 1 else ''} per chunk"
    lines = []
    for length in _numbers(given.num_frames):
        clips: dict[str, Clip] = {
            name: lambda sampler=sampler, length=length: clip(pipe, sampler, length)
            for name, sampler in students(Chunks(given.chunk)).items()
        }
        lines.extend(rows(measure(clips, given.rounds), length))
    tables = {BEGIN: [f"{own}, {size}, {latent}, {given.rounds} rounds; {where}.", "", *table(HEAD, lines)]}
    if given.lengths:
        held = []
        for length in _numbers(given.lengths):
            progress(f"memory of {length} frames")
            held.append([f"{length}", *(f"{apart(argv, way, length) / MIB:.1f}" for way in (STREAMED, WHOLE))])
        about = (
            f"{own}, {size}, {latent}, a window of {given.window} latent frames and a sink of {given.sink}; {where}."
        )
        tables[BEGIN_MEMORY] = [about, "", *table(("frames", "MiB, streamed", "MiB, whole clip"), held)]
    progress("")
    for begin, lines in tables.items():
        print("\n".join(lines))
        if given.markdown is not None:
            paste(given.markdown, "\n".join(("", *lines, "")), begin)


if __name__ == "__main__":
    cli.run(main)
