"""Orbax's asynchronous writer, with a clean exit when a checkpoint cannot be written.

Orbax writes in many threads. When one fails, Orbax logs its traceback, raises the error, and leaves the other threads
running. They fail too, log their tracebacks, and report to an event loop that is closed by then; asyncio logs
unretrieved exceptions, and Python warns about coroutines that were never awaited. All of this repeats the error that
has already been raised.
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

# Seconds that other threads may continue to write after one has failed; most fail at once, too.
AFTER_FAILURE = 10.0
LOGS = ("absl", "asyncio")


class AsyncWriter:
    """Writes one checkpoint at a time in the background; all processes must call each method.

    As a context manager, it keeps Orbax from logging errors that it also raises.

    Args:
      items: a handler for each part of a checkpoint.

    Attributes:
      failed: whether the last write has not, or not yet, finished successfully.
    """

    def __init__(self, **items: Any):
        # Otherwise threads would wait minutes for a folder that could not be created.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(async_options=options), **items)
        self.orbax = ocp.AsyncCheckpointer(handler, async_options=options)
        self.failed, self._hook = False, None

    def save(self, folder: Path, **items: Any) -> None:
        """Starts writing the given parts (Orbax's arguments); returns when they have been copied."""
        self.failed = True
        self.orbax.save(folder, args=ocp.args.Composite(**items))

    def finish(self) -> None:
        """Waits until everything is written. Raises the error of a failed write: `OSError`, or tensorstore's
        `ValueError`."""
        self.orbax.wait_until_finished()
        self.failed = False

    def restore(self, folder: Path, **items: Any) -> Any:
        """Restores the parts requested by Orbax's arguments."""
        return self.orbax.restore(folder, args=ocp.args.Composite(**items))

    def close(self) -> None:
        """Ends the threads, as far as possible."""
        if not self.failed:
            self.orbax.close()
            return
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        deadline = time.monotonic() + AFTER_FAILURE
        for thread in threading.enumerate():
            if type(thread).__module__.startswith("orbax."):
                threading.Thread.join(thread, max(0.0, deadline - time.monotonic()))  # their own `join` raises again

    def __enter__(self) -> AsyncWriter:
        for name in LOGS:
            logging.getLogger(name).addFilter(_is_news)
        self._hook, sys.unraisablehook = sys.unraisablehook, _without_closed_loops(sys.unraisablehook)
        return self

    def __exit__(self, *_: object) -> None:
        # After a failure some writes may still be running and log later; the process is about to end anyway.
        if not self.failed and self._hook is not None:
            for name in LOGS:
                logging.getLogger(name).removeFilter(_is_news)
            sys.unraisablehook = self._hook


def remove_what_is_written(folder: Path) -> None:
    """Removes a folder that threads of a failed writer may recreate, until it stays away for half a second."""
    deadline, still = time.monotonic() + AFTER_FAILURE, 0
    while still < 5 and time.monotonic() < deadline:
        still = 0 if folder.exists() else still + 1
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)


def _is_news(record: logging.LogRecord) -> bool:
    """A log filter that drops Orbax's tracebacks, and asyncio's messages about unretrieved exceptions."""
    told = record.exc_info is not None and "orbax" in record.pathname
    return not told and "exception was never retrieved" not in str(record.msg)


def _without_closed_loops(hook: Callable[[Any], Any]) -> Callable[[Any], None]:
    def heard(what: Any) -> None:
        if not (isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == "Event loop is closed"):
            hook(what)

    return heard
