"""Scores causal students of digits as whole clips and frame by frame: a table and figures of docs/methods/causal.md.

python docs/methods/causal_tiny.py RESULTS.json NAME=DIR[,DIR ...]:STEPS[:WINDOW] ...  # measures rows
python docs/methods/causal_tiny.py RESULTS.json FIGURE.png                              # prints the table, draws curves

A row is the model directories of one method, one for each seed, sampled with STEPS evaluations per chunk: "1", or "4,1"
for four in the first chunk and one in the later ones (First-Frame Enhancement), or "own" for the directories' own
number. The kernel distance of a frame is that of a clip that repeats the frame. Errors are 95% intervals over draws of
seeds, and of half of each seed's clips without replacement: a clip drawn twice would be compared with itself in the
kernel.

FRAMES=25 in the environment samples clips longer than those in training; each chunk then sees the WINDOW latent frames
before it. Real clips are equally long, and their digits bounce off the walls, which no training showed.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from vpae_jax import tasks
from vpae_jax.config import DataConfig
from vpae_jax.flow.sampler import parse_steps
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.metrics.distances import FeatureScale, Kernels, features
from vpae_jax.run.generation import Generation
from vpae_jax.tasks.base import HeldOut, in_batches
from vpae_jax.tasks.digits.clips import MovingDigits
from vpae_jax.tasks.digits.measures import centroids
from vpae_jax.tasks.digits.scores import classifier
from vpae_jax.tasks.digits.task import ASKED
from vpae_jax.tasks.digits.task import OTHERS as OTHER_CLIPS

FRAMES = int(os.environ.get("FRAMES", "9"))
COUNT, OTHERS, DRAWS = 128, 400, 100
TITLES = {"t2v": "text-to-video", "i2v": "image-to-video"}
CURVES = {
    "kvd_frame": "kernel distance of a frame",
    "digit_frame": "share of the caption's digit",
    "motion_frame": "motion into a frame, of real clips'",
}


def still(clips: np.ndarray, frame: int) -> np.ndarray:
    """Features of one frame, repeated as a static clip."""
    return features(np.repeat(clips[:, frame : frame + 1], 3, axis=1))


def moved(clips: np.ndarray) -> np.ndarray:
    """How far the digit moves into each frame but the first, in pixels, [clip, frame]."""
    return np.linalg.norm(np.diff(centroids(clips), axis=1), axis=-1)


class Judge:
    """Compares clips with real ones; `others` are features of other real clips, then of each of their frames."""

    def __init__(self, clips: np.ndarray, digits: np.ndarray, others: list[np.ndarray]) -> None:
        self.digits, self.speed = digits, moved(clips).mean(0)
        self.kept = [found.std(0) > 0 for found in others]  # features of motion are 0 where nothing moves
        known = [found[:, kept] for found, kept in zip(others, self.kept, strict=True)]
        self.scales = [FeatureScale.of(found) for found in known]
        self.others = [scale(found) for scale, found in zip(self.scales, known, strict=True)]

    def measure(self, clips: np.ndarray) -> dict:
        """Per-clip values from which the scores of any subset of clips follow."""
        frames = range(clips.shape[1])
        found = [features(clips), *(still(clips, frame) for frame in frames)]
        return {
            "features": [s(x[:, kept]) for s, x, kept in zip(self.scales, found, self.kept, strict=True)],
            "digit": np.stack([classifier()(clips[:, frame]) == self.digits for frame in frames], axis=1),
            "speed": moved(clips),
        }

    def scores(self, found: dict, rows: np.ndarray) -> dict:
        """Scores of a subset of clips."""
        pairs = zip(found["features"], self.others, strict=True)
        whole, *frames = (Kernels.of(x[rows], y).distance for x, y in pairs)
        return {
            "kvd": whole,
            "kvd_frame": np.array(frames),
            "digit_frame": found["digit"][rows].mean(0),
            "motion_frame": found["speed"][rows].mean(0) / self.speed,
        }

    def summary(self, seeds: list[dict]) -> dict:
        """Means over seeds, with half the width of their 95% intervals."""
        rng, count = np.random.default_rng(0), len(self.digits)
        every = [self.scores(one, np.arange(count)) for one in seeds]
        draws = []
        for _ in range(DRAWS):
            chosen = [seeds[i] for i in rng.integers(len(seeds), size=len(seeds))]
            half = [self.scores(one, rng.permutation(count)[: count // 2]) for one in chosen]
            draws.append({name: np.mean([one[name] for one in half], axis=0) for name in half[0]})
        result = {"seeds": [one["kvd"] for one in every]}
        for name in every[0]:
            mean = np.mean([one[name] for one in every], axis=0)
            error = 1.96 * np.std([draw[name] for draw in draws], axis=0)
            result[name] = {"mean": mean.tolist(), "error": error.tolist()}
        return result


def real_clips(split: str, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Clips and their digits."""
    source = MovingDigits(split, count, seed, FRAMES)
    items = [source[i] for i in range(count)]
    return np.stack([item["video"] for item in items]), np.array([item["digit"] for item in items])


def asked(pipe: Pipeline, clips: np.ndarray) -> HeldOut:
    """The inputs that models are given: each caption once with the first frame and once without."""
    held_out = tasks.open_task(DataConfig(), Path(), "tiny", {}).held_out(pipe, "evaluation", COUNT)
    held_out = replace(held_out, parts=tuple(replace(part, again=slice(0, 0)) for part in held_out.parts))
    shape = pipe.latent_shape(1, FRAMES)[1:]
    frames = np.zeros((len(held_out), *shape[:3], held_out.condition.frames.shape[-1]), np.float32)
    given = next(part for part in held_out.parts if part.name == "i2v").rows
    for rows, _ in in_batches(COUNT, 32):
        first = clips[rows, :1].astype(np.float32) / 127.5 - 1
        frames[given][rows] = pipe.condition_frames(jnp.asarray(first), FRAMES)
    return replace(held_out, shape=shape, condition=replace(held_out.condition, frames=frames))


def measure(path: Path, rows: list[str]) -> None:
    """Adds rows to the results."""
    results = json.loads(path.read_text()) if path.exists() else {}
    pipe = load_pipeline("tiny")
    real, digits = real_clips(*ASKED["evaluation"], COUNT)
    known, _ = real_clips(ASKED["evaluation"][0], OTHER_CLIPS["evaluation"][1], OTHERS)
    held_out = asked(pipe, real)
    judge = Judge(real, digits, [features(known), *(still(known, frame) for frame in range(FRAMES))])
    results["real"] = dict.fromkeys(TITLES, judge.summary([judge.measure(real)]))
    for text in rows:
        name, _, rest = text.partition("=")
        folders, steps, *window = rest.split(":")
        seeds: dict[str, list[dict]] = {mode: [] for mode in TITLES}
        for folder in folders.split(","):
            student = load_pipeline(folder)
            given = None if steps == "own" else parse_steps(steps, "STEPS")
            sampler = student.sampler(given, window=int(window[0]) if window else None)
            clips = Generation(student, held_out)(student.denoiser, sampler)
            for part in held_out.parts:
                seeds[part.name].append(judge.measure(clips[part.rows]))
        results[name] = {mode: judge.summary(found) for mode, found in seeds.items()}
        path.write_text(json.dumps(results, indent=1))
        print(name, {mode: round(found["kvd"]["mean"], 1) for mode, found in results[name].items()}, flush=True)


def table(results: dict) -> str:
    """One row per method: kernel distance of clips, first and last frame; the caption's digit in these frames."""
    lines = ["| row | KVD of clips | seeds | first frame | last frame | digit, first | digit, last |", "|---" * 7 + "|"]
    for mode, title in TITLES.items():
        for name, found in results.items():
            one = found[mode]
            ends = [
                f"{one[curve]['mean'][i]:{form}} ± {one[curve]['error'][i]:{form}}"
                for curve, form in (("kvd_frame", ".0f"), ("digit_frame", ".2f"))
                for i in (0, -1)
            ]
            whole = f"{one['kvd']['mean']:.0f} ± {one['kvd']['error']:.0f}"
            seeds = ", ".join(f"{seed:.0f}" for seed in one["seeds"])
            lines.append(f"| {title}: {name} | {whole} | {seeds} | " + " | ".join(ends) + " |")
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """Every curve over frames, text-to-video above image-to-video."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    for row, (mode, title) in zip(figure.subplots(2, 3), TITLES.items(), strict=True):
        for axes, (curve, label) in zip(row, CURVES.items(), strict=True):
            for index, (name, found) in enumerate(results.items()):
                mean, error = (np.asarray(found[mode][curve][part]) for part in ("mean", "error"))
                frames = np.arange(len(mean)) + (curve == "motion_frame")
                style = {"color": "black", "ls": ":"} if name == "real" else {"color": f"C{index - 1}"}
                axes.errorbar(frames, mean, error, label=name, capsize=2, lw=1.4, **style)
            axes.set_title(f"{title}: {label}", fontsize=9)
            axes.set_xlabel("frame")
            axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(results), fontsize=8)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    where, *given = sys.argv[1:]
    if given[0].endswith(".png"):
        found = json.loads(Path(where).read_text())
        print(table(found))
        draw(found, Path(given[0]))
    else:
        measure(Path(where), given)
