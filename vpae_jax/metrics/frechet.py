"""Frechet distance between two sets of feature vectors, as FVD computes it from I3D's logits.

    d^2 = |m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2))

(Heusel et al., 1706.08500, Eq. 6; for videos Unterthiner et al., 1812.01717.) With centred features X [n, d] and Y
[m, d], the trace of the root is the sum of singular values of X Y^T over sqrt((n - 1) (m - 1)). This avoids the root of
a matrix that is singular for small sets, and any imaginary part. The estimate is biased: for small sets from one
distribution it is far above 0, and its value is mostly bias. Compare only sets of the same size, and relative to the
distance of real clips from other real clips.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def frechet_distance(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
    """The squared distance d^2 of two sets of at least two vectors each, which is what FVD reports."""
    if min(len(x), len(y)) < 2:
        raise ValueError(f"sets of {len(x)} and {len(y)} vectors, expected at least 2 each")
    apart = float(((x.mean(0) - y.mean(0)) ** 2).sum())
    x, y = (a - a.mean(0) for a in (x, y))
    x, y = (a / np.sqrt(len(a) - 1) for a in (x, y))
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(apart + (x**2).sum() + (y**2).sum() - 2 * root)
