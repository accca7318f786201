"""What a comparison knows: ways of making clips, with the clips, numbers and times of each, and trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vpae_jax.metrics.base import Metric

TITLES = {"t2v": "Text to video", "i2v": "Image to video"}
SHOWN = 8  # clips of a half that are shown, the first ones


@dataclass(frozen=True)
class Row:
    """One way of making clips, or the real ones.

    Attributes:
      name: what the page calls it.
      evaluations: of the network, for one clip; None for real clips.
      scores: `half/metric` to value; a half is "t2v" or "i2v".
      settings: what else decides the clips.
      intervals: `half/metric` to the ends of its 95 % interval over clips.
      curves: `half/metric` to its values frame by frame, of all frames, of all but the first, or but both ends.
      files: half to the mp4 file of every clip, for the conditions in their order, the same in all rows. The real row
        may hold fewer, the first ones.
      each: `half/metric` to the values of single clips, in the order of `files`; absent for metrics of whole sets.
      times: seconds a clip of each stage (`times.STAGES`), of one network "evaluation", and of the "first call", the
        first batch with all compilation; "peak memory" in bytes. Any may be absent.
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
    """One training whose curves are shown.

    Attributes:
      name: of the phase.
      records: its scalars, one mapping a logged step, with `step`.
      config: as plain JSON values.
      note: a line of its own, such as what a guard decided.
    """

    name: str
    records: Sequence[Mapping[str, float | int]]
    config: Mapping[str, Any]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """All that the page shows.

    Attributes:
      title, summary: heading, and what was compared in one or two sentences.
      headline: a few (number, what it is) pairs.
      metrics: the lines of the tables.
      real: the real clips; their scores are the floor. None for prompts that have none.
      rows: what is compared.
      captions: of every clip, by half.
      count: clips a half behind each score.
      frames: of a clip.
      fps: frames a second.
      runs: trainings.
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
        """The real row, if there is one, and the others."""
        return [*([] if self.real is None else [self.real]), *self.rows]
