"""Where a video's clips begin."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

SLACK = 1e-3  # seconds: how exactly manifests give times


def clip_starts(
    seconds: float,
    length: float,
    start: float | None = None,
    end: float | None = None,
    cuts: Sequence[float] = (),
    stride: float | None = None,
    most: int = 1,
) -> tuple[float, ...]:
    """Times at which clips begin, none of which crosses a cut or leaves the part that is meant.

    Without a stride, a shot holds as many clips as fit one behind the other, with the rest of its time shared equally
    before, between and behind them. When that is more than `most`, clips are taken that are spread over the video.

    Args:
      seconds: the video's length.
      length: a clip's length in seconds.
      start, end: the part that is meant, in seconds.
      cuts: times of shot cuts in seconds; those outside the part are of no concern.
      stride: seconds between beginnings in a shot, from its beginning.
      most: how many clips a video gives at most.

    Returns:
      Times in seconds, ascending; none where no shot is as long as a clip.
    """
    first, last = max(start or 0.0, 0.0), min(seconds if end is None else end, seconds)
    bounds = [first, *sorted({cut for cut in cuts if first < cut < last}), last]
    starts: list[float] = []
    for begin, finish in pairwise(bounds):
        starts.extend(_in_shot(begin, finish, length, stride))
    if len(starts) > most:
        # Of n, the middle ones of `most` equal parts.
        starts = [starts[(2 * i + 1) * len(starts) // (2 * most)] for i in range(most)]
    return tuple(round(time, 6) for time in starts)


def _in_shot(begin: float, finish: float, length: float, stride: float | None) -> list[float]:
    room = finish - begin
    if room < length - SLACK:
        return []
    if stride is not None:
        return [begin + i * stride for i in range(int((room - length + SLACK) / stride) + 1)]
    number = max(int((room + SLACK) / length), 1)
    gap = max(room - number * length, 0.0) / (number + 1)
    return [begin + gap + i * (length + gap) for i in range(number)]
