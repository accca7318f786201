"""Where a video's clips begin, and where their shots end."""

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
    """Times at which clips begin, none of which crosses a cut or leaves the part that is meant.

    Without a stride, a shot holds as many clips as fit one behind the other, with the rest of its time shared equally
    before, between and behind them. When that is more than `most`, clips are taken that are spread over the video.

    Args:
      seconds: the video's length.
      length: what a clip needs in seconds, from its first frame's beginning to its last one's.
      start, end: the part that is meant, in seconds.
      cuts: times of shot cuts in seconds; those outside the part are of no concern.
      stride: seconds between beginnings in a shot, from its beginning.
      most: how many clips a video gives at most.
      last: seconds for which the last frame is shown. A shot may end meanwhile, but no other clip begins.
      slack: seconds by which a shot may be too short.

    Returns:
      Times in seconds, ascending; none where no shot is as long as a clip.
    """
    first, final = max(start or 0.0, 0.0), min(seconds if end is None else end, seconds)
    bounds = [first, *sorted({cut for cut in cuts if first < cut < final}), final]
    shots = [_in_shot(finish - begin, length, last, stride, slack) for begin, finish in pairwise(bounds)]
    # They are counted, and not listed: a file that claims to last for years has too many.
    total = sum(number for number, _, _ in shots)
    places = range(total) if total <= most else ((2 * i + 1) * total // (2 * most) for i in range(most))
    return tuple(round(time, 6) for time in _times(places, bounds, shots))


def shot_end(start: float, end: float | None, cuts: Sequence[float]) -> float:
    """Where the shot ends in which a clip begins at `start`, as far as `end` and `cuts` say it; else infinity."""
    return min((time for time in (*cuts, *(() if end is None else (end,))) if time > start + SLACK), default=math.inf)


def _times(
    places: Iterator[int] | range, bounds: Sequence[float], shots: Sequence[tuple[int, float, float]]
) -> Iterator[float]:
    """When the clips at some places begin, which ascend."""
    shot, before = 0, 0
    for place in places:
        while place - before >= shots[shot][0]:
            before += shots[shot][0]
            shot += 1
        _, gap, period = shots[shot]
        yield bounds[shot] + gap + (place - before) * period


def _in_shot(room: float, length: float, last: float, stride: float | None, slack: float) -> tuple[int, float, float]:
    """How many clips a shot has, how long after its beginning the first one begins, and how long after that the next
    one does."""
    spare = room - length
    if room <= 0 or spare < -slack:
        return 0, 0.0, 0.0
    if stride is not None:
        return int((spare + slack) / stride) + 1, 0.0, stride
    number = int((spare + slack) / (length + last)) + 1
    gap = max(spare - (number - 1) * (length + last), 0.0) / (number + 1)
    return number, gap, length + last + gap
