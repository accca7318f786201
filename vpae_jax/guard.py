"""Keeps the weights of the phase before when a phase ends up worse than it started.

A failed adversarial phase is worse than none (the paper's Table 3: two of its ablations end below phase one). So the
starting weights and the final ones generate the same held-out clips from the same noise, and the pair of kernel
distances decides which of them the run's model directory holds. The scores stay in `guard.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from vpae_jax.config import GuardConfig
from vpae_jax.data.digits import MovingDigits
from vpae_jax.eval.distances import FeatureScale, features, kernel_distance
from vpae_jax.pipeline import Pipeline
from vpae_jax.previews import Generation, Sampler
from vpae_jax.types import Params

FILE = "guard.json"
# Digits that no generator was trained on, and not those of the final evaluation either.
SPLIT = "classifier"
SEED = 99
ONE_STEP = Sampler(steps=1)


class Guard:
    """Scores generator weights in one evaluation on held-out clips, text-to-video and image-to-video.

    Args:
      pipeline: encodes conditions, decodes latents.
      workdir: where the scores are kept.
      config: how many clips, how often.
    """

    def __init__(self, pipeline: Pipeline, workdir: Path, config: GuardConfig):
        self.file = workdir / FILE
        clips = MovingDigits(SPLIT, 2 * config.clips, SEED)
        items = [clips[i] for i in range(2 * config.clips)]
        videos = np.stack([item["video"] for item in items])
        given = [i >= config.clips for i in range(2 * config.clips)]
        captions = [item["caption"] for item in items]
        self.generation = Generation(pipeline, captions, videos[:, 0], given, SEED)
        found = features(videos)
        self.scale = FeatureScale.of(found)
        self.real = self.scale(found)
        self.clips = config.clips

    def score(self, step: int, params: Params) -> dict[str, float]:
        """Scores weights and remembers the result: kernel distance (x 1000; lower is better) for both tasks."""
        made = self.scale(features(self.generation(params, ONE_STEP)))
        scores = {
            "text_to_video": kernel_distance(self.real, made[: self.clips]),
            "image_to_video": kernel_distance(self.real, made[self.clips :]),
        }
        kept = {**self.read(), str(step): scores}
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(kept, indent=1))
        temporary.replace(self.file)
        return {f"held_out/kvd_{name}": value for name, value in scores.items()}

    def read(self) -> dict[str, dict[str, float]]:
        """All scores of this workdir, by step."""
        return json.loads(self.file.read_text()) if self.file.exists() else {}

    def verdict(self, last: int) -> tuple[bool, str]:
        """Whether the final weights are kept, and why, in one line."""
        scores = self.read()
        before, after = (float(np.mean(list(scores[str(step)].values()))) for step in (0, last))
        if after <= before:
            return True, f"held-out KVD fell from {before:.1f} to {after:.1f}: the trained weights are kept"
        return False, (
            f"held-out KVD rose from {before:.1f} to {after:.1f}: the weights of the phase before are kept; "
            "the trained ones are in the checkpoint (--config.guard.enabled=False keeps them)"
        )
