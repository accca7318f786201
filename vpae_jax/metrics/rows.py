"""The data of a comparison: rows, each with its clips, scores and times, and training runs.

A "half" is one of the two modes, "t2v" or "i2v".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vpae_jax.metrics.base import Metric

TITLES = {"t2v": "Text to video", "i2v": "Image to video"}
SHOWN = 8  # clips of each half that are shown, the first ones


@dataclass(frozen=True)
class Row:
    """One way of generating clips, or the real clips.

    Attributes:
      name: shown on the page.
      evaluations: network evaluations per clip; None for real clips.
      scores: `half/metric` to value.
      settings: what else determines the clips.
      intervals: `half/metric` to the ends of its 95% interval over clips.
      curves: `half/metric` to its per-frame values, for all frames, all but the first, or all but both ends.
      files: half to the mp4 file of every clip, in the order of the conditions, which is the same in all rows. The real
        row may have only the first ones.
      each: `half/metric` to its per-clip values, in the order of `files`; absent for metrics of whole sets.
      times: seconds per clip of each stage (`times.STAGES`), of one network "evaluation", and of the "first call", the
        first batch including compilation; "peak memory" in bytes. Any may be absent.
    """

    name: str
    evaluations: int | None
    scores: Mapping[str, float]
    settings: Mapping[str, Any] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    files: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    each: Mapping[str, Sequence[float]] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training run whose curves are shown.

    Attributes:
      name: of the run or phase.
      records: its scalars, one mapping per logged step, with `step`.
      config: as plain JSON values.
      note: a line to show with it, such as the guard's verdict.
      usual_steps: steps of the bundled config of that name and preset; None if there is none.
    """

    name: str
    records: Sequence[Mapping[str, float | int]]
    config: Mapping[str, Any]
    note: str = ""
    usual_steps: int | None = None


@dataclass(frozen=True)
class Report:
    """Everything that the page shows.

    Attributes:
      title, summary: heading, and one or two sentences on what was compared.
      headline: a few pairs of a number and its description.
      metrics: the lines of the tables.
      real: the real clips, whose scores are the floor; None for prompts alone.
      rows: what is compared.
      captions: of every clip, by half.
      count: number of clips of each half behind each score.
      frames: frames per clip.
      fps: frames per second.
      runs: training runs.
      facts: versions, commands and the like.
    """

    title: str
    summary: str
    headline: Sequence[tuple[str, str]]
    metrics: Sequence[Metric]
    real: Row | None
    rows: Sequence[Row]
    captions: Mapping[str, Sequence[str]]
    count: int
    frames: int
    fps: float
    runs: Sequence[Run] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def all_rows(self) -> list[Row]:
        """The row of the real clips, if there is one, followed by the others."""
        return [*([] if self.real is None else [self.real]), *self.rows]
