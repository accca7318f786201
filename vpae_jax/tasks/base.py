"""What a task is: where training clips come from, and how generated clips are judged on clips that no training saw.

    held_out = task.held_out(pipeline, "guard", 64)       what is asked for
    held_out = task.with_real(held_out, pipeline)         and what is known of the real clips
    made = task.measure(clips, latents, purpose)          of each batch that is generated for it, joined by `joined`
    task.scores(held_out, made), task.real(held_out)      named numbers, and the same numbers of real clips
    task.intervals(held_out, made), task.curves(...)      how sure they are, and what becomes of them frame by frame

Clips are measured as they are made, a batch at a time, and only what `measure` keeps of them stays: large clips would
fill the memory. A score is called `part/metric`, as "i2v/kvd".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from vpae_jax.data.batches import OwnRows
from vpae_jax.data.loader import Batches
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.metrics.archive import Shelf
from vpae_jax.metrics.base import Clips, Metric
from vpae_jax.metrics.intervals import Interval
from vpae_jax.types import AnyArray, Condition, Params, UserError
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.settings import Scheduler

# What clips are held out for. Those of the guard and of the final evaluation are never the same.
Purpose = Literal["preview", "guard", "evaluation"]
# Text-to-video and image-to-video.
Mode = Literal["t2v", "i2v"]
# What is kept of clips: arrays with a row for each.
Measures = Mapping[str, Shaped[np.ndarray, "..."]]

# So many conditions of a part are asked for a second time, from other noise: what the noise decides is diversity.
AGAIN = 16
# A second time is a seed this far from the first.
OTHER_NOISE = 1_000_000
SHOWN = 8  # clips of a part that are shown to people
# Clips of so many latent points are small, and handled so many at once.
SMALL, AT_ONCE = 128, 64


class TooFew(UserError):
    """There are too few held-out clips to judge by, or none to show, or only prompts without clips."""


@dataclass(frozen=True)
class Feed:
    """How training clips are handed out (`data.batches.latent_batches`)."""

    batch_size: int
    seed: int
    workers: int
    rows: OwnRows
    max_bad: float
    seeds: bool = False


@dataclass(frozen=True)
class Part:
    """A mode's rows of what is asked for.

    Attributes:
      name: the mode.
      rows: each with a condition of its own.
      again: rows with the conditions of the first of these, and other noise; may be empty.
    """

    name: Mode
    rows: slice
    again: slice


@dataclass(frozen=True)
class HeldOut:
    """What is asked of a model, a row a clip, and what is known of the real clips.

    Attributes:
      purpose: what for.
      parts: which rows are of which mode.
      captions: one a row.
      condition: encoded, one a row, on the host.
      null_text, null_mask: the negative prompt, one for all rows.
      shape: [f, h, w, c] of a clip's latents.
      seeds: one a row; decides its noise.
      origins: which clip of which data each row's condition is of.
      fps: frames a second of the clips.
      clips: with real ones, for a preview, the first of each part in pixels; none of prompts alone.
      files: with real ones, for an evaluation that keeps them, each condition's clip, or those of the first ones.
      real: measures of the real clip behind each row. Prompts alone have none, but for the first frames that are given.
      others: measures of other real clips, which no training saw either.
    """

    purpose: Purpose
    parts: tuple[Part, ...]
    captions: tuple[str, ...]
    condition: Condition
    null_text: Float[AnyArray, "1 s d"]
    null_mask: Bool[AnyArray, "1 s"]
    shape: tuple[int, ...]
    seeds: tuple[int, ...]
    origins: tuple[str, ...]
    fps: float
    clips: Mapping[str, Clips] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    real: Measures = field(default_factory=dict)
    others: Measures = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def count(self) -> int:
        """Conditions of each mode."""
        return self.parts[0].rows.stop - self.parts[0].rows.start

    def beside(self, made: Measures) -> HeldOut:
        """The same, with clips that a model has made in the place of the real ones that prompts alone do not have."""
        kept = np.concatenate([np.arange(part.rows.start, part.rows.stop) for part in self.parts])
        return replace(self, real={**made, **self.real}, others=rows_of(made, kept))


@runtime_checkable
class Task(Protocol):
    """Clips to train on and clips to be judged by.

    Attributes:
      name: what a workdir's files call it.
      metrics: all that `scores` may give, each with its direction and meaning.
      compared: the one of them that the guard compares; less is better.
      least: those that must not fall below a part of the real clips' value, and that part: what a student that stands
        still gives away where the compared number does not see it.
    """

    @property
    def name(self) -> str: ...

    @property
    def metrics(self) -> tuple[Metric, ...]: ...

    @property
    def compared(self) -> str: ...

    @property
    def least(self) -> Mapping[str, float]: ...

    def batches(self, kind: type, pipeline: Pipeline | None, feed: Feed) -> Batches:
        """Batches of one kind (`Method.batch`); all processes call this.

        Raises:
          UserError: the task has none of that kind, or its clips cannot be read.
        """
        ...

    def held_out(self, pipeline: Pipeline, purpose: Purpose, count: int) -> HeldOut:
        """At most `count` clips of each mode that the model has; the same at every call and in every process.

        Raises:
          TooFew: there are hardly any.
          UserError: the model makes other clips than these, or they cannot be read.
        """
        ...

    def with_real(self, held_out: HeldOut, pipeline: Pipeline, shelf: Shelf | None = None) -> HeldOut:
        """The same, with what is known of the real clips.

        Args:
          held_out: of this task.
          pipeline: that it was asked for.
          shelf: keeps the real clips and their measures, and has those of an earlier time.
        """
        ...

    def measure(self, clips: Clips, latents: Float[np.ndarray, "b f h w c"], purpose: Purpose) -> Measures:
        """What is kept of generated clips, for this purpose."""
        ...

    def scores(self, held_out: HeldOut, made: Measures) -> Mapping[str, float]:
        """The metrics of generated clips, a measure for each row of what was asked for."""
        ...

    def real(self, held_out: HeldOut) -> Mapping[str, float]:
        """The same metrics of the real clips, against other real ones: what a perfect model would reach."""
        ...

    def intervals(self, held_out: HeldOut, made: Measures | None) -> Mapping[str, Interval]:
        """95 % intervals over clips of the metrics, of generated clips or of the real ones (None)."""
        ...

    def curves(self, held_out: HeldOut, made: Measures | None) -> Mapping[str, list[float]]:
        """Metrics frame by frame, the last frame last, of generated clips or of the real ones (None)."""
        ...

    def each(self, held_out: HeldOut, made: Measures) -> Mapping[str, list[float]]:
        """Metrics that single clips have, clip by clip, of generated ones."""
        ...

    def write_model(
        self,
        workdir: Path,
        preset: str,
        params: Mapping[str, Params],
        source: ModelDirectory | None,
        scheduler: Scheduler,
    ) -> Path:
        """The model directory of a run that trained other parts than the transformer, which a task has batches for.

        Args:
          workdir: the run's folder.
          preset: of the parts' sizes.
          params: weights by role.
          source: what the run started from; None for the first one.
          scheduler: how the model is sampled.
        """
        ...


def clips_at_once(shape: tuple[int, ...]) -> int:
    """How many clips with latents of this shape are sampled or decoded together."""
    return max(1, min(AT_ONCE, AT_ONCE * SMALL // math.prod(shape[:3])))


def in_batches(count: int, size: int) -> Iterator[tuple[slice, Int[np.ndarray, "b"]]]:
    """Rows in batches of one size, so that one program serves all: each batch's rows, and these filled up. Fewer rows
    than that are one batch."""
    size = min(size, max(count, 1))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count)), np.minimum(np.arange(start, start + size), count - 1)


def joined(measures: Iterable[Measures]) -> Measures:
    """Measures of batches, one after the other."""
    given = list(measures)
    return {name: np.concatenate([one[name] for one in given]) for name in given[0]}


def rows_of(measures: Measures, rows: Any) -> Measures:
    """Measures of some clips."""
    return {name: value[rows] for name, value in measures.items()}


def mode_parts(modes: tuple[Mode, ...], count: int, again: int) -> tuple[Part, ...]:
    """Parts of `count` rows, each followed by its second time."""
    parts, start = [], 0
    for mode in modes:
        end = start + count
        parts.append(Part(mode, slice(start, end), slice(end, end + again)))
        start = end + again
    return tuple(parts)
