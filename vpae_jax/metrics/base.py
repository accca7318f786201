"""Clips and named numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8

Clips = UInt8[np.ndarray, "b t height width 3"]
Pictures = UInt8[np.ndarray, "b height width 3"]
Scores = Float[np.ndarray, "b"]


@dataclass(frozen=True)
class Metric:
    """A number's name and meaning.

    Attributes:
      name: its key; the mode stands before it, `t2v/kvd`.
      label: its name in tables.
      goal: whether more is better, less is better, or the value of real clips is.
      meaning: one sentence.
    """

    name: str
    label: str
    goal: Literal["more", "less", "real"]
    meaning: str

    def best(self, values: Mapping[str, float], real: float | None) -> str | None:
        """The key of the best value; None where there is no value, or none to compare with."""
        if not values or (self.goal == "real" and real is None):
            return None
        return min(values, key=lambda name: self._cost(values[name], real))

    def worst(self, values: Sequence[float], real: float | None, count: int) -> list[int]:
        """Which of the values of single clips are the worst, that one first; `count` at most, and only finite ones.
        None where there is no value of real clips to compare with."""
        if self.goal == "real" and real is None:
            return []
        finite = [i for i, value in enumerate(values) if math.isfinite(value)]
        return sorted(finite, key=lambda i: -self._cost(values[i], real))[:count]

    def _cost(self, value: float, real: float | None) -> float:
        if self.goal == "real":
            return math.inf if real is None else abs(value - real)
        return -value if self.goal == "more" else value
