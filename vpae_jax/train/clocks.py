"""Timing of the training loop: its pace, and when the next timed checkpoint is due."""

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
    """Measures the time per step since the last reading, and the fraction of it that the devices waited for data."""

    def __init__(self, now: Now = time.monotonic) -> None:
        self.now, self.time, self.step, self.waited = now, now(), None, 0.0

    @contextmanager
    def waiting(self, running: Any) -> Iterator[None]:
        """Measures the time of a block that waits for data. It only counts if the arrays `running` on the devices are
        ready by its end; otherwise the devices were busy all the time."""
        since = self.now()
        yield
        if all(value.is_ready() for value in jax.tree.leaves(running)):
            self.waited += self.now() - since

    def read(self, step: int) -> dict[str, float]:
        """Returns `seconds_per_step`, and `data_wait`, the fraction of that time spent waiting for data; both 0 at the
        first reading."""
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
    """A timer that goes off a number of minutes after it was started, in all processes by the first process's clock.

    Args:
      minutes: duration; 0 for a timer that never goes off.
      now: this process's clock.
    """

    def __init__(self, minutes: float, now: Now = time.monotonic) -> None:
        self.seconds, self.now = 60 * minutes, now
        self.wind()

    def wind(self) -> None:
        """Starts the timer."""
        self.since = self.now()

    def rings(self) -> bool:
        """Whether the time is over. A collective operation."""
        if not self.seconds:
            return False
        return bool(processes.of_all(np.array([self.now() - self.since]))[0] >= self.seconds)
