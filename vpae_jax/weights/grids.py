"""The timesteps of Diffusers' flow-matching schedulers, and which lists of timesteps their configs can express.

`FlowMatchEulerDiscreteScheduler` and `FlowMatchLCMScheduler` generate N timesteps, and append 0 (in `set_timesteps`):

    (1)  t_i = shift(1 - (1 - m) x_i, s)                 x_i = i / (N - 1),  m = shift(1/1000, s),  s: `shift`
    (2)  t_i <- 1 - (1 - t_i) (1 - z) / (1 - t_{N-1})    z: `shift_terminal`, if it is set

With (1) alone, they go down to almost 0, so that the last evaluation is wasted, and are shifted twice. With (2), they
go down to z before the 0, and (1) only bends the path to it:

    (3)  (1 - t_i) / (1 - z) = x_i (1 - b) / (1 - b x_i)      b = (s - 1) (1 - m) / s

N evenly spaced timesteps shifted by any s' (`flow.schedule` Eq. 8) have this form: z is the last of them, and b follows
from any other. So for a given N, two fields of a config express exactly the timesteps that a student was trained for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vpae_jax.flow.sampler import Sampler, Solver
from vpae_jax.flow.schedule import shift as shifted
from vpae_jax.types import UserError

TRAIN_TIMES = 1000
# Timesteps rounded to thousandths for the network (UniPC), or starting at 0.999 (Wan's own), count as evenly spaced.
TOLERANCE = 1.001e-3


class Grid(NamedTuple):
    """Fields of a flow-matching scheduler's config.

    Attributes:
      shift: s of Eq. 1; positive.
      terminal: z of Eq. 2, in (0, 1); None leaves Eq. 2 out.
    """

    shift: float
    terminal: float | None

    def times(self, steps: int) -> tuple[float, ...]:
        """The timesteps that Diffusers generates from them, to 9 digits: `steps + 1` numbers that fall from 1 to 0.

        Raises:
          UserError: a terminal outside (0, 1), or a terminal with one step, where Diffusers divides by 0.
        """
        if self.terminal is not None and not 0 < self.terminal < 1:
            raise UserError(f"shift_terminal is {self.terminal}, expected null or a number between 0 and 1")
        if self.terminal is not None and steps == 1:
            raise UserError(f"shift_terminal is {self.terminal}, expected null for one step")
        if steps == 1:
            return 1.0, 0.0
        least = shifted(1 / TRAIN_TIMES, self.shift)
        times = np.asarray(shifted(np.linspace(1.0, least, steps), self.shift))
        if self.terminal is not None:
            times = 1 - (1 - times) * ((1 - self.terminal) / (1 - times[-1]))
        return *np.round(times, 9).tolist(), 0.0


def even_times(steps: int, s: float) -> tuple[float, ...]:
    """`flow.schedule.shifted_times` in float64, since a config stores all digits."""
    return tuple(np.asarray(shifted(np.linspace(1.0, 0.0, steps + 1), s)).tolist())


def fit(times: Sequence[float]) -> Grid | None:
    """The grid that gives these timesteps, to `TOLERANCE`; None if there is none.

    Args:
      times: of more than one step, falling from 1 to 0.
    """
    last = len(times) - 2
    terminal, bend = times[-2], 0.0
    if last > 1:
        x, way = (last // 2) / last, (1 - times[last // 2]) / (1 - terminal)
        bend = (x - way) / (x * (1 - way))
    # Eq. 3's b for a = s - 1 is a (T - 1) / ((1 + a) (T + a)): a quadratic, whose smaller root is 0 for b = 0.
    half = (TRAIN_TIMES - 1 - bend * (TRAIN_TIMES + 1)) / 2
    square = half**2 - bend**2 * TRAIN_TIMES
    if square < 0 or half < 0:
        return None
    grid = Grid(1 + bend * TRAIN_TIMES / (half + math.sqrt(square)), terminal)
    return grid if grid.shift > 0 and close(grid.times(last + 1), times) else None


def even_shift(solver: Solver, times: Sequence[float]) -> float | None:
    """The shift whose even timesteps (`Sampler.even`) these are, to `TOLERANCE`; None if there is none, or for one
    step."""
    steps = len(times) - 1
    if steps == 1:
        return None
    middle = steps // 2
    u, t = Sampler.even(steps, 1.0, 1.0, solver).times[middle], times[middle]
    found = float(f"{t * (1 - u) / (u * (1 - t)):.6g}")  # times may be float32
    return found if close(Sampler.even(steps, found, 1.0, solver).times, times) else None


def close(found: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether two lists of timesteps are equal, to `TOLERANCE`."""
    return bool(np.allclose(found, expected, rtol=0, atol=TOLERANCE))
