"""Distributions of the timestep t at which a clip is noised, for every method that draws one.

A draw is made on the raw axis, shifted to the sigma axis (`flow.schedule` Eq. 8), clipped, and translated from the
clip size for which it is stated to that of the batch (Eq. 9).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from vpae_jax.flow import draws
from vpae_jax.flow.schedule import shift, translate
from vpae_jax.types import PRNGKey, Times, UserError

# Values of one 81 x 720 x 1280 latent, 21 x 90 x 160 x 16: the size for which the papers' noise ranges are stated.
VALUES_720P = 4_838_400

# The fields that apply to only some kinds; all other fields apply to every kind.
OWN: Mapping[str, tuple[str, ...]] = {
    "uniform": ("low", "high"),
    "logit_normal": ("mean", "std"),
    "grid": ("points", "low", "high"),
    "list": ("values", "weights"),
}


class _Points(NamedTuple):
    """Discrete timesteps on the raw axis, the next lower ones, and their probabilities."""

    times: Float[np.ndarray, "n"]
    before: Float[np.ndarray, "n"]
    probabilities: Float[np.ndarray, "n"]


class Phased(NamedTuple):
    """Timesteps of a grid that is divided into phases.

    Attributes:
      t: as drawn.
      before: the next lower point of the whole grid.
      end: the lower end of the phase of t: 0, or a point of the phase below.
      inside: another timestep of this phase, at or above its end and below its top.
    """

    t: Times
    before: Times
    end: Times
    inside: Times


@dataclass(frozen=True)
class TimeDistribution:
    """A distribution of t on the sigma axis; `distribution(key, latents.shape)` draws one timestep for each clip.

        uniform        uniform on (low, high]
        logit_normal   sigmoid(mean + std n) with n standard normal (Stable Diffusion 3, LADD)
        grid           n / points with n a whole number, equally likely, in (low, high] (consistency distillation)
        list           one of `values` (ADD, LADD)

    Attributes:
      kind: one of the above. A field of another kind that is not at its default is an error, since it has no effect.
      low: lower end, in [0, 1], never drawn itself (t = 0 has no noise) unless `high` equals it.
      high: upper end, in [low, 1]; for "uniform", equal to `low` for a fixed time.
      mean, std: of the logit; a larger mean gives more noise.
      points: number of points of the whole grid, from 1 / points to 1; (low, high] may select a part of it.
      values: falling timesteps in (0, 1].
      weights: relative frequency of each of `values`; if empty, all are equally likely.
      shift: s of Eq. 8. All of the above is stated on the raw axis of this shift; at 1 that is the sigma axis.
      clip: (low, high) on the sigma axis, applied after the shift.
      stated_for: number of values of the latent clip for which all of the above is stated: 4,838,400 for 720p. Draws
        for clips of another size are translated (Eq. 9). None uses the same timesteps for every size.
    """

    kind: Literal["uniform", "logit_normal", "grid", "list"] = "uniform"
    low: float = 0.0
    high: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    points: int = 50
    values: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    weights: tuple[float, ...] = ()
    shift: float = 1.0
    clip: tuple[float, float] = (0.0, 1.0)
    stated_for: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in OWN:
            raise UserError(f"kind is {self.kind!r}, expected one of {', '.join(map(repr, OWN))}")
        self._refuse_what_has_no_effect()
        if not 0 <= self.low <= self.high <= 1:
            raise UserError(f"low and high are {self.low} and {self.high}, expected 0 <= low <= high <= 1")
        if self.std < 0:
            raise UserError(f"std is {self.std}, expected 0 or more")
        if self.points < 1:
            raise UserError(f"points is {self.points}, expected at least 1")
        falling = all(later < earlier for earlier, later in pairwise(self.values))
        if not self.values or not falling or self.values[0] > 1 or self.values[-1] <= 0:
            raise UserError(f"values are {self.values}, expected falling timesteps of at most 1 and above 0")
        if self.weights and (
            len(self.weights) != len(self.values) or min(self.weights) < 0 or not 0 < sum(self.weights) < math.inf
        ):
            raise UserError(f"weights are {self.weights}, expected one for each of values, none negative, not all 0")
        if not 0 < self.shift < math.inf:
            raise UserError(f"shift is {self.shift}, expected a positive number")
        if len(self.clip) != 2 or not 0 <= self.clip[0] <= self.clip[1] <= 1:
            raise UserError(f"clip is {self.clip}, expected 0 <= low <= high <= 1")
        if self.stated_for is not None and self.stated_for < 1:
            raise UserError(f"stated_for is {self.stated_for}, expected the values of a latent clip, or None")
        if self.kind == "grid" and not self._points.times.size:
            raise UserError(f"no multiple of 1 / {self.points} is in (low, high] = ({self.low}, {self.high}]")

    def _refuse_what_has_no_effect(self) -> None:
        others = {name for own in OWN.values() for name in own} - set(OWN[self.kind])
        fields = [f for f in dataclasses.fields(self) if f.name in others and getattr(self, f.name) != f.default]
        if fields:
            found = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields)
            reset = ", ".join(f"{f.name}={f.default}" for f in fields)
            raise UserError(f"{found} has no effect on kind {self.kind!r}; set {reset}, or another kind")

    def __call__(self, key: PRNGKey, shape: Sequence[int], low: Float[Array, ""] | None = None) -> Times:
        """Draws independent timesteps for latents of shape `[b, ...]`.

        Args:
          key: one key, or one for each clip.
          shape: of the latents to be noised.
          low: overrides the lower end of "uniform", for a range that moves during training.
        """
        if self.kind == "uniform":
            width = self.high - (self.low if low is None else low)
            raw = self.high - width * draws.uniform(key, shape[0])  # half-open at the low end
        elif self.kind == "logit_normal":
            raw = jax.nn.sigmoid(self.mean + self.std * draws.normal(key, (shape[0],)))
        else:
            return self.pair(key, shape)[0]
        return self._placed(raw, shape)

    def pair(self, key: PRNGKey, shape: Sequence[int]) -> tuple[Times, Times]:
        """Draws timesteps as a call does, each with the next lower one of the whole grid or list; 0 below the lowest.

        Raises:
          UserError: the kind has no discrete timesteps.
        """
        points = self._points
        cumulative = jnp.asarray(np.cumsum(points.probabilities), jnp.float32)
        index = jnp.searchsorted(cumulative, draws.uniform(key, shape[0]), side="right")
        drawn, before = (jnp.asarray(table, jnp.float32)[index] for table in (points.times, points.before))
        return self._placed(drawn, shape), self._placed(before, shape)

    def phased(self, key: PRNGKey, shape: Sequence[int], phases: int = 1) -> Phased:
        """Draws timesteps of a grid as a call does, each with its phase and another independent timestep of that phase.

        The points of (low, high] are divided into phases of sizes as equal as possible; a phase reaches down to the
        highest point of the one below, the lowest phase to the point below `low`, or to 0.

        Raises:
          UserError: the kind is not a grid, or there are more phases than points.
        """
        starts, points = self._starts(phases), self._points
        sizes = np.diff(starts, append=len(points.times))
        point, other = draws.split(draws.clip_keys(key, shape[0]), 2)
        index = (draws.uniform(point, shape[0]) * len(points.times)).astype(jnp.int32)
        start, size = (jnp.asarray(np.repeat(table, sizes), jnp.int32)[index] for table in (starts, sizes))
        inside = start + (draws.uniform(other, shape[0]) * size.astype(jnp.float32)).astype(jnp.int32)
        times, before = (jnp.asarray(table, jnp.float32) for table in (points.times, points.before))
        raw = (times[index], before[index], before[start], before[inside])
        return Phased(*(self._placed(one, shape) for one in raw))

    def ends(self, phases: int = 1) -> tuple[float, ...]:
        """The boundaries of the phases of `phased`, at which a student that jumps from each to the next is sampled.

        Returns:
          Falling timesteps on the sigma axis, from the top of the highest phase to the end of the lowest, without
          translation to another clip size.

        Raises:
          UserError: as `phased`.
        """
        starts, points = self._starts(phases), self._points
        raw = np.array([points.times[-1], *points.before[starts[::-1]]])
        return tuple(np.clip(shift(raw, self.shift), *self.clip).tolist())

    def _starts(self, phases: int) -> Int[np.ndarray, "phases"]:
        """Index of the lowest point of each phase, counted from the lowest point of all."""
        if self.kind != "grid":
            raise UserError(f"kind is {self.kind!r}, expected 'grid', which has phases")
        points = len(self._points.times)
        if not 1 <= phases <= points:
            raise UserError(f"phases are {phases}, expected 1 to {points}, the number of points of the grid")
        return np.arange(phases) * points // phases

    @property
    def _points(self) -> _Points:
        if self.kind == "grid":
            numbers = np.arange(1, self.points + 1)
            # Some tolerance for ends such as 0.74, which are points up to rounding.
            low, high = (end * self.points + 1e-6 for end in (self.low, self.high))
            numbers = numbers[(numbers > low) & (numbers <= high)]
            times, before, weights = numbers / self.points, (numbers - 1) / self.points, np.ones(len(numbers))
        elif self.kind == "list":
            times, before = np.array(self.values), np.array([*self.values[1:], 0.0])
            weights = np.array(self.weights or (1.0,) * len(times))
        else:
            raise UserError(f"kind is {self.kind!r}, expected 'grid' or 'list', which have discrete timesteps")
        return _Points(times, before, weights / weights.sum())

    def _placed(self, raw: Times, shape: Sequence[int]) -> Times:
        """Raw timesteps on the sigma axis, for latents of this shape."""
        t = shift(raw, self.shift)
        if self.clip != (0, 1):
            t = jnp.clip(t, *self.clip)
        return t if self.stated_for is None else translate(t, self.stated_for, math.prod(shape[1:]))
