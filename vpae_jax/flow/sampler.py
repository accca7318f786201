"""How a network is sampled: a solver, the timesteps of its evaluations, guidance."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.schedule import shifted_times
from vpae_jax.flow.solvers import unipc_levels
from vpae_jax.types import UserError

Solver = Literal["euler", "consistency", "unipc"]
SOLVERS: tuple[Solver, ...] = ("euler", "consistency", "unipc")
# Steps of a clip, or of a causal model's first chunk and of each later one.
Steps = int | tuple[int, int]

MAX_STEPS, MAX_GUIDANCE = 1000, 1000.0


@dataclass(frozen=True)
class Sampler:
    """A way to sample a network. Each one is compiled separately.

    Attributes:
      solver: "euler", "consistency" (predict x0, re-noise it to the next timestep) or "unipc" (Wan's own solver, for
        the teacher).
      times: falling timesteps, one for each step, from 1 (UniPC: just below 1), and a final 0.
      guidance: w of `v_u + w (v_c - v_u)`, from 1 to `MAX_GUIDANCE`. 1 is no guidance; any other value needs two
        evaluations per step.
      chunks: of a causal network, which generates a clip chunk by chunk, each with this solver; None for a network that
        sees whole clips.
      first: timesteps of the first chunk, if they differ (First-Frame Enhancement); otherwise empty.

    Raises:
      UserError: the solver is unknown, the timesteps do not fall from 1 to 0, or the guidance is out of bounds.
    """

    solver: Solver = "euler"
    times: tuple[float, ...] = (1.0, 0.0)
    guidance: float = 1.0
    chunks: Chunks | None = None
    first: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise UserError(f"solver is {self.solver!r}, expected one of {', '.join(map(repr, SOLVERS))}")
        for times in (self.times, self.first) if self.first else (self.times,):
            if len(times) > MAX_STEPS + 1:
                raise UserError(f"steps are {len(times) - 1}, expected at most {MAX_STEPS}")
            falling = all(later < earlier for earlier, later in pairwise(times))
            if len(times) < 2 or not falling or times[-1] != 0 or not 0.99 < times[0] <= 1:
                raise UserError(f"times are {reprlib.repr(times)}, expected numbers that fall from 1 to 0")
        if self.first and self.chunks is None:
            raise UserError("times of a first chunk were given, but the model makes whole clips; leave them out")
        if not self.guidance >= 1:
            raise UserError(f"guidance is {self.guidance}, expected at least 1 (1 is no guidance)")
        if self.guidance > MAX_GUIDANCE:
            raise UserError(f"guidance is {self.guidance}, expected at most {MAX_GUIDANCE:g}")

    @classmethod
    def even(cls, steps: int = 1, shift: float = 1.0, guidance: float = 1.0, solver: Solver = "euler") -> Sampler:
        """A sampler whose timesteps are evenly spaced on the raw axis, 1, ..., 0, then shifted (`flow.schedule` Eq. 8).

        UniPC uses its own levels.

        Raises:
          UserError: less than one step or more than `MAX_STEPS`, a shift that is not positive, or as the class.
        """
        if not 0 < shift < float("inf"):
            raise UserError(f"shift is {shift}, expected a positive number")
        if steps > MAX_STEPS:
            raise UserError(f"steps is {steps}, expected at most {MAX_STEPS}")
        times = unipc_levels(steps, shift) if solver == "unipc" else shifted_times(steps, shift)
        return cls(solver, tuple(map(float, times)), float(guidance))

    @property
    def steps(self) -> int:
        """Number of timesteps at which the network is evaluated."""
        return len(self.times) - 1

    @property
    def asked(self) -> Steps:
        """The steps, as a caller specifies them."""
        return (len(self.first) - 1, self.steps) if self.first else self.steps

    @property
    def evaluations(self) -> int:
        """Network evaluations per clip; guidance doubles them.

        For a causal network: those of the chunk with the most steps, without the one that remembers the chunk.
        """
        return max(self.steps, len(self.first) - 1) * (2 if self.guidance > 1 else 1)


ONE_STEP = Sampler()


def parse_steps(text: str, name: str) -> Steps:
    """Parses steps: "4", or "4,1" for four in the first chunk and one in later ones (First-Frame Enhancement).

    Args:
      name: of the option, for messages.

    Raises:
      UserError: the text is neither.
    """
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) == 2:
        return numbers
    raise UserError(
        f"{name}={text}: expected a number of steps, or for a causal model those of the first chunk and of later ones, "
        "such as 4,1"
    )


def typed(steps: Steps) -> str:
    """Steps in the format of `parse_steps`."""
    return str(steps) if isinstance(steps, int) else ",".join(map(str, steps))
