"""Progress messages for slow operations, so that silence is never mistaken for a hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

EVERY = 60.0  # seconds between two messages


def say(text: str) -> None:
    """Prints a line immediately, above a progress bar if there is one."""
    with tqdm.external_write_mode():
        print(text, flush=True)


@contextmanager
def working(what: str, say: Callable[[str], object] = say, every: float = EVERY) -> Iterator[None]:
    """Reports a slow operation: when it begins, at intervals while it continues, and how long it took.

    Args:
      what: the operation, as in "compiling the generator".
      say: prints a line; also called from another thread.
      every: seconds between messages.
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
    """Formats a duration as seconds, or as minutes and seconds."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Pace:
    """Reports the progress of generating clips, and the time left.

    Args:
      total: number of clips to generate.
      what: prefix of each line.
    """

    def __init__(self, total: int, what: str = "") -> None:
        self.total, self.what, self.done, self.first = total, what, 0, 0
        self.begun = self.said = 0.0

    def advance(self, clips: int = 1) -> None:
        """Counts finished clips."""
        now, begins = time.monotonic(), not self.done
        self.done += clips
        if begins:  # includes compilation, so the time left is estimated from the later clips only
            self.begun, self.said, self.first = now, now, clips
        elif now - self.said >= EVERY or self.done in (self.first + clips, self.total):
            self.said = now
            say(self.line(now))

    def line(self, now: float) -> str:
        """Formats the state as a line."""
        each = (now - self.begun) / (self.done - self.first)
        left = round(each * (self.total - self.done))
        hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
        start = f"{self.what}: " if self.what else ""
        return (
            f"{start}{self.done} of {self.total} clips; {each:.3g} s per clip; {hours}:{minutes:02d}:{seconds:02d} left"
        )
