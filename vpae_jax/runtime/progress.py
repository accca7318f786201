"""What a program says while something takes long, so that silence never looks like a hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

EVERY = 60.0  # seconds between two signs of life


def say(text: str) -> None:
    """Prints a line at once, above a progress bar if there is one."""
    with tqdm.external_write_mode():
        print(text, flush=True)


@contextmanager
def working(what: str, say: Callable[[str], object] = say, every: float = EVERY) -> Iterator[None]:
    """Around what may take long: says what begins, every so often that it goes on, and how long it took.

    Args:
      what: as in "compiling the generator".
      say: prints a line; called from another thread, too.
      every: seconds between signs of life.
    """
    since, ended = time.monotonic(), threading.Event()

    def tell() -> None:
        while not ended.wait(every):
            say(f"{what}: {duration(time.monotonic() - since)} so far")

    say(f"{what} ...")
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()
    say(f"{what}: {duration(time.monotonic() - since)}")


def duration(seconds: float) -> str:
    """Seconds, or minutes and seconds, to read."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
