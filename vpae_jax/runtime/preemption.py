"""SIGTERM: finish the current update, save, and exit cleanly.

Schedulers send SIGTERM before they take a machine away. The first signal requests a stop after the current update. A
second one, while the run is stopping, ends it at once; but not within the first seconds, since a scheduler may send the
same signal to a process and to its parent, which forwards it. All processes stop at the same point: they ask after
every update, and JAX's preemption service, which handles SIGTERM itself once processes have joined, makes them agree on
the first question that none of them has asked yet.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from jax.experimental import multihost_utils

from vpae_jax.runtime import processes

SAME_SECONDS = 2.0
# Whether to stop now. All processes must ask equally often, and each only after finishing its previous work.
Stop = Callable[[], bool]


def never() -> bool:
    """Never stops a run early."""
    return False


@contextmanager
def on_sigterm() -> Iterator[Stop]:
    """While the body runs, SIGTERM requests a stop. Must be called in the main thread."""
    if processes.client() is not None:
        yield partial(_agreed, itertools.count(1))
        return
    asked = []

    def ask(number: int, frame: Any) -> None:
        del frame
        asked.append(number)
        _end_on_another()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, before)


def _agreed(questions: Iterator[int]) -> bool:
    stop = multihost_utils.reached_preemption_sync_point(next(questions))
    if stop:
        _end_on_another()
    return stop


def _end_on_another() -> None:
    """From now on, SIGTERM ends this process."""
    since = time.monotonic()

    def end(number: int, frame: Any) -> None:
        del frame
        if time.monotonic() - since > SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    signal.signal(signal.SIGTERM, end)
