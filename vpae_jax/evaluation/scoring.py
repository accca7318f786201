"""From clips on disk to the scores of each row and of the real clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vpae_jax.evaluation.costs import typical
from vpae_jax.evaluation.making import Opened
from vpae_jax.flow.sampler import typed
from vpae_jax.metrics.archive import Shelf
from vpae_jax.metrics.rows import Row
from vpae_jax.runtime.progress import say, working
from vpae_jax.tasks.base import HeldOut, Measures


@dataclass(frozen=True)
class Scored:
    """All scores of an evaluation.

    Attributes:
      held_out: the conditions of the first row.
      real: the row of the real clips; None for an evaluation on prompts alone.
      rows: those of the models, in order.
    """

    held_out: HeldOut
    real: Row | None
    rows: list[Row]


def score(rows: Sequence[Opened], shelf: Shelf) -> Scored:
    """Scores rows whose clips all exist. On prompts alone, without real clips, the first row's clips serve as the
    reference for the others.

    Args:
      rows: in the order of the report.
      shelf: stores the measurements of the real clips.
    """
    asked: dict[str, HeldOut] = {}
    done: list[Row] = []
    reference: Measures | None = None
    for row in rows:
        if row.encoders not in asked:
            with working(f"measuring real clips, for the encoders of {row.entry.model}"):
                asked[row.encoders] = row.task.with_real(row.held_out, row.pipeline, shelf)
        held_out = asked[row.encoders]
        measures = row.archive.all_measures(range(len(held_out)))
        if not held_out.others and reference is not None:
            held_out = held_out.compared_with(reference)
        done.append(_scored(row, held_out, measures))
        if reference is None and measures is not None:
            reference = measures
    first = asked[rows[0].encoders]
    return Scored(first, _real(rows[0], first) if first.others else None, done)


def _scored(row: Opened, held_out: HeldOut, measures: Measures | None) -> Row:
    sampler, entry = row.sampler, row.entry
    costs = [row.archive.costs(index) for index in range(len(held_out))]
    settings: dict[str, object] = {"model": entry.model}
    if entry.lora is not None:
        settings["lora"] = str(entry.lora)
    settings["steps"] = sampler.steps if not sampler.first else typed(sampler.asked)
    settings |= {"guidance": sampler.guidance, "solver": sampler.solver}
    times = typical(costs, sampler.evaluations)
    if measures is None:
        say(f"{entry.name}: its clips are not finite, so it has no scores")
        return Row(entry.name, sampler.evaluations, {}, settings, times=times)
    videos = [row.archive.video(index) for index in range(len(held_out))]
    return Row(
        name=entry.name,
        evaluations=sampler.evaluations,
        scores=dict(row.task.scores(held_out, measures)),
        settings=settings,
        intervals=row.task.intervals(held_out, measures),
        curves=row.task.curves(held_out, measures),
        files={part.name: videos[part.rows] for part in held_out.parts},
        each=row.task.each(held_out, measures),
        times=times,
    )


def _real(row: Opened, held_out: HeldOut) -> Row:
    task = row.task
    return Row(
        name="real",
        evaluations=None,
        scores=dict(task.real(held_out)),
        intervals=task.intervals(held_out, None),
        curves=task.curves(held_out, None),
        files={part.name: held_out.files for part in held_out.parts},
    )


def captions_of(held_out: HeldOut) -> Mapping[str, Sequence[str]]:
    """The caption of each clip, by mode."""
    return {part.name: held_out.captions[part.rows] for part in held_out.parts}
