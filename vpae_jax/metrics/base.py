"""Types of clips, and metrics: named numbers with a direction."""

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
      name: its key, prefixed with the mode in results: `t2v/kvd`.
      label: its name in tables.
      goal: whether more is better, less is better, or the value of real clips is best.
      meaning: one sentence.
    """

    name: str
    label: str
    goal: Literal["more", "less", "real"]
    meaning: str

    def best(self, values: Mapping[str, float], real: float | None) -> str | None:
        """The key of the best value; None without values, or without the real one to compare with."""
        if not values or (self.goal == "real" and real is None):
            return None
        return min(values, key=lambda name: self._cost(values[name], real))

    def worst(self, values: Sequence[float], real: float | None, count: int) -> list[int]:
        """Indices of the worst per-clip values, the worst first; at most `count`, and only finite ones. Empty if the
        goal is the value of real clips and there is none."""
        if self.goal == "real" and real is None:
            return []
        finite = [i for i, value in enumerate(values) if math.isfinite(value)]
        return sorted(finite, key=lambda i: -self._cost(values[i], real))[:count]

    def _cost(self, value: float, real: float | None) -> float:
        if self.goal == "real":
            return math.inf if real is None else abs(value - real)
        return -value if self.goal == "more" else value
