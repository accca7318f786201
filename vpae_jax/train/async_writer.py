"""Orbax's writer, and what it takes to end well when a checkpoint cannot be written.

Orbax writes in many threads. When one fails, it logs its trace, raises the failure, and leaves the others at work:
these fail too, log theirs, and report to an event loop that is closed by then; asyncio logs what nobody asked for,
Python warns of what was never begun, and prints the rest. All of it says what has been raised already.
"""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

# How long other threads may go on writing when one has failed; most fail at once, as it did.
AFTER_FAILURE = 10.0
LOGS = ("absl", "asyncio")


class AsyncWriter:
    """Writes one checkpoint at a time, while its caller does something else; all processes call each method.

    As a context manager it keeps Orbax quiet about what it raises.

    Args:
      items: a handler for each part of a checkpoint.

    Attributes:
      failed: whether what was begun last has not ended well, as far as is known.
    """

    def __init__(self, **items: Any):
        # Or threads would wait minutes for a folder that could not be made.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(async_options=options), **items)
        self.orbax = ocp.AsyncCheckpointer(handler, async_options=options)
        self.failed, self._hook = False, None

    def save(self, folder: Path, **items: Any) -> None:
        """Begins to write Orbax's arguments for each part; returns when they are copied."""
        self.failed = True
        self.orbax.save(folder, args=ocp.args.Composite(**items))

    def finish(self) -> None:
        """Returns when all is written. Raises what went wrong with it: `OSError`, or tensorstore's `ValueError`."""
        self.orbax.wait_until_finished()
        self.failed = False

    def restore(self, folder: Path, **items: Any) -> Any:
        """What Orbax's arguments for each part ask for."""
        return self.orbax.restore(folder, args=ocp.args.Composite(**items))

    def close(self) -> None:
        """Ends the threads, as far as they end."""
        if not self.failed:
            self.orbax.close()
            return
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        deadline = time.monotonic() + AFTER_FAILURE
        for thread in threading.enumerate():
            if type(thread).__module__.startswith("orbax."):
                threading.Thread.join(thread, max(0.0, deadline - time.monotonic()))  # theirs raises the failure again

    def __enter__(self) -> AsyncWriter:
        for name in LOGS:
            logging.getLogger(name).addFilter(_is_news)
        self._hook, sys.unraisablehook = sys.unraisablehook, _without_closed_loops(sys.unraisablehook)
        return self

    def __exit__(self, *_: object) -> None:
        # After a failure some write may be under way yet, and be heard of later; the process is about to end.
        if not self.failed and self._hook is not None:
            for name in LOGS:
                logging.getLogger(name).removeFilter(_is_news)
            sys.unraisablehook = self._hook


def remove_what_is_written(folder: Path) -> None:
    """Removes a folder that threads of a failed writer may make anew: until none has for half a second."""
    deadline, still = time.monotonic() + AFTER_FAILURE, 0
    while still < 5 and time.monotonic() < deadline:
        still = 0 if folder.exists() else still + 1
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)


def _is_news(record: logging.LogRecord) -> bool:
    """Not so what Orbax logs with its trace, and what became of things that it had begun beside."""
    told = record.exc_info is not None and "orbax" in record.pathname
    return not told and "exception was never retrieved" not in str(record.msg)


def _without_closed_loops(hook: Callable[[Any], Any]) -> Callable[[Any], None]:
    def heard(what: Any) -> None:
        if not (isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == "Event loop is closed"):
            hook(what)

    return heard
