"""Scores causal students of digits, whole clips and frame by frame: the table and the picture of docs/methods.md.

python docs/methods/causal_tiny.py RESULTS.json NAME=DIR[,DIR ...]:STEPS ...      # measures
python docs/methods/causal_tiny.py RESULTS.json                                   # draws causal_students.png and a table

A row is the models of one method, trained from several seeds, sampled in STEPS evaluations a chunk: "1", or "4,1" for
the first chunk in four (First-Frame Enhancement), or "own" for what the folders say. Intervals are of a bootstrap over
clips within seeds drawn again (95 %). A frame's kernel distance is that of the frame standing still.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

from vpae_jax import tasks
from vpae_jax.config import DataConfig
from vpae_jax.inference.pipeline import load_pipeline
from vpae_jax.metrics.distances import FeatureScale, features, kernel_distance
from vpae_jax.run.generation import Generation
from vpae_jax.tasks.digits.measures import centroids
from vpae_jax.tasks.digits.scores import classifier

FOLDER = Path(__file__).parent
COUNT, DRAWS = 128, 300
MODES = ("t2v", "i2v")


def still(clips: np.ndarray, frame: int) -> np.ndarray:
    """Features of one frame that does not move."""
    return features(np.repeat(clips[:, frame : frame + 1], 3, axis=1))


def moved(clips: np.ndarray) -> np.ndarray:
    """How far the digit moves into each frame but the first, in pixels, [clip, frame]."""
    return np.linalg.norm(np.diff(centroids(clips), axis=1), axis=-1)


class Judge:
    """What of clips is compared with real ones."""

    def __init__(self, held_out):
        self.real, self.others = held_out.real, held_out.others
        self.frames = self.others["clips"].shape[1]
        self.scale = FeatureScale.of(self.others["features"])
        stills = [still(self.others["clips"], frame) for frame in range(self.frames)]
        self.stills = [(scale := FeatureScale.of(found), scale(found)) for found in stills]
        self.whole = self.scale(self.others["features"])
        self.speed = moved(self.real["clips"]).mean(0)

    def measure(self, clips: np.ndarray, digits: np.ndarray) -> dict:
        """A clip's numbers, from which those of any choice of clips follow."""
        named = np.stack([classifier()(clips[:, frame]) == digits for frame in range(self.frames)], axis=1)
        stills = [scale(still(clips, frame)) for frame, (scale, _) in enumerate(self.stills)]
        return {"whole": self.scale(features(clips)), "stills": stills, "digit": named, "speed": moved(clips)}

    def scores(self, found: dict, rows: np.ndarray) -> dict:
        """Numbers of the chosen clips."""
        others = [one for _, one in self.stills]
        return {
            "kvd": kernel_distance(found["whole"][rows], self.whole),
            "kvd_frame": [kernel_distance(x[rows], y) for x, y in zip(found["stills"], others, strict=True)],
            "digit_frame": found["digit"][rows].mean(0).tolist(),
            "motion_frame": (found["speed"][rows].mean(0) / self.speed).tolist(),
        }


def interval(judge: Judge, seeds: list[dict]) -> dict:
    """Means over seeds, and what 95 % of draws of seeds, and of clips within them, give."""
    rng, count = np.random.default_rng(0), len(seeds[0]["whole"])
    mean = [judge.scores(one, np.arange(count)) for one in seeds]
    draws = []
    for _ in range(DRAWS):
        chosen = [seeds[i] for i in rng.integers(len(seeds), size=len(seeds))]
        # Drawn with replacement, a clip would meet itself in the kernel; two halves without it have no such pairs.
        part = [judge.scores(one, rng.permutation(count)[: count // 2]) for one in chosen]
        draws.append({name: np.mean([one[name] for one in part], axis=0) for name in part[0]})
    result = {}
    for name in mean[0]:
        centre = np.mean([one[name] for one in mean], axis=0)
        spread = np.std([draw[name] for draw in draws], axis=0) * 1.96
        # Halves of the clips vary as much more as they have fewer clips.
        result[name] = {"mean": centre.tolist(), "error": (spread / np.sqrt(2)).tolist()}
    result["seeds"] = [one["kvd"] for one in mean]
    return result


def measure(path: Path, rows: list[str]) -> None:
    """Adds rows to the results."""
    results = json.loads(path.read_text()) if path.exists() else {}
    task = tasks.open_task(DataConfig(), Path(), "tiny", {})
    held_out = judge = None
    for text in rows:
        name, _, rest = text.partition("=")
        folders, _, steps = rest.rpartition(":")
        seeds: dict[str, list[dict]] = {mode: [] for mode in MODES}
        for folder in folders.split(","):
            pipe = load_pipeline(folder)
            held_out = held_out or task.held_out(pipe, "evaluation", COUNT)
            parts = {part.name: part.rows for part in held_out.parts}
            judge = judge or {
                mode: Judge(
                    type(held_out)(**{**vars(held_out), "real": {k: v[rows] for k, v in held_out.real.items()}})
                )
                for mode, rows in parts.items()
            }
            sampler = pipe.sampler() if steps == "own" else pipe.sampler(cli_steps(steps))
            clips = Generation(pipe, held_out)(pipe.denoiser, sampler)
            for mode, chosen in parts.items():
                seeds[mode].append(judge[mode].measure(clips[chosen], held_out.real["digit"][chosen]))
        results[name] = {mode: interval(judge[mode], found) for mode, found in seeds.items()}
        path.write_text(json.dumps(results, indent=1))
        print(name, {mode: round(found["kvd"]["mean"]) for mode, found in results[name].items()}, flush=True)
