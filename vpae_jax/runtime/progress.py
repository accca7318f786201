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


class Pace:
    """Says how far the making of clips is, and when it will end.

    Args:
      total: clips to make.
      what: begins each line.
    """

    def __init__(self, total: int, what: str = "") -> None:
        self.total, self.what, self.done, self.first = total, what, 0, 0
        self.begun = self.said = 0.0

    def advance(self, clips: int = 1) -> None:
        """So many clips more are there."""
        now, begins = time.monotonic(), not self.done
        self.done += clips
        if begins:  # which compiles: the time that is left is told from the later ones
            self.begun, self.said, self.first = now, now, clips
        elif now - self.said >= EVERY or self.done in (self.first + clips, self.total):
            self.said = now
            say(self.line(now))

    def line(self, now: float) -> str:
        """The state in words."""
        each = (now - self.begun) / (self.done - self.first)
        left = round(each * (self.total - self.done))
        hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
        start = f"{self.what}: " if self.what else ""
        return (
            f"{start}{self.done} of {self.total} clips; {each:.3g} s a clip; {hours}:{minutes:02d}:{seconds:02d} left"
        )
