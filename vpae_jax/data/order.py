"""The order of clips: which clips a batch contains depends only on its number and the seed.

Clips with latents of one shape form a bucket; all clips of a batch come from one bucket. Within a bucket, each source
is an endless stream of its clips, reshuffled in every epoch, so that every clip is seen exactly once per epoch.
Buckets, and the streams in them, alternate as evenly as their shares allow. Only the clips' indices are kept in memory,
and no library's random numbers are used, so that the order does not change with library versions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np
from jaxtyping import Int

ROUNDS = 8
# At most one in HELD_OUT_PART clips of a folder is held out; HELD_OUT_KEY selects the permutation. Both must never
# change.
HELD_OUT_PART, HELD_OUT_KEY = 5, 1
_WORD = 2**64 - 1


def shuffled(index: int, count: int, *key: int) -> int:
    """Maps an index below `count` by the pseudo-random permutation given by the key.

    A Feistel network on the smallest even number of bits for `count`, applied until the result is below `count`.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask, salt = (1 << half) - 1, 0
    for number in key:
        salt = _mixed(salt ^ (number & _WORD))
    while True:
        left, right = index >> half, index & mask
        for number in range(ROUNDS):
            left, right = right, left ^ (_mixed(salt + number + (right << 8)) & mask)
        index = left << half | right
        if index < count:
            return index


def held_out(clips: int, most: int) -> Int[np.ndarray, "n"]:
    """Returns which clips of a folder are held out from training, in a shuffled order.

    The result depends only on the number of clips, so it is the same in every process and every phase, whatever the
    seed and the batches. The result for a smaller `most` is a prefix of that for a larger one.

    Args:
      clips: number of clips in the folder.
      most: maximum number of clips to hold out; never more than a fifth of the folder.
    """
    count = min(most, clips // HELD_OUT_PART)
    return np.array([shuffled(place, clips, HELD_OUT_KEY) for place in range(count)], np.int64)


def _mixed(word: int) -> int:
    """Mixes 64 bits with SplitMix64: each bit of the result depends on all bits of the argument."""
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _WORD
    return word ^ (word >> 31)


class Alternation:
    """An endless, evenly spread sequence of turns of several parties, in proportion to their shares.

    Args:
      shares: positive numbers.
    """

    def __init__(self, shares: Sequence[float]):
        exact = [Fraction(share) for share in shares]
        whole = lcm(*(share.denominator for share in exact))
        self._shares = [int(share * whole) for share in exact]

    def __getitem__(self, turn: int) -> tuple[int, int]:
        """Returns whose turn it is, and how many turns this party has had before."""
        rest, before, after = sum(self._shares), turn, turn + 1
        for party, share in enumerate(self._shares[:-1]):
            # Of the first n turns, ceil(n share / rest) are this party's; the others alternate in the remaining turns.
            others_before, others_after = before * (rest - share) // rest, after * (rest - share) // rest
            if others_before == others_after:
                return party, before - others_before
            rest, before, after = rest - share, others_before, others_after
        return len(self._shares) - 1, before


@dataclass(frozen=True)
class ClipStream:
    """A source's clips in a bucket.

    Attributes:
      source: number of the source.
      clips: indices within it.
      share: relative share of training clips that should come from these.
    """

    source: int
    clips: Int[np.ndarray, "n"]
    share: float


class Order:
    """The clips of every batch.

    Args:
      buckets: each a non-empty list of streams.
      batch_size: clips per batch.
      seed: determines the order.
    """

    def __init__(self, buckets: Sequence[Sequence[ClipStream]], batch_size: int, seed: int):
        self.batch_size = batch_size
        self._buckets = [tuple(parts) for parts in buckets]
        self._turns = Alternation([sum(part.share for part in parts) for parts in buckets])
        self._inner = [Alternation([part.share for part in parts]) for parts in buckets]
        self._seed = seed

    def candidates(self, batch: int, row: int) -> Iterator[tuple[int, int]]:
        """Yields the clip at a row of a batch, as source and index within it; then, endlessly, its possible
        replacements: the clips that follow it in its stream."""
        bucket, turn = self._turns[batch]
        inner, place = self._inner[bucket][turn * self.batch_size + row]
        part = self._buckets[bucket][inner]
        while True:
            epoch, index = divmod(place, len(part.clips))
            yield part.source, int(part.clips[shuffled(index, len(part.clips), self._seed, bucket, inner, epoch)])
            place += 1
