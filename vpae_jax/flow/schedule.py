"""Rectified-flow algebra: noise, predictions and their conversions, time axes, and distributions of t.

Everything follows from one path and one prediction (Wan 2.1; t in [0, 1], 1 = noise):

    (1)  x_t   = (1 - t) x0 + t eps                                       the path
    (2)  v     = d x_t / dt = eps - x0                                    what the network predicts
    (3)  x0    = x_t - t v                                                (1) and (2)
    (4)  eps   = x_t + (1 - t) v                                          (1) and (2)
    (5)  score = -eps / t = -(x_t + (1 - t) v) / t                        Gaussian kernel N((1 - t) x0, t^2)
    (6)        = -(x_t - (1 - t) x0) / t^2                                the same with an x0 prediction
    (7)  SNR   = ((1 - t) / t)^2

Two time axes occur. A grid or a draw is made on the *raw* axis u and *shifted* to the *sigma* axis, which is the t of
(1) to (7) and what the network sees (times 1000):

    (8)  t = s u / (1 + (s - 1) u),      u = t / (s - (s - 1) t)

The shift s grows with resolution, because the same noise hides less of a larger clip. A time t stated for clips of N
values corresponds, for clips of n values, to the time of equal signal after averaging N / n values:

    (9)  t_n = t / (a - (a - 1) t),      a = sqrt(N / n)                  the inverse of (8) with s = a

Arrays are `[b, ...]` with one time an example. The time is cast to the array's dtype: pass float32 arrays where
(1 - t) is small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from vpae_jax.flow import draws
from vpae_jax.types import PRNGKey, Times, UserError

Signal = Float[Array, "b *shape"]
TimeLike = TypeVar("TimeLike", Float[Array, "*n"], Float[np.ndarray, "*n"], float)

# Values of one 81 x 720 x 1280 latent, 21 x 90 x 160 x 16: the size for which noise ranges are stated.
VALUES_720P = 4_838_400


def expand(t: Times, like: Signal) -> Float[Array, "b *ones"]:
    """`t` as `[b, 1, ...]` in the dtype of `like`, ready to multiply it."""
    return t.reshape(t.shape + (1,) * (like.ndim - 1)).astype(like.dtype)


def add_noise(x0: Signal, eps: Signal, t: Times) -> Signal:
    """Eq. 1: x_t on the straight path from data to noise."""
    t = expand(t, x0)
    return (1 - t) * x0 + t * eps


def velocity_to_x0(v: Signal, x: Signal, t: Times) -> Signal:
    """Eq. 3."""
    return x - expand(t, x) * v


def velocity_to_score(v: Signal, x: Signal, t: Times) -> Signal:
    """Eq. 5; t > 0. The "+" is right because the prediction is a velocity."""
    t = expand(t, x)
    return -(x + (1 - t) * v) / t


def x0_to_score(x0: Signal, x: Signal, t: Times) -> Signal:
    """Eq. 6; t > 0."""
    t = expand(t, x)
    return -(x - (1 - t) * x0) / t**2


def shift(u: TimeLike, s: float) -> TimeLike:
    """Eq. 8: raw axis to sigma axis. Keeps 0 and 1; s > 1 moves times towards noise."""
    return s * u / (1 + (s - 1) * u)


def unshift(t: TimeLike, s: float) -> TimeLike:
    """Eq. 8, inverse: sigma axis to raw axis."""
    return t / (s - (s - 1) * t)


def translate(t: TimeLike, values_from: int, values_to: int) -> TimeLike:
    """Eq. 9: the time at which a clip of `values_to` values keeps as much signal as one of `values_from` at t."""
    return unshift(t, math.sqrt(values_from / values_to))


def shifted_times(steps: int, s: float) -> Float[np.ndarray, "n"]:
    """Times of `steps` evaluations: 1, ..., 0 evenly spaced on the raw axis, then shifted. `steps + 1` numbers."""
    if steps < 1:
        raise UserError(f"steps is {steps}, expected at least 1")
    return np.asarray(shift(np.linspace(1.0, 0.0, steps + 1), s), np.float32)


@runtime_checkable
class TimeSampler(Protocol):
    """A distribution of t: `sampler(key, b)` gives b independent times on the sigma axis."""

    def __call__(self, key: PRNGKey, size: int) -> Times: ...


def _check_translation(owner: str, values: int | None) -> None:
    if values is not None and values < 1:
        raise UserError(f"{owner}.translate_to is {values}, expected the number of values of a latent clip, or None")


def _translated(t: Times, values: int | None) -> Times:
    return t if values is None else translate(t, VALUES_720P, values)


@dataclass(frozen=True)
class Uniform:
    """Uniform on (low, high], either of the sigma axis or of the raw axis and then shifted.

    Attributes:
      low: lower end, in [0, 1].
      high: upper end, in [low, 1]; equal to `low` for a fixed time.
      axis: the axis on which `low` and `high` are stated and on which the draw is uniform.
      shift: Eq. 8's s, for the raw axis; 1 on the sigma axis, where nothing is shifted.
      clip: (low, high) on the sigma axis, applied after the shift; None for no clipping.
      translate_to: values of one latent clip of this run. The distribution is then understood as stated for 720p and
        each draw is translated (Eq. 9); None uses it as it stands.
    """

    low: float = 0.0
    high: float = 1.0
    axis: Literal["sigma", "raw"] = "sigma"
    shift: float = 1.0
    clip: tuple[float, float] | None = None
    translate_to: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise UserError(f"Uniform.low and high are {self.low} and {self.high}, expected 0 <= low <= high <= 1")
        if self.axis not in ("sigma", "raw"):
            raise UserError(f"Uniform.axis is {self.axis!r}, expected 'sigma' or 'raw'")
        if self.shift <= 0:
            raise UserError(f"Uniform.shift is {self.shift}, expected a positive number")
        if self.axis == "sigma" and self.shift != 1:
            raise UserError(
                f"Uniform.shift is {self.shift} on the sigma axis, where nothing is shifted; set shift=1 or axis='raw'"
            )
        if self.clip is not None and not 0 <= self.clip[0] <= self.clip[1] <= 1:
            raise UserError(f"Uniform.clip is {self.clip}, expected 0 <= low <= high <= 1, or None")
        _check_translation("Uniform", self.translate_to)

    def __call__(self, key: PRNGKey, size: int, low: Float[Array, ""] | None = None) -> Times:
        """Independent times; `low` replaces the lower end, for a range that moves during training."""
        width = self.high - (self.low if low is None else low)
        # Half-open at the low end: t = 0 has no noise, and several conversions divide by t.
        t = self.high - width * draws.uniform(key, size)
        t = shift(t, self.shift)
        if self.clip is not None:
            t = jnp.clip(t, *self.clip)
        return _translated(t, self.translate_to)


@dataclass(frozen=True)
class LogitNormal:
    """sigmoid(mean + std n), n standard normal, on the raw axis and then shifted (Stable Diffusion 3, LADD).

    Attributes:
      mean, std: of the logit; a larger mean is noisier.
      shift: Eq. 8's s.
      translate_to: as for `Uniform`.
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    translate_to: int | None = None

    def __post_init__(self) -> None:
        if self.std < 0:
            raise UserError(f"LogitNormal.std is {self.std}, expected 0 or more")
        if self.shift <= 0:
            raise UserError(f"LogitNormal.shift is {self.shift}, expected a positive number")
        _check_translation("LogitNormal", self.translate_to)

    def __call__(self, key: PRNGKey, size: int) -> Times:
        t = jax.nn.sigmoid(self.mean + self.std * draws.normal(key, (size,)))
        return _translated(shift(t, self.shift), self.translate_to)
