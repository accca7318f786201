"""Measures the memory of an encoding process over a long run, which must not grow with the amount of work done.

    python benchmarks/encode_memory.py WORKDIR [--clips=2000] [--rows=100000] [--plot=FILE.png]

It runs `python -m vpae_jax.encode` twice with the embedded model: over small videos, and over a table that starts with
a few of them and continues with missing files, each of which is rejected. Four times per second, this script records
the process's own memory, without its workers, and the number of work units written. File pages are not counted, since
the system reclaims them when needed. For each run, it prints the memory after a fifth of the run and at the end, and
the growth per item in between.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np

from vpae_jax import cli
from vpae_jax.types import UserError

UNIT = 50
SIDE, FRAMES, FPS = 48, 10, 8
SETTLED = 0.2  # fraction of a run after which caches and pools have their final size
MIB = 2**20


@dataclass
class Run:
    """Samples of one run.

    Attributes:
      name: for output.
      done: number of items written, at each sample.
      held: bytes of memory, at each sample.
    """

    name: str
    done: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)

    def growth(self) -> tuple[float, float, float]:
        """MiB after a fifth of the run and at its end, each the median over a tenth of it; and bytes per item in
        between."""
        done, held = np.array(self.done), np.array(self.held)
        last = done[-1]
        early = (done >= (SETTLED - 0.05) * last) & (done <= (SETTLED + 0.05) * last)
        late = done >= 0.9 * last
        first, end = np.median(held[early]), np.median(held[late])
        return first / MIB, end / MIB, float((end - first) / (np.median(done[late]) - np.median(done[early])))


def make_videos(folder: Path, count: int) -> None:
    """Writes videos of moving noise, all different."""
    folder.mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        picture = rng.integers(0, 256, (SIDE // 8, SIDE // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        with av.open(str(folder / f"{number:06d}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=FPS)
            stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
            for step in range(FRAMES):
                frame = av.VideoFrame.from_ndarray(np.roll(picture, 4 * step, axis=1), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        (folder / f"{number:06d}.txt").write_text(f"number {number}")


def make_table(table: Path, rows: int) -> None:
    """Writes one unit of existing videos, so that all networks are compiled at the start, and rows of missing files."""
    with table.open("w") as file:
        file.write("path,caption\n")
        file.writelines(f"{number:06d}.mp4,number {number}\n" for number in range(UNIT))
        file.writelines(
            f"clips/{number // 1000}/{number}.mp4,the caption of video {number}\n" for number in range(rows)
        )


def follow(name: str, output: Path, arguments: list[str]) -> Run:
    """Runs the command and samples its memory until it ends."""
    run = Run(name)
    begin = time.monotonic()
    command = [sys.executable, "-m", "vpae_jax.encode", f"--output={output}", f"--unit={UNIT}", *arguments]
    process = subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    while process.poll() is None:
        held = memory(process.pid)
        units = output / "units"
        done = UNIT * len(os.listdir(units)) if units.is_dir() else 0
        if held and done:
            run.done.append(done)
            run.held.append(held)
        time.sleep(0.25)
    if process.returncode or not run.done:
        raise UserError(f"{name}: ended with status {process.returncode}; see its message above")
    first, last, slope = run.growth()
    print(
        f"{name}: {run.done[-1]} in {time.monotonic() - begin:.0f} s; {first:.0f} MiB after {SETTLED:.0%}, "
        f"{last:.0f} MiB at the end, {slope:+.0f} bytes per item; peak {max(run.held) / MIB:.0f} MiB",
        flush=True,
    )
    return run


def memory(pid: int) -> int:
    """A process's own memory in bytes, including swapped-out memory; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return sum(int(found[name][0]) * 1024 for name in ("RssAnon", "VmSwap") if name in found)


def plot(runs: list[Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    top = 1.2 * max(max(run.held) for run in runs) / MIB
    figure, axes = pyplot.subplots(1, len(runs), figsize=(4.4 * len(runs), 2.8), sharey=True, layout="constrained")
    for axis, run in zip(axes, runs, strict=True):
        axis.plot(run.done, np.array(run.held) / MIB, linewidth=1.2)
        axis.set(title=run.name, xlabel="done", ylim=(0, top))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("memory, MiB")
    figure.savefig(path, dpi=90)


def main(argv: list[str]) -> None:
    parser = cli.Parser("python benchmarks/encode_memory.py", __doc__)
    parser.add_argument("workdir", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--clips", type=int, default=2000, help="number of small videos")
    parser.add_argument("--rows", type=int, default=100_000, help="number of rows with missing files")
    parser.add_argument("--plot", type=Path, help="file for a plot of both runs; needs matplotlib")
    given = parser.parse_args(argv)
    if given.clips < 10 * UNIT or given.rows < 10 * UNIT:
        raise UserError(f"--clips={given.clips} --rows={given.rows}: expected at least {10 * UNIT}, ten units")
    if given.workdir.exists():
        raise UserError(f"{given.workdir} already exists; give a folder that does not")
    videos, table = given.workdir / "videos", given.workdir / "rows.csv"
    make_videos(videos, given.clips)
    make_table(table, given.rows)
    runs = [
        follow("small videos", given.workdir / "records", [f"--videos={videos}"]),
        follow(
            "rows of files that are missing",
            given.workdir / "rejects",
            [f"--videos={videos}", f"--manifest={table}", "--workers=1"],
        ),
    ]
    if given.plot is not None:
        plot(runs, given.plot)


if __name__ == "__main__":
    cli.run(main)
