"""Scores a student on held-out clips during training.

    scorer(step, denoiser)     {"held_out/i2v/kvd": 41.2, ..., "real/i2v/kvd": 3.1, ..., "held_out_clips": 64}

At every step the clips are generated for the same conditions from the same noise, so that scores differ only by the
weights. They are stored with the run's other metrics, in metrics.jsonl. Each record is self-contained: it includes the
scores of real clips, and the number of clips per mode, on which a kernel distance depends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from vpae_jax.flow.sampler import Sampler
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.inference.samplers import Denoiser
from vpae_jax.run.generation import Generation, scores_of
from vpae_jax.runtime.processes import broadcast_from_0, is_first, say
from vpae_jax.tasks.base import Task
from vpae_jax.train.metrics import read_metrics

MADE, REAL, CLIPS = "held_out/", "real/", "held_out_clips"

# Scores by `MODE/METRIC`.
Scores = Mapping[str, float]


class Scorer:
    """Scores weights on held-out clips, and knows the scores that are already in the run's log.

    Args:
      task: provides the conditions and scores the clips.
      pipeline: encodes conditions, decodes latents.
      workdir: the run's folder.
      clips: maximum number of clips per mode. Logged scores on another number of clips are ignored.
      sampler: how the student is sampled.

    Attributes:
      clips: actual number of clips per mode.
      real: scores of the real clips.
      known: scores by step; empty for a step whose clips were not finite.

    Raises:
      TooFew: there are too few held-out clips.
    """

    def __init__(self, task: Task, pipeline: Pipeline, workdir: Path, clips: int, sampler: Sampler) -> None:
        self.task, self.sampler = task, sampler
        self.held_out = task.with_real(task.held_out(pipeline, "guard", clips), pipeline)
        self.generation = Generation(pipeline, self.held_out)
        self.metric = next(metric for metric in task.metrics if metric.name == task.compared)
        self.clips = self.held_out.count
        self.real: Scores = _finite(task.real(self.held_out))
        logged = _logged(workdir, self.clips) if is_first() else None
        self.known: dict[str, Scores] = broadcast_from_0("held-out scores", logged)

    @property
    def compared(self) -> list[str]:
        """The scores by which weights are compared, one per mode; lower is better."""
        return [f"{part.name}/{self.task.compared}" for part in self.held_out.parts]

    def begin(self) -> None:
        """Forgets the scores of an earlier run; called when a run begins."""
        self.known.clear()

    def done(self, step: int) -> bool:
        """Whether the scores of a step are known."""
        return str(step) in self.known

    def score(self, step: int, denoiser: Denoiser) -> Scores:
        """Scores weights, remembers the result, and prints the scores that are compared."""
        found = _finite(scores_of(self.task, self.held_out, self.generation.batches(denoiser, self.sampler)))
        shown = ", ".join(f"{n.partition('/')[0]} {found[n]:.1f}" for n in self.compared if n in found)
        say(f"step {step}: held-out {self.metric.label}: {shown or 'none, because the clips are not finite'}")
        self.known[str(step)] = found
        return found

    def __call__(self, step: int, denoiser: Denoiser) -> Mapping[str, float]:
        """Scores weights and returns the record for the log."""
        made = {MADE + name: value for name, value in self.score(step, denoiser).items()}
        return {**made, **{REAL + name: value for name, value in self.real.items()}, CLIPS: self.clips}


def _finite(scores: Scores) -> dict[str, float]:
    return {name: value for name, value in scores.items() if math.isfinite(value)}


def last_scores(workdir: Path) -> dict[str, float]:
    """The latest scores that a run's log has, by name and step; none where it was not scored."""
    scored = [record for record in read_metrics(workdir) if CLIPS in record]
    last = max(scored, key=lambda record: record["step"], default={})
    made = {name.removeprefix(MADE): value for name, value in last.items() if name.startswith(MADE)}
    numbers = {name: value for name, value in made.items() if isinstance(value, int | float)}
    return {f"held-out {name}, step {last['step']}": value for name, value in _finite(numbers).items()}


def _logged(workdir: Path, clips: int) -> dict[str, dict[str, float]]:
    """Returns the scores in a run's log that were computed on this number of clips, by step."""
    return {
        str(record["step"]): {name.removeprefix(MADE): value for name, value in record.items() if name.startswith(MADE)}
        for record in read_metrics(workdir)
        if record.get(CLIPS) == clips
    }
