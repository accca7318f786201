"""Keeps the weights that a phase started from when it ends up worse.

A failed adversarial phase is worse than none (the paper's Table 3: two of its ablations end below phase one). So the
starting weights and the final ones generate the same held-out clips from the same noise, and the pair of kernel
distances decides which of them the run's model directory holds. The scores stay in `guard.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vpae_jax.config import GuardConfig
from vpae_jax.files import write_text
from vpae_jax.flow.sampler import ONE_STEP
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.metrics.distances import FeatureScale, features, kernel_distance
from vpae_jax.run.previews import Generation
from vpae_jax.runtime.processes import as_first_says, is_first, say
from vpae_jax.tasks.digits.clips import MovingDigits
from vpae_jax.types import Params

FILE = "guard.json"
# Digits that no generator was trained on, and not those of the final evaluation either.
SPLIT = "classifier"
SEED = 99


class Guard:
    """Scores generator weights in one evaluation on held-out clips, for the tasks that the model does.

    `guard.json` holds the number of clips, every score by step, the previous phase's step that this one started from,
    and in the end what was decided and why.

    Args:
      pipeline: encodes conditions, decodes latents.
      workdir: where the scores are kept. Scores on another number of clips are dropped.
      config: how many clips, how often.
    """

    def __init__(self, pipeline: Pipeline, workdir: Path, config: GuardConfig):
        self.file, self.clips = workdir / FILE, config.clips
        self.tasks = ("text_to_video", "image_to_video") if pipeline.takes_image else ("text_to_video",)
        count = len(self.tasks) * config.clips
        clips = MovingDigits(SPLIT, count, SEED)
        items = [clips[i] for i in range(count)]
        videos = np.stack([item["video"] for item in items])
        given = [i >= config.clips for i in range(count)]
        captions = [item["caption"] for item in items]
        pictures = videos[:, 0] if pipeline.takes_image else None
        self.generation = Generation.of_prompts(pipeline, captions, pictures, given, SEED)
        found = features(videos)
        self.scale = FeatureScale.of(found)
        self.real = self.scale(found)
        self.known = as_first_says("guard", self._load())

    def begin(self, previous_step: int | None) -> None:
        """A run at its first step: what an earlier one left is forgotten."""
        self._write({"clips": self.clips, "previous_step": previous_step, "scores": {}})

    def score(self, step: int, params: Params) -> dict[str, float]:
        """Scores weights and remembers the result: kernel distance (x 1000; lower is better) for each task."""
        made = self.scale(features(self.generation(params, ONE_STEP)))
        parts = np.split(made, len(self.tasks))
        scores = {task: kernel_distance(self.real, part) for task, part in zip(self.tasks, parts, strict=True)}
        kept = self.read()
        self._write({**kept, "scores": {**kept["scores"], str(step): scores}})
        return {f"held_out/kvd_{name}": value for name, value in scores.items()}

    def decide(self, last: int, final: Params, start: Callable[[], Params]) -> bool:
        """Whether the final weights are kept; says why in one line. Scores that a killed run lacks are made up for."""
        for step, params in ((0, start), (last, lambda: final)):
            if str(step) not in self.read()["scores"]:
                self.score(step, params())
        scores = self.read()["scores"]
        before, after = (float(np.mean(list(scores[str(step)].values()))) for step in (0, last))
        kept = after <= before
        reason = f"held-out KVD fell from {before:.1f} to {after:.1f}: the trained weights are kept"
        if not kept:
            reason = f"held-out KVD rose from {before:.1f} to {after:.1f}: the weights that it started from are kept"
        self._write({**self.read(), "kept": kept, "reason": reason})
        advice = "" if kept else "; the trained ones are in the checkpoint (--config.guard.enabled=False keeps them)"
        say(f"guard: {reason}{advice}")
        return kept

    def read(self) -> dict[str, Any]:
        """What is known of this workdir so far; the same in every process."""
        return self.known

    def _load(self) -> dict[str, Any]:
        empty = {"clips": self.clips, "previous_step": None, "scores": {}}
        found = json.loads(self.file.read_text()) if self.file.exists() else empty
        return found if found["clips"] == self.clips else {**found, **empty, "previous_step": found["previous_step"]}

    def _write(self, content: dict[str, Any]) -> None:
        self.known = content
        if is_first():
            write_text(self.file, json.dumps(content, indent=1))
