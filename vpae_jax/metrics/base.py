"""Clips and named numbers."""

from __future__ import annotations

from collections.abc import Mapping
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
        cost = {"more": lambda v: -v, "less": lambda v: v, "real": lambda v: abs(v - real)}[self.goal]
        return min(values, key=lambda name: cost(values[name]))
