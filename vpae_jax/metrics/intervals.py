"""95% intervals over clips, from random halves drawn without replacement.

A clip drawn twice would be compared with itself by a kernel distance, which must exclude such pairs; so each draw takes
m = n // 2 of n clips. The mean of such a half scatters about that of all clips with variance s^2 (1/m - 1/n) instead of
s^2/n: deviations are scaled by sqrt(m / (n - m)), which is 1 for even n ("delete-d jackknife", Shao and Wu, Annals of
Statistics 17, 1989). Deviations are from the mean of the draws, because a Frechet distance of halves is larger than
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
    """Indices of a random half of the clips, at least two if there are two, in order."""
    size = min(count, max(2, count // 2))
    return np.sort(rng.choice(count, size, replace=False))


def intervals(
    values: Mapping[str, float], count: int, draw: Callable[[np.random.Generator], Mapping[str, float]]
) -> dict[str, Interval]:
    """The 95% interval of each metric.

    Args:
      values: metrics of all clips.
      count: number of clips.
      draw: gives the same metrics of a random half; metrics missing from a draw are skipped in it.
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
