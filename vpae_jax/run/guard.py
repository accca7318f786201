"""Keeps the weights that a phase started from when it ends up worse.

A failed adversarial phase is worse than none (the paper's Table 3: two of its ablations end below phase one). So the
starting weights and the final ones make clips for the same held-out conditions from the same noise, and the number that
the task compares decides which of them the run's model directory holds: its mean over modes must not rise, nor may one
mode pay for another's gain. Nor may the clips come to rest: a student that repeats its first frame can be near real
clips by a distance of sets. So what the task names in `least`, such as motion, must not fall below a part of the real
clips' value unless it was no higher at the start. `guard.json` holds all scores, those of real clips, and the decision.

The guard can judge a student that starts from the one of a phase before: only then are the starting weights meant to be
sampled as the final ones are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpae_jax.config import GuardConfig
from vpae_jax.files import put_aside, write_text
from vpae_jax.flow.sampler import Sampler
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.inference.samplers import Denoiser
from vpae_jax.methods.base import Method, all_views
from vpae_jax.run.generation import Generation, scores_of
from vpae_jax.run.workdir import PastRun, read_object, read_run
from vpae_jax.runtime.processes import as_first_says, is_first, say
from vpae_jax.tasks.base import Task
from vpae_jax.train.checkpoint import CONFIG_FILE
from vpae_jax.types import UserError

FILE = "guard.json"
# How many times as far from real clips as at the start a single mode may end.
MOST = 1.5


@dataclass(frozen=True)
class Verdict:
    """What a finished run's guard decided: whether its trained weights are kept, and why."""

    kept: bool
    reason: str


def verdict(workdir: Path, run: PastRun) -> Verdict | None:
    """What the guard of a run decided, None where it has not, or was switched off (the run's config says).

    Raises:
      UserError: guard.json cannot be read.
    """
    file = workdir / FILE
    if not run.guard.get("enabled") or not file.exists():
        return None
    if (found := read_object(file)) is None:
        raise UserError(
            f"{file}: cannot be read, so what the guard has decided is not known; run the phase's command again, which "
            "decides anew"
        )
    return Verdict(bool(found["kept"]), str(found.get("reason", ""))) if "kept" in found else None


def doubt(workdir: Path) -> str:
    """What is to be said of a run's trained weights where its guard turned them down, or it cannot be told whether it
    did; nothing of others."""
    if not (workdir / CONFIG_FILE).is_file():
        return ""
    try:
        decided = verdict(workdir, read_run(workdir))
    except UserError as error:
        return str(error)
    return "" if decided is None or decided.kept else f"its guard turned these weights down ({decided.reason})"


def compared_scores(workdir: Path) -> dict[str, float]:
    """What the guard of a run compared: its scores of the weights at each step, as far as its file can be read."""
    found = read_object(workdir / FILE) or {}
    steps, name = found.get("scores"), found.get("compared")
    return {
        f"held-out {key}, step {step}": value
        for step, scores in (steps.items() if isinstance(steps, dict) else ())
        for key, value in (scores.items() if isinstance(scores, dict) else ())
        if key.endswith(f"/{name}") and isinstance(value, int | float)
    }


def obstacle(method: Method) -> str | None:
    """Why a method's student cannot be judged; None where it can."""
    student = method.student
    if student is None:
        return "the method trains no student"
    for view in (student.view, student.low):
        if view is None:
            continue
        name = all_views(method)[view].role
        role = method.roles[name]
        if role.adapters is not None and role.start == "fresh":  # and so, at first, what they sit on
            name = role.adapters.on
            role = method.roles[name]
        if role.previous(name) is None:
            begun = "a teacher" if role.start == "pretrained" else "random weights"
            return f"the student starts from {begun}, and not from the student of a phase before"
    return None


class Guard:
    """Scores a student on held-out clips.

    Args:
      task: asks for the clips and scores them.
      pipeline: encodes conditions, decodes latents.
      workdir: where the scores are kept. Those of another task or number of clips are dropped.
      config: how many clips, how often.
      sampler: how the student is sampled.

    Raises:
      TooFew: there are hardly any held-out clips.
    """

    def __init__(self, task: Task, pipeline: Pipeline, workdir: Path, config: GuardConfig, sampler: Sampler) -> None:
        self.file, self.task, self.sampler = workdir / FILE, task, sampler
        self.held_out = task.with_real(task.held_out(pipeline, "guard", config.clips), pipeline)
        self.generation = Generation(pipeline, self.held_out)
        self.metric = next(metric for metric in task.metrics if metric.name == task.compared)
        self.about = {"task": task.name, "clips": config.clips, "compared": task.compared}
        self.known = as_first_says("guard", self._load() if is_first() else None)

    def begin(self) -> None:
        """A run at its first step: what an earlier one left is forgotten."""
        self._write(self._empty())

    def score(self, step: int, denoiser: Denoiser) -> Mapping[str, float]:
        """Scores weights and remembers the result, which is empty if their clips are not finite."""
        scores = scores_of(self.task, self.held_out, self.generation.batches(denoiser, self.sampler))
        scores = {name: value for name, value in scores.items() if math.isfinite(value)}
        kept = self.read()
        self._write({**kept, "scores": {**kept["scores"], str(step): scores}})
        shown = ", ".join(f"{n.partition('/')[0]} {scores[n]:.1f}" for n in self._names if n in scores)
        say(f"step {step}: held-out {self.metric.label}: {shown or 'none, since the clips are not finite'}")
        return {f"held_out/{name}": value for name, value in scores.items()}

    def decide(self, last: int, final: Denoiser, start: Callable[[], Denoiser]) -> bool:
        """Whether the final weights are kept; says why in one line. Scores that a killed run lacks are made up for."""
        for step, denoiser in ((0, start), (last, lambda: final)):
            if str(step) not in self.read()["scores"]:
                self.score(step, denoiser())
        scores, real = self.read()["scores"], self.task.real(self.held_out)
        first, final_scores = scores["0"], scores[str(last)]
        before, after, floor = (self._compared(found) for found in (first, final_scores, real))
        paid = self._paid(first, final_scores, floor) or self._lost(first, final_scores, real)
        # Hosts may differ in the packages that measure motion.
        kept = as_first_says("guard's verdict", math.isfinite(after) and after <= before and not paid)
        reason = self._reason(before, after, floor, paid, kept)
        decision = {"before": _plain(before), "after": _plain(after), "floor": _plain(floor)}
        self._write({**self.read(), "real": dict(real), **decision, "kept": kept, "reason": reason})
        advice = "" if kept else "; the trained ones are in the checkpoint (--config.guard.enabled=False keeps them)"
        say(f"guard: {reason}{advice}")
        return kept

    def read(self) -> dict[str, Any]:
        """What is known of this workdir so far; the same in every process."""
        return self.known

    def _compared(self, scores: Mapping[str, float]) -> float:
        """The number that decides, the mean over modes; infinite if one of them is not known to be finite."""
        return sum(scores.get(name, math.inf) for name in self._names) / len(self._names)

    @property
    def _names(self) -> list[str]:
        return [f"{part.name}/{self.task.compared}" for part in self.held_out.parts]

    def _paid(self, first: Mapping[str, float], final: Mapping[str, float], floor: float) -> str:
        """What one mode paid for the other's gain; empty if it is little."""
        for name in self._names:
            before, after = first.get(name, math.inf), final.get(name, math.inf)
            if math.isfinite(before) and after > MOST * abs(before) + abs(floor):
                return f", but rose from {before:.1f} to {after:.1f} in {name.partition('/')[0]}"
        return ""

    def _lost(self, first: Mapping[str, float], final: Mapping[str, float], real: Mapping[str, float]) -> str:
        """What fell below the least part of the real clips' value; empty if nothing did. What is measured by a package
        that is not installed is not asked for."""
        labels = {metric.name: metric.label for metric in self.task.metrics}
        for part in self.held_out.parts:
            for name, least in self.task.least.items():
                key = f"{part.name}/{name}"
                if not (key in first and key in final and key in real):
                    continue
                before, after = first[key], final[key]
                if after < least * real[key] and after < before:
                    what = f"under {least:g} of real clips' {real[key]:.2f}"
                    return f", but {labels[name]} fell from {before:.2f} to {after:.2f} in {part.name}, {what}"
        return ""

    def _reason(self, before: float, after: float, floor: float, paid: str, kept: bool) -> str:
        which = "the trained weights are kept" if kept else "the weights that it started from are kept"
        if not math.isfinite(after):
            return f"clips of the trained weights are not finite: {which}"
        if not math.isfinite(before):
            return f"clips of the weights that it started from are not finite: {which}"
        ends = f"from {before:.1f} to {after:.1f}"
        went = f"fell {ends}" if after < before else f"rose {ends}" if after > before else f"stayed at {after:.1f}"
        change = f"held-out {self.metric.label} {went} (real clips: {floor:.1f})"
        return f"{change}{paid if after <= before else ''}: {which}"

    def _empty(self) -> dict[str, Any]:
        return {**self.about, "scores": {}}

    def _load(self) -> dict[str, Any]:
        found = read_object(self.file)
        if found is None or not isinstance(found.get("scores"), dict):
            if self.file.exists():
                say(f"{self.file} cannot be read, and is now called {put_aside(self.file).name}; scores are made anew")
            return self._empty()
        if {name: found.get(name) for name in self.about} != self.about:
            return self._empty()
        return found

    def _write(self, content: dict[str, Any]) -> None:
        self.known = content
        if is_first():
            write_text(self.file, json.dumps(content, indent=1))


def _plain(value: float) -> float | None:
    """A number as JSON has it; None where it is not finite."""
    return value if math.isfinite(value) else None
