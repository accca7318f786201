"""How far an encoding is: a bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType

from tqdm import tqdm

# Seconds between two lines of a log.
INTERVAL = 60.0


class Progress:
    """Clips a second and the time that is left.

    That is estimated from all that there is to do, where it is known before it is read; else from the units that are
    done, so that it is not known before the first one is.

    Args:
      expected: of each unit that is to be done, how many clips and rejects it has, None where that is not known.
      what: is encoded, one of them.
    """

    def __init__(self, expected: Sequence[int | None], what: str = "clip") -> None:
        self.units, self.done, self.what = len(expected), 0, what
        self.clips = self.rejects = 0
        known = [number for number in expected if number is not None]
        self.total = sum(known) if len(known) == len(expected) else None
        self._estimated = self.total is None
        self.start = self.said = time.monotonic()
        self.bar = (
            tqdm(desc="encoding", unit=what, total=self.total, dynamic_ncols=True) if sys.stderr.isatty() else None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, used: bool) -> None:
        """A clip was encoded, or something was rejected."""
        self.clips, self.rejects = self.clips + used, self.rejects + (not used)
        if self.bar is not None:
            if self.rejects:
                self.bar.set_postfix(rejected=self.rejects, refresh=False)
            self.bar.update()
        else:
            self._say()

    def end_of_unit(self) -> None:
        """A unit is written."""
        self.done += 1
        if self._estimated:
            self.total = round((self.clips + self.rejects) / self.done * self.units)
        if self.bar is not None:
            self.bar.total = self.total
            self.bar.refresh()
        else:
            self._say(last=self.done == self.units)

    def _say(self, last: bool = False) -> None:
        now = time.monotonic()
        if last or now - self.said > INTERVAL:
            self.said = now
            print(self.line(now), flush=True)

    def line(self, now: float) -> str:
        """The state in words."""
        seconds, finished = max(now - self.start, 1e-9), self.clips + self.rejects
        rejected = f", {self.rejects} rejected" if self.rejects else ""
        if self.total is None or not finished:
            left = "how long it takes is known after a unit"
        else:
            left = f"{_clock(seconds / finished * max(self.total - finished, 0))} left"
        done = f"{self.done} of {self.units} units"
        return f"encoded {self.clips} {self.what}s{rejected}; {done}; {_rate(self.clips, seconds, self.what)}; {left}"


def _rate(clips: int, seconds: float, what: str) -> str:
    """Of a teacher's clips each may take minutes."""
    return f"{seconds / clips:.0f} s a {what}" if 0 < 10 * clips < seconds else f"{clips / seconds:.1f} {what}s/s"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
