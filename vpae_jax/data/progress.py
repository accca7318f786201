"""How far an encoding is: a bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

# Seconds between two lines of a log.
INTERVAL = 60.0


class Progress:
    """Clips a second and the time that is left, estimated from the units that are done.

    Args:
      units: how many are to be done.
    """

    def __init__(self, units: int) -> None:
        self.units, self.done = units, 0
        self.clips = self.rejects = 0
        self.start = self.said = time.monotonic()
        self.bar = tqdm(desc="encoding", unit="clip", dynamic_ncols=True) if sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, used: bool) -> None:
        """A clip was encoded, or something was rejected."""
        self.clips, self.rejects = self.clips + used, self.rejects + (not used)
        if self.bar is None:
            return
        if self.rejects:
            self.bar.set_postfix(rejected=self.rejects, refresh=False)
        self.bar.update(int(used))

    def end_of_unit(self) -> None:
        """A unit is written."""
        self.done += 1
        if self.bar is not None:
            self.bar.total = round(self.clips / self.done * self.units)
            self.bar.refresh()
            return
        now = time.monotonic()
        if self.done == self.units or now - self.said > INTERVAL:
            self.said = now
            print(self.line(now), flush=True)

    def line(self, now: float) -> str:
        """The state in words."""
        seconds = max(now - self.start, 1e-9)
        left = seconds / self.done * (self.units - self.done)
        rejected = f", {self.rejects} rejected" if self.rejects else ""
        rate = f"{self.clips / seconds:.1f} clips/s"
        return f"encoded {self.clips} clips{rejected}; unit {self.done} of {self.units}; {rate}; {_clock(left)} left"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
