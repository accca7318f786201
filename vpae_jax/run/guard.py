"""Keeps the weights that a phase started from when it ends up worse.

A failed adversarial phase is worse than none (the paper's Table 3: two of its ablations end below phase one). So the
starting weights and the final ones are scored (`run/scoring.py`), and the number that the task compares decides which
of them the run's model directory holds: its mean over modes must not rise, nor may one mode pay for another's gain. Nor
may the clips come to rest: a student that repeats its first frame can be near real clips by a distance of sets. So what
the task names in `least`, such as motion, must not fall below a part of the real clips' value unless it was no higher
at the start. `guard.json` holds both scores, those of real clips, and the decision.

The guard can judge a student that starts from the one of a phase before: only then are the starting weights meant to be
sampled as the final ones are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vpae_jax.files import refused_writes, write_text
from vpae_jax.inference.samplers import Denoiser
from vpae_jax.methods.base import Method, all_views
from vpae_jax.run.scoring import Scorer, Scores, last_scores
from vpae_jax.run.workdir import PastRun, read_object, read_run
from vpae_jax.runtime.processes import as_first_says, is_first, say
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
    """What the guard of a run compared: its scores of the weights at each step, as far as its file can be read. Where
    there are none, the latest scores of the run's log."""
    found = read_object(workdir / FILE) or {}
    steps, name = found.get("scores"), found.get("compared")
    compared: dict[str, float] = {
        f"held-out {key}, step {step}": value
        for step, scores in (steps.items() if isinstance(steps, dict) else ())
        for key, value in (scores.items() if isinstance(scores, dict) else ())
        if key.endswith(f"/{name}") and isinstance(value, int | float)
    }
    return compared or last_scores(workdir)


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
    """Decides by a student's first and last scores which weights a run is exported from.

    Args:
      scorer: scores weights, and knows what is scored already.
      workdir: where the decision is kept.
    """

    def __init__(self, scorer: Scorer, workdir: Path) -> None:
        self.scorer, self.file = scorer, workdir / FILE

    def begin(self) -> None:
        """A run at its first step: what an earlier one decided is forgotten."""
        if is_first():
            with refused_writes(self.file):
                self.file.unlink(missing_ok=True)

    def decide(self, last: int, final: Denoiser, start: Callable[[], Denoiser]) -> Verdict:
        """Whether the final weights are kept, and why, which is said in one line. Scores that the log lacks, such as
        those of a run that began without a guard, are made up for."""
        scorer, real = self.scorer, self.scorer.real
        for step, denoiser in ((0, start), (last, lambda: final)):
            if not scorer.done(step):
                scorer.score(step, denoiser())
        first, final_scores = scorer.known["0"], scorer.known[str(last)]
        before, after, floor = (self._compared(found) for found in (first, final_scores, real))
        paid = self._paid(first, final_scores, floor) or self._lost(first, final_scores, real)
        kept = math.isfinite(after) and after <= before and not paid
        reason = self._reason(before, after, floor, paid, kept)
        # Hosts may differ in the packages that measure motion.
        found = Verdict(*as_first_says("guard's verdict", (kept, reason)))
        if is_first():
            content = {
                "task": scorer.task.name,
                "clips": scorer.clips,
                "compared": scorer.task.compared,
                "scores": {"0": first, str(last): final_scores},
                "real": real,
                "before": _plain(before),
                "after": _plain(after),
                "floor": _plain(floor),
                "kept": kept,
                "reason": reason,
            }
            write_text(self.file, json.dumps(content, indent=1))
        advice = "" if kept else "; the trained ones are in the checkpoint (--config.guard.enabled=False keeps them)"
        say(f"guard: {reason}{advice}")
        return found

    def _compared(self, scores: Scores) -> float:
        """The number that decides, the mean over modes; infinite if one of them is not known to be finite."""
        names = self.scorer.compared
        return sum(scores.get(name, math.inf) for name in names) / len(names)

    def _paid(self, first: Scores, final: Scores, floor: float) -> str:
        """What one mode paid for the other's gain; empty if it is little."""
        for name in self.scorer.compared:
            before, after = first.get(name, math.inf), final.get(name, math.inf)
            if math.isfinite(before) and after > MOST * abs(before) + abs(floor):
                return f", but rose from {before:.1f} to {after:.1f} in {name.partition('/')[0]}"
        return ""

    def _lost(self, first: Scores, final: Scores, real: Scores) -> str:
        """What fell below the least part of the real clips' value; empty if nothing did. What is measured by a package
        that is not installed is not asked for."""
        task = self.scorer.task
        labels = {metric.name: metric.label for metric in task.metrics}
        for part in self.scorer.held_out.parts:
            for name, least in task.least.items():
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
        change = f"held-out {self.scorer.metric.label} {went} (real clips: {floor:.1f})"
        return f"{change}{paid if after <= before else ''}: {which}"


def _plain(value: float) -> float | None:
    """A number as JSON has it; None where it is not finite."""
    return value if math.isfinite(value) else None
