"""The guard keeps the weights that a phase started from if the phase ends up worse.

A failed adversarial phase is worse than none (in the paper's Table 3, two ablations end below phase one). So both the
starting weights and the final weights are scored (`run/scoring.py`), and the task's `compared` metric decides which of
them are exported: its mean over modes must not rise, and one mode must not become much worse for another's gain. The
clips must not become static either, because a student that repeats its first frame can be close to real clips by a
distance between sets. So the metrics in the task's `least`, such as motion, must not fall below a fraction of the real
clips' value, unless they were no higher at the start. `guard.json` contains both scores, those of real clips, and the
decision.

The guard only applies to a student that starts from the student of a previous phase, because only then the starting
weights are meant to be sampled like the final ones.
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
from vpae_jax.runtime.processes import broadcast_from_0, is_first, say
from vpae_jax.train.checkpoint import CONFIG_FILE
from vpae_jax.types import UserError

FILE = "guard.json"
# Maximum factor by which the distance of a single mode to real clips may grow.
MOST = 1.5


@dataclass(frozen=True)
class Verdict:
    """The decision of a finished run's guard: whether the trained weights are kept, and why."""

    kept: bool
    reason: str


def verdict(workdir: Path, run: PastRun) -> Verdict | None:
    """Returns the decision of a run's guard; None if there is none, or if the run's config disables the guard.

    Raises:
      UserError: guard.json cannot be read.
    """
    file = workdir / FILE
    if not run.guard.get("enabled") or not file.exists():
        return None
    if (found := read_object(file)) is None:
        raise UserError(
            f"{file}: cannot be read, so the guard's decision is unknown; run the phase's command again to repeat it"
        )
    return Verdict(bool(found["kept"]), str(found.get("reason", ""))) if "kept" in found else None


def doubt(workdir: Path) -> str:
    """Returns a warning about a run's trained weights if its guard rejected them, or if its decision is unknown; else
    an empty text."""
    if not (workdir / CONFIG_FILE).is_file():
        return ""
    try:
        decided = verdict(workdir, read_run(workdir))
    except UserError as error:
        return str(error)
    return "" if decided is None or decided.kept else f"its guard rejected these weights ({decided.reason})"


def compared_scores(workdir: Path) -> dict[str, float]:
    """Returns the scores that a run's guard compared, at each step, as far as its file can be read; for a run without
    any, the latest scores in its log."""
    found = read_object(workdir / FILE) or {}
    steps, name = found.get("scores"), found.get("compared")
    compared = {
        f"held-out {key}, step {step}": float(value)
        for step, scores in (steps.items() if isinstance(steps, dict) else ())
        for key, value in (scores.items() if isinstance(scores, dict) else ())
        if key.endswith(f"/{name}") and isinstance(value, int | float)
    }
    return compared or last_scores(workdir)


def obstacle(method: Method) -> str | None:
    """Returns why the guard does not apply to a method's student; None if it does."""
    student = method.student
    if student is None:
        return "the method trains no student"
    for view in (student.view, student.low):
        if view is None:
            continue
        name = all_views(method)[view].role
        role = method.roles[name]
        if role.adapters is not None and role.start == "fresh":  # the student then starts as their base
            name = role.adapters.on
            role = method.roles[name]
        if role.previous(name) is None:
            begun = "a teacher" if role.start == "pretrained" else "random weights"
            return f"the student starts from {begun}, not from the student of a previous phase"
    return None


class Guard:
    """Decides which weights a run exports, by the student's first and last scores.

    Args:
      scorer: scores weights, and knows earlier scores.
      workdir: folder in which the decision is stored.
    """

    def __init__(self, scorer: Scorer, workdir: Path) -> None:
        self.scorer, self.file = scorer, workdir / FILE

    def begin(self) -> None:
        """Deletes the decision of an earlier run; called when a run begins."""
        if is_first():
            with refused_writes(self.file):
                self.file.unlink(missing_ok=True)

    def decide(self, last: int, final: Denoiser, start: Callable[[], Denoiser]) -> Verdict:
        """Decides whether the final weights are kept, and prints the reason. Scores that are missing from the log, for
        example because the run began without a guard, are computed now."""
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
        found = Verdict(*broadcast_from_0("guard's verdict", (kept, reason)))
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
        command = f"python -m vpae_jax.convert {self.file.parent} FOLDER --format=diffusers --refused"
        advice = "" if kept else f"; the trained ones are in the checkpoint (`{command}` exports them)"
        say(f"guard: {reason}{advice}")
        return found

    def _compared(self, scores: Scores) -> float:
        """Returns the mean of the compared metric over modes; infinite if one of them is missing."""
        names = self.scorer.compared
        return sum(scores.get(name, math.inf) for name in names) / len(names)

    def _paid(self, first: Scores, final: Scores, floor: float) -> str:
        """Describes by how much one mode became worse; empty if it is within the limit."""
        for name in self.scorer.compared:
            before, after = first.get(name, math.inf), final.get(name, math.inf)
            if math.isfinite(before) and after > MOST * abs(before) + abs(floor):
                return f", but rose from {before:.1f} to {after:.1f} in {name.partition('/')[0]}"
        return ""

    def _lost(self, first: Scores, final: Scores, real: Scores) -> str:
        """Describes a metric that fell below its minimum fraction of the real clips' value; empty if none did. Metrics
        of packages that are not installed are skipped."""
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
    """Converts a number for JSON; None if it is not finite."""
    return value if math.isfinite(value) else None
