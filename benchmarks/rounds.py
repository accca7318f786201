"""Times functions alternately, so that a machine that slows down affects all of them.

`Timed` is a function to be timed, `measure` takes the times, and `product` is the reference for utilisation: one large
matrix product, whose rate is taken as the machine's peak.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

PAUSE = 0.05  # seconds, in which the threads of the previously timed library go to sleep


@dataclass(frozen=True)
class Timed:
    """A function without arguments.

    Attributes:
      run: does the work, and returns once it is finished.
      flops: its model FLOPs.
    """

    run: Callable[[], Any]
    flops: float


def product(size: int, dtype: DTypeLike) -> Timed:
    """A product of two square matrices of `size` rows."""
    first, second = (jax.random.normal(key, (size, size), dtype) for key in jax.random.split(jax.random.key(0)))
    multiply = jax.jit(jnp.matmul)
    return Timed(lambda: jax.block_until_ready(multiply(first, second)), 2.0 * size**3)


@dataclass
class Times:
    """Times of a function, with one entry per round.

    Attributes:
      seconds: wall-clock seconds.
      cpu: CPU seconds over all threads of the process, which other processes on the machine hardly affect.
    """

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def measure(timed: Mapping[str, Timed], rounds: int) -> dict[str, Times]:
    """Times every function in every round, after one warm-up run each.

    Every other round runs in reverse order, so that no function always follows the same one.
    """
    for one in timed.values():
        one.run()
    times = {name: Times() for name in timed}
    for number in range(rounds):
        for name in list(timed)[:: 1 if number % 2 == 0 else -1]:
            time.sleep(PAUSE)
            cpu, start = time.process_time(), time.perf_counter()
            timed[name].run()
            times[name].seconds.append(time.perf_counter() - start)
            times[name].cpu.append(time.process_time() - cpu)
    return times


def rate(timed: Timed, times: Times) -> float:
    """FLOP/s at the median time."""
    return timed.flops / statistics.median(times.seconds)
