"""Intervals of 95 % over clips, by a bootstrap of halves that are drawn without replacement.

A clip that is drawn twice would meet itself in a kernel, whose distance must leave such pairs out; so each draw takes
m = n // 2 of n clips. The mean of such a half scatters about that of all with variance s^2 (1/m - 1/n), where s^2/n is
wanted: deviations are scaled by sqrt(m / (n - m)), which is 1 for even n ("delete-d jackknife", Shao and Wu, Annals of
Statistics 17, 1989). They are taken from the mean of the draws, because a Frechet distance of halves is larger than
that of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

DRAWS, SEED = 200, 11
LEVEL = (2.5, 97.5)  # per cent

Interval = tuple[float, float]


def half(count: int, rng: np.random.Generator) -> Int[np.ndarray, "m"]:
    """Half of the clips, at least two where there are so many, in their order."""
    size = min(count, max(2, count // 2))
    return np.sort(rng.choice(count, size, replace=False))


def intervals(
    values: Mapping[str, float], count: int, draw: Callable[[np.random.Generator], Mapping[str, float]]
) -> dict[str, Interval]:
    """The interval of each number.

    Args:
      values: of all clips.
      count: how many these are.
      draw: the same numbers of a half of them; one that a half does not have is left out of that draw.
    """
    rng = np.random.default_rng(SEED)
    draws = [draw(rng) for _ in range(DRAWS)]
    size = min(count, max(2, count // 2))
    scale = np.sqrt(size / max(count - size, 1))
    return {
        name: _interval(value, [one[name] for one in draws if name in one], float(scale))
        for name, value in values.items()
        if any(name in one for one in draws)
    }


def _interval(value: float, draws: Sequence[float], scale: float) -> Interval:
    low, high = np.percentile(np.array(draws) - np.mean(draws), LEVEL)
    return float(value + scale * low), float(value + scale * high)
