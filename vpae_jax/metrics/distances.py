"""Kernel distance between two sets of clips, on features that are not learned.

    KVD = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)
    k(x, y) = (x.y / d + 1)^3

the unbiased estimate of the squared maximum mean discrepancy with a cubic kernel (Binkowski et al., "Demystifying MMD
GANs", 1801.01401, Eq. 4), for videos as in "FVD" (Unterthiner et al., 1812.01717). Its expectation for two sets from
the same distribution is 0 at any size, so it can be negative; a Frechet distance of small sets is far above 0.

The features are histograms of oriented gradients on a 3 x 3 x 3 grid over time and space, both overall and split by
whether the pixel is brightening or darkening (the direction in which edges move), plus the energy of the spatial
Laplacian and of the temporal difference in each frame. They capture blur, shape, motion and its order, and lack of
variety, and need no downloaded network.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, UInt8

from vpae_jax.metrics.base import Clips
from vpae_jax.metrics.measures import reduced

BINS = 8
GRID = 3
# Contrasts far below this fraction of the full range are coding noise and are given little weight.
CORE = 0.1
# Features (at most about 1) with a smaller spread count as constant, such as those of change if all clips are still.
LEAST_STD = 1e-3
# Standard scores are squashed beyond this, since a few outliers would otherwise dominate a cubic kernel.
SQUASH = 3.0
# To thousandths, in which KID and KVD are reported.
SCALE = 1e3


@dataclass(frozen=True)
class FeatureScale:
    """Standardisation of features, by the mean and standard deviation of a reference set."""

    mean: Float[np.ndarray, "d"]
    std: Float[np.ndarray, "d"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "n d"]) -> FeatureScale:
        std = features.std(0)
        # A feature that hardly varies in real clips must not outweigh all others.
        return cls(features.mean(0), np.maximum(std, max(0.5 * np.median(std), LEAST_STD)))

    def __call__(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
        return SQUASH * np.tanh((features - self.mean) / self.std / SQUASH)


@dataclass(frozen=True)
class Kernels:
    """Kernel values between all clips of two sets, from which the distances of subsets follow.

    Attributes:
      xx, yy, xy: within and between the sets.
    """

    xx: Float[np.ndarray, "n n"]
    yy: Float[np.ndarray, "m m"]
    xy: Float[np.ndarray, "n m"]

    @classmethod
    def of(cls, x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> Kernels:
        """Kernel values from standardised features."""
        return cls(*((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))))

    def subset(self, x: Int[np.ndarray, "few"], y: Int[np.ndarray, "some"]) -> Kernels:
        """Kernel values of a subset of each set."""
        return Kernels(self.xx[np.ix_(x, x)], self.yy[np.ix_(y, y)], self.xy[np.ix_(x, y)])

    @property
    def distance(self) -> float:
        """KVD, in thousandths; needs at least two clips in each set."""
        apart = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (self.xx, self.yy)]
        return float(SCALE * (sum(apart) - 2 * self.xy.mean()))


def features(clips: Clips, batch: int = 8) -> Float[np.ndarray, "n d"]:
    """One feature vector per clip, reduced by `measures.reduced`; needs at least 6 pixels along each side and 3
    frames."""
    clips, parts = reduced(clips), []
    for start in range(0, len(clips), batch):
        part = clips[start : start + batch]
        filled = np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]), np.uint8)])
        parts.append(np.asarray(_features(jnp.asarray(filled)), np.float64)[: len(part)])
    return np.concatenate(parts)


@jax.jit
def _features(clips: UInt8[Array, "b t height width 3"]) -> Float[Array, "b d"]:
    x = clips.astype(jnp.float32).mean(-1) / 255
    later, down, right = (jnp.asarray(jnp.gradient(x, axis=axis)) for axis in (1, 2, 3))
    laplacian = 4 * x - jnp.roll(x, 1, 2) - jnp.roll(x, -1, 2) - jnp.roll(x, 1, 3) - jnp.roll(x, -1, 3)
    laplacian = laplacian[:, :, 1:-1, 1:-1] / 4

    edge = _core(jnp.hypot(down, right))
    angle = (jnp.arctan2(down, right) / (2 * jnp.pi) * BINS) % BINS
    away = jnp.abs(angle - jnp.arange(BINS).reshape(-1, 1, 1, 1, 1))
    oriented = jnp.maximum(0, 1 - jnp.minimum(away, BINS - away)) * edge
    change = jnp.sign(later) * _core(jnp.abs(later))
    maps = jnp.stack([oriented, 4 * oriented * jnp.maximum(change, 0), 4 * oriented * jnp.maximum(-change, 0)])
    maps = _cells(rearrange(maps, "kind bins b t h w -> (kind bins) b t h w"))
    frames = [_core(jnp.abs(laplacian)).mean((2, 3)), _core(jnp.abs(later)).mean((2, 3))]
    values = jnp.concatenate([rearrange(maps, "k b cells -> b (k cells)"), *frames], axis=1)
    # The square root balances strong and weak edges (as in HOG); the offset bounds its slope at 0.
    return jnp.sqrt(values + 1e-4)


def _core(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Magnitudes, with small ones suppressed quadratically (coring)."""
    return x * x / (x + CORE)


def _cells(maps: Float[Array, "k b t height width"]) -> Float[Array, "k b cells"]:
    """Means over a GRID x GRID x GRID grid of time, rows and columns."""
    for axis in (2, 3, 4):
        edges = np.linspace(0, maps.shape[axis], GRID + 1).round().astype(int)
        pairs = itertools.pairwise(edges.tolist())
        cells = [jax.lax.slice_in_dim(maps, a, b, axis=axis).mean(axis, keepdims=True) for a, b in pairs]
        maps = jnp.concatenate(cells, axis)
    return rearrange(maps, "k b t h w -> k b (t h w)")
