"""Rectified-flow algebra: noise, predictions and their conversions, and the two axes of timesteps.

Everything follows from one path and one prediction (Wan 2.1; t in [0, 1], 1 = noise):

    (1)  x_t   = (1 - t) x0 + t eps                                       the path
    (2)  v     = d x_t / dt = eps - x0                                    what the network predicts
    (3)  x0    = x_t - t v                                                (1) and (2)
    (4)  eps   = x_t + (1 - t) v                                          (1) and (2)
    (5)  score = -eps / t = -(x_t + (1 - t) v) / t                        Gaussian kernel N((1 - t) x0, t^2)
    (6)        = -(x_t - (1 - t) x0) / t^2                                the same with an x0 prediction
    (7)  SNR   = ((1 - t) / t)^2

Timesteps have two axes. A grid or a draw is made on the *raw* axis u and *shifted* to the *sigma* axis, which is the t
of (1) to (7) and what the network sees (multiplied by 1000):

    (8)  t = s u / (1 + (s - 1) u),      u = t / (s - (s - 1) t)

The shift s grows with resolution, because the same noise hides less of a larger clip. A timestep t stated for clips of
N values corresponds, for clips of n values, to the timestep of equal signal after averaging N / n values:

    (9)  t_n = t / (a - (a - 1) t),      a = sqrt(N / n)                  the inverse of (8) with s = a

A state of the path at timestep r is noised further, to a higher timestep t, by

    (10) x_t = a x_r + sqrt(t^2 - a^2 r^2) eps,   a = (1 - t) / (1 - r),   with (1)'s signal and noise

Arrays are `[b, ...]` with one timestep per example. The timestep is cast to the array's dtype: pass float32 arrays
where (1 - t) is small.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
from jax import Array
from jaxtyping import Float

from vpae_jax.types import FrameTimes, Times, UserError

Signal = Float[Array, "b *shape"]
TimeLike = TypeVar("TimeLike", Float[Array, "*n"], Float[np.ndarray, "*n"], float)


def expand(t: Times | FrameTimes, like: Signal) -> Float[Array, "b *ones"]:
    """`t` of clips or of frames as `[b, 1, ...]` or `[b, f, 1, ...]`, in the dtype of `like`, to broadcast with it."""
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim)).astype(like.dtype)


def add_noise(x0: Signal, eps: Signal, t: Times | FrameTimes) -> Signal:
    """Eq. 1: x_t on the straight path from data to noise."""
    t = expand(t, x0)
    return (1 - t) * x0 + t * eps


def renoise(x: Signal, eps: Signal, r: Times, t: Times) -> Signal:
    """Eq. 10: from x_r to x_t, for r <= t, r < 1."""
    r, t = expand(r, x), expand(t, x)
    kept = (1 - t) / (1 - r)
    # t^2 - a^2 r^2 in factors, of which the first is t - a r: never below 0.
    return kept * x + ((t - r) / (1 - r) * (t + kept * r)) ** 0.5 * eps


def velocity_to_x0(v: Signal, x: Signal, t: Times | FrameTimes) -> Signal:
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
    """Eq. 8: raw axis to sigma axis. Keeps 0 and 1; s > 1 moves timesteps towards noise."""
    return s * u / (1 + (s - 1) * u)


def unshift(t: TimeLike, s: float) -> TimeLike:
    """Eq. 8, inverse: sigma axis to raw axis."""
    return t / (s - (s - 1) * t)


def translate(t: TimeLike, values_from: int, values_to: int) -> TimeLike:
    """Eq. 9: the timestep at which a clip of `values_to` values keeps as much signal as one of `values_from` at t."""
    return unshift(t, math.sqrt(values_from / values_to))


def shifted_times(steps: int, s: float) -> Float[np.ndarray, "n"]:
    """The timesteps of `steps` evaluations and a final 0: evenly spaced on the raw axis, then shifted."""
    if steps < 1:
        raise UserError(f"steps is {steps}, expected at least 1")
    return np.asarray(shift(np.linspace(1.0, 0.0, steps + 1), s), np.float32)
