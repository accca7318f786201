"""Scores of a student on held-out clips while it is trained.

    scorer(step, denoiser)     {"held_out/i2v/kvd": 41.2, ..., "real/i2v/kvd": 3.1, ..., "held_out_clips": 64}

At every step the clips are made for the same conditions from the same noise, so that scores differ by the weights
alone. They are kept where a run's other numbers are, in metrics.jsonl. A record stands by itself: it has what the real
clips reach, and the number of clips of a mode, on which a kernel distance depends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from vpae_jax.flow.sampler import Sampler
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.inference.samplers import Denoiser
from vpae_jax.run.generation import Generation, scores_of
from vpae_jax.runtime.processes import as_first_says, is_first, say
from vpae_jax.tasks.base import Task
from vpae_jax.train.metrics import read_metrics

MADE, REAL, CLIPS = "held_out/", "real/", "held_out_clips"

# By `MODE/METRIC`.
Scores = Mapping[str, float]


class Scorer:
    """Scores weights on held-out clips, and knows the scores that the run's log has.

    Args:
      task: asks for the clips and scores them.
      pipeline: encodes conditions, decodes latents.
      workdir: of the run.
      clips: of each mode, at most. Scores of another number in the log are not looked at.
      sampler: how the student is sampled.

    Attributes:
      clips: how many of each mode there are.
      real: scores of the real clips.
      known: scores by step; empty where the clips were not finite.

    Raises:
      TooFew: there are hardly any held-out clips.
    """

    def __init__(self, task: Task, pipeline: Pipeline, workdir: Path, clips: int, sampler: Sampler) -> None:
        self.task, self.sampler = task, sampler
        self.held_out = task.with_real(task.held_out(pipeline, "guard", clips), pipeline)
        self.generation = Generation(pipeline, self.held_out)
        self.metric = next(metric for metric in task.metrics if metric.name == task.compared)
        self.clips = self.held_out.count
        self.real: Scores = _finite(task.real(self.held_out))
        logged = _logged(workdir, self.clips) if is_first() else None
        self.known: dict[str, Scores] = as_first_says("held-out scores", logged)

    @property
    def compared(self) -> list[str]:
        """The scores by which weights are compared, one a mode; less is better."""
        return [f"{part.name}/{self.task.compared}" for part in self.held_out.parts]

    def begin(self) -> None:
        """A run at its first step: what an earlier one left is forgotten."""
        self.known.clear()

    def done(self, step: int) -> bool:
        """Whether the scores of a step are known."""
        return str(step) in self.known

    def score(self, step: int, denoiser: Denoiser) -> Scores:
        """Scores weights, remembers the result, and says those that are compared."""
        found = _finite(scores_of(self.task, self.held_out, self.generation.batches(denoiser, self.sampler)))
        shown = ", ".join(f"{n.partition('/')[0]} {found[n]:.1f}" for n in self.compared if n in found)
        say(f"step {step}: held-out {self.metric.label}: {shown or 'none, since the clips are not finite'}")
        self.known[str(step)] = found
        return found

    def __call__(self, step: int, denoiser: Denoiser) -> Mapping[str, float]:
        """The same, as the log has it."""
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
    """By step, the scores of so many clips that a run's log has."""
    return {
        str(record["step"]): {name.removeprefix(MADE): value for name, value in record.items() if name.startswith(MADE)}
        for record in read_metrics(workdir)
        if record.get(CLIPS) == clips
    }
