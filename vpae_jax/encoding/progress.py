"""The progress of an encoding: a bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType

from tqdm import tqdm

# Seconds between two lines in a log.
INTERVAL = 60.0


class Progress:
    """Reports clips per second and the time left.

    The time left is estimated from the total number of items if that is known in advance; otherwise from the finished
    units, so that it is unknown until the first one is done. The time up to the first item includes compilation and is
    left out of the estimate.

    Args:
      expected: number of clips and rejects in each pending unit, None where it is not known.
      what: name of one encoded item.
    """

    def __init__(self, expected: Sequence[int | None], what: str = "clip") -> None:
        self.units, self.done, self.what = len(expected), 0, what
        self.clips = self.rejects = 0
        known = [number for number in expected if number is not None]
        self.total = sum(known) if len(known) == len(expected) else None
        self._estimated = self.total is None
        self.start = self.said = self.first = time.monotonic()
        self.bar = (
            tqdm(desc="encoding", unit=what, total=self.total, dynamic_ncols=True) if sys.stderr.isatty() else None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, used: bool) -> None:
        """Counts a clip that was encoded, or a reject."""
        if not self.clips + self.rejects:
            self.first = time.monotonic()
        self.clips, self.rejects = self.clips + used, self.rejects + (not used)
        if self.bar is not None:
            if self.rejects:
                self.bar.set_postfix(rejected=self.rejects, refresh=False)
            self.bar.update()
        else:
            self._say()

    def end_of_unit(self) -> None:
        """Counts a unit that was written."""
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
        """Formats the state as a line."""
        seconds, later = max(now - self.start, 1e-9), self.clips + self.rejects - 1
        rejected = f", {self.rejects} rejected" if self.rejects else ""
        if self.total is None:
            left = "time left unknown until a unit is done"
        elif later < 1:
            left = f"time left unknown until a second {self.what} is done"
        else:
            left = f"{_clock((now - self.first) / later * max(self.total - later - 1, 0))} left"
        done = f"{self.done} of {self.units} units"
        return f"encoded {self.clips} {self.what}s{rejected}; {done}; {_rate(self.clips, seconds, self.what)}; {left}"


def _rate(clips: int, seconds: float, what: str) -> str:
    """Formats the rate; as seconds per item if it is slow, since a teacher may take minutes per clip."""
    return f"{seconds / clips:.0f} s per {what}" if 0 < 10 * clips < seconds else f"{clips / seconds:.1f} {what}s/s"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
