"""What the training loop measures time for: its pace, and when the next checkpoint is due."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from vpae_jax.runtime import processes

Now = Callable[[], float]  # seconds


class Clock:
    """Time a step since the last reading, and how much of it the devices were idle for want of data."""

    def __init__(self, now: Now = time.monotonic) -> None:
        self.now, self.time, self.step, self.waited = now, now(), None, 0.0

    @contextmanager
    def waiting(self, running: Any) -> Iterator[None]:
        """Around what waits for data. It is counted only when what was `running` on the devices, arrays that are yet to
        be computed, has ended by then: else the devices had work all the time."""
        since = self.now()
        yield
        if all(value.is_ready() for value in jax.tree.leaves(running)):
            self.waited += self.now() - since

    def read(self, step: int) -> dict[str, float]:
        """`seconds_per_step`, and `data_wait`, the share of them spent waiting for data; 0 at the first reading."""
        now, before = self.now(), self.step
        passed = now - self.time
        known = before is not None and passed > 0
        result = {
            "seconds_per_step": passed / max(1, step - before) if before is not None else 0.0,
            "data_wait": self.waited / passed if known else 0.0,
        }
        self.time, self.step, self.waited = now, step, 0.0
        return result


class Alarm:
    """Rings when so many minutes have passed since it was wound, by the first process's clock on all processes.

    Args:
      minutes: 0 for one that never rings.
      now: this process's clock.
    """

    def __init__(self, minutes: float, now: Now = time.monotonic) -> None:
        self.seconds, self.now = 60 * minutes, now
        self.wind()

    def wind(self) -> None:
        """From now on."""
        self.since = self.now()

    def rings(self) -> bool:
        """Whether the time is over. Collective."""
        if not self.seconds:
            return False
        return bool(processes.of_all(np.array([self.now() - self.since]))[0] >= self.seconds)
