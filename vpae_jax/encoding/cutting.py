"""Decides where a video's clips begin, and where their shots end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

SLACK = 1.001e-3  # seconds: manifests round times to milliseconds, as many containers do


def clip_starts(
    seconds: float,
    length: float,
    start: float | None = None,
    end: float | None = None,
    cuts: Sequence[float] = (),
    stride: float | None = None,
    most: int = 1,
    last: float = 0.0,
    slack: float = SLACK,
) -> tuple[float, ...]:
    """Returns the start times of clips, none of which crosses a cut or leaves the selected part.

    Without a stride, a shot gives as many consecutive clips as fit, and the remaining time is divided equally before,
    between and after them. If that is more than `most`, clips spread over the whole video are chosen.

    Args:
      seconds: length of the video.
      length: seconds that a clip needs, from the beginning of its first frame to the beginning of its last.
      start, end: the part to use, in seconds.
      cuts: times of shot cuts in seconds; those outside the part are ignored.
      stride: seconds between start times, counted from the beginning of each shot.
      most: maximum number of clips per video.
      last: seconds for which the last frame is shown. A shot may end during that time, but no other clip may begin.
      slack: seconds by which a shot may be too short.

    Returns:
      Times in seconds, ascending; empty if no shot is long enough for a clip.
    """
    first, final = max(start or 0.0, 0.0), min(seconds if end is None else end, seconds)
    bounds = [first, *sorted({cut for cut in cuts if first < cut < final}), final]
    shots = [_in_shot(finish - begin, length, last, stride, slack) for begin, finish in pairwise(bounds)]
    # Clips are counted, not listed: a file that claims to last for years would have too many.
    total = sum(number for number, _, _ in shots)
    places = range(total) if total <= most else ((2 * i + 1) * total // (2 * most) for i in range(most))
    return tuple(round(time, 6) for time in _times(places, bounds, shots))


def shot_end(start: float, end: float | None, cuts: Sequence[float]) -> float:
    """Returns the end of the shot in which a clip begins at `start`, according to `end` and `cuts`; else infinity."""
    return min((time for time in (*cuts, *(() if end is None else (end,))) if time > start + SLACK), default=math.inf)


def _times(
    places: Iterator[int] | range, bounds: Sequence[float], shots: Sequence[tuple[int, float, float]]
) -> Iterator[float]:
    """Yields the start times of the clips with the given indices, which must ascend."""
    shot, before = 0, 0
    for place in places:
        while place - before >= shots[shot][0]:
            before += shots[shot][0]
            shot += 1
        _, gap, period = shots[shot]
        yield bounds[shot] + gap + (place - before) * period


def _in_shot(room: float, length: float, last: float, stride: float | None, slack: float) -> tuple[int, float, float]:
    """Returns the number of clips in a shot, the time from its beginning to the first clip, and the time from one clip
    to the next."""
    spare = room - length
    if room <= 0 or spare < -slack:
        return 0, 0.0, 0.0
    if stride is not None:
        return int((spare + slack) / stride) + 1, 0.0, stride
    number = int((spare + slack) / (length + last)) + 1
    gap = max(spare - (number - 1) * (length + last), 0.0) / (number + 1)
    return number, gap, length + last + gap
