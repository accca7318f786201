"""Compares reading clips through `VideoClips` with reading the same clips by plain PyAV, alternately.

    python benchmarks/reading.py VIDEO [VIDEO ...] [--clips=24] [--bucket=480x832] [--workers=2] [--rounds=3]

Ours decodes, resamples to 16 fps, scales, crops, measures and passes frames to this process. The peers seek to the
keyframe before the same clip, decode until its end, and call `to_ndarray(format="rgb24")` on every frame that begins in
it, neither resampled nor scaled. One peer decodes in one thread, one in PyAV's default number of threads, and one in as
many single-threaded processes as we have workers, without passing frames on.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import av
from report import machine, paste, progress, ratios, table

from vpae_jax import cli
from vpae_jax.encoding.buckets import Size, parse
from vpae_jax.encoding.clip_source import CaptionedVideo, Clip
from vpae_jax.encoding.filters import Filters
from vpae_jax.encoding.videos import VideoClips
from vpae_jax.types import UserError

BEGIN = "<!-- made by benchmarks/reading.py -->"
FPS = 16.0
Span = tuple[Path, float, float]  # a clip's file, start and end in seconds


@dataclass(frozen=True)
class Listed:
    """Videos from any folders, as a manifest of one work unit."""

    paths: tuple[Path, ...]
    units: int = 1
    root: Path = Path("/")

    @property
    def identity(self) -> Mapping[str, object]:
        return {"paths": list(map(str, self.paths))}

    def rows_of(self, unit: int) -> int:
        return len(self.paths)

    def read(self, unit: int) -> Iterator[CaptionedVideo]:
        for number, path in enumerate(self.paths):
            yield CaptionedVideo(f"{number}-{path.stem}", path.absolute(), "a caption")


@dataclass
class Times:
    """Times, with one entry per round.

    Attributes:
      seconds: wall-clock seconds.
      cpu: CPU seconds of this process and its children.
    """

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def ours(paths: tuple[Path, ...], clips: int, bucket: Size, frames: int, workers: int) -> list[Span]:
    """Reads all clips, and returns their positions. This includes starting and stopping the workers."""
    each = -(-clips // len(paths))
    spans = []
    manifest, filters = Listed(paths), Filters(min_motion=0.0, max_black=1.0)
    with VideoClips(manifest, (bucket,), frames, FPS, filters, clips_per_video=each, workers=workers) as source:
        for item in filter(None, source.read([0])):
            if not isinstance(item, Clip):
                raise UserError(f"{item.id}: {item.reason}; leave it out")
            path = paths[int(item.id.partition("-")[0])]
            spans.append((path, item.about["start"], item.about["start"] + frames / FPS))
    return spans


def plain(span: Span, threads: bool = False) -> int:
    """Reads a clip's frames as in PyAV's documentation, and returns their number."""
    path, start, end = span
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        if threads:
            stream.thread_type = "AUTO"
        else:
            stream.thread_count = 1
        container.seek(int(start / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time >= end:
                break
            if frame.time >= start:
                frames.append(frame.to_ndarray(format="rgb24"))
    return len(frames)


def in_turn(spans: list[Span], threads: bool) -> None:
    for span in spans:
        plain(span, threads)


def in_processes(spans: list[Span], workers: int) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        list(pool.map(plain, spans))


def cpu_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
    """Times every run once per round; every other round runs in reverse order."""
    times = {name: Times() for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: 1 if number % 2 == 0 else -1]:
            progress(f"round {number + 1}, {name}")
            cpu, start = cpu_seconds(), time.perf_counter()
            runs[name]()
            times[name].seconds.append(time.perf_counter() - start)
            times[name].cpu.append(cpu_seconds() - cpu)
    progress("")
    return times


def main(argv: list[str]) -> None:
    parser = cli.Parser("python benchmarks/reading.py", __doc__)
    parser.add_argument("videos", type=Path, nargs="+", help="files to read clips from")
    parser.add_argument("--clips", type=int, default=24, help="number of clips, about the same from each video")
    parser.add_argument("--frames", type=int, default=81, help="frames per clip, at 16 fps")
    parser.add_argument("--bucket", default="480x832", help="height and width of our clips")
    parser.add_argument("--workers", type=int, default=2, help="number of processes, ours and the last peer's")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds")
    parser.add_argument("--markdown", type=Path, help="file for the table; replaces the text between its marks, if any")
    given = parser.parse_args(argv)
    (bucket,) = parse(given.bucket)
    read = partial(ours, tuple(given.videos), given.clips, bucket, given.frames, given.workers)
    spans = read()
    shown = sum(map(plain, spans))
    runs = {
        "VideoClips": read,
        "PyAV, one thread": partial(in_turn, spans, False),
        "PyAV, own threads": partial(in_turn, spans, True),
        f"PyAV, {given.workers} processes": partial(in_processes, spans, given.workers),
    }
    times = measure(runs, given.rounds)
    mine = times["VideoClips"]
    rows = []
    for name, found in times.items():
        speed = len(spans) / statistics.median(found.seconds)
        against = ["", ""] if found is mine else [ratios(found.seconds, mine.seconds), ratios(found.cpu, mine.cpu)]
        rows.append([name, f"{speed:.2f}", f"{statistics.median(found.cpu) / len(spans):.2f}", *against])
    head = ("", "clips/s", "CPU s per clip", "our throughput / theirs", "the same, per CPU time")
    lines = [
        f"{len(spans)} clips of {given.frames} frames of {bucket[0]}x{bucket[1]} from {len(given.videos)} video(s), "
        f"{shown:,} frames in the source; {given.workers} workers, {given.rounds} rounds; {machine('av', 'numpy')}.",
        "",
        *table(head, rows),
    ]
    print("\n".join(lines))
    if given.markdown is not None:
        paste(given.markdown, "\n".join(("", *lines, "")), BEGIN)


if __name__ == "__main__":
    cli.run(main)
