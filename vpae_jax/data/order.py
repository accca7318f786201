"""Which clips a batch is made of: a function of its number and the seed alone.

Clips of one shape of latents are a bucket; a batch takes all its clips from one. In a bucket each source is a stream of
its clips, shuffled anew in every epoch and endless, so that none is left out for ever and none is seen twice an epoch.
Buckets, and the streams in them, alternate as evenly as their shares allow. Nothing is kept in memory but the clips'
indices, and no library's random numbers are used, so that the order is the same under any version of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np
from jaxtyping import Int

ROUNDS = 8
# Of a folder's clips, at most one of so many is held out. The number of their permutation, too, is the same for ever.
HELD_OUT_PART, HELD_OUT_KEY = 5, 1
_WORD = 2**64 - 1


def shuffled(index: int, count: int, *key: int) -> int:
    """Where a place among `count` goes in the permutation that the key names.

    A Feistel network on the smallest even number of bits that holds `count`, applied until it lands among them.
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
    """Which of a folder's clips no training sees, in an order of their own.

    It follows from the number of clips alone, so that it is the same in every process and in every phase, whatever its
    seed and its batches. Those of a smaller `most` are the first of a larger one's.

    Args:
      clips: how many the folder has.
      most: how many are held out, but never more than a fifth of them.
    """
    count = min(most, clips // HELD_OUT_PART)
    return np.array([shuffled(place, clips, HELD_OUT_KEY) for place in range(count)], np.int64)


def _mixed(word: int) -> int:
    """SplitMix64: 64 bits, of which each depends on all of the given ones."""
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _WORD
    return word ^ (word >> 31)


class Alternation:
    """Endless turns of several parties, each in proportion to its share, spread evenly.

    Args:
      shares: positive numbers.
    """

    def __init__(self, shares: Sequence[float]):
        exact = [Fraction(share) for share in shares]
        whole = lcm(*(share.denominator for share in exact))
        self._shares = [int(share * whole) for share in exact]

    def __getitem__(self, turn: int) -> tuple[int, int]:
        """Whose turn it is, and how many turns that party had before."""
        rest, before, after = sum(self._shares), turn, turn + 1
        for party, share in enumerate(self._shares[:-1]):
            # Of the first n turns, ceil(n share / rest) are this party's; the others alternate in what remains.
            others_before, others_after = before * (rest - share) // rest, after * (rest - share) // rest
            if others_before == others_after:
                return party, before - others_before
            rest, before, after = rest - share, others_before, others_after
        return len(self._shares) - 1, before


@dataclass(frozen=True)
class ClipStream:
    """A source's clips in a bucket.

    Attributes:
      source: which source.
      clips: indices in it.
      share: how much of all training is meant to come from these clips.
    """

    source: int
    clips: Int[np.ndarray, "n"]
    share: float


class Order:
    """The clips of every batch.

    Args:
      buckets: each a list of parts; none is empty.
      batch_size: clips a batch.
      seed: decides the order.
    """

    def __init__(self, buckets: Sequence[Sequence[ClipStream]], batch_size: int, seed: int):
        self.batch_size = batch_size
        self._buckets = [tuple(parts) for parts in buckets]
        self._turns = Alternation([sum(part.share for part in parts) for parts in buckets])
        self._inner = [Alternation([part.share for part in parts]) for parts in buckets]
        self._seed = seed

    def candidates(self, batch: int, row: int) -> Iterator[tuple[int, int]]:
        """The clip at a place of a batch, as source and index in it; then those that stand in for it, one after the
        other, endlessly: the clips that follow it in its stream."""
        bucket, turn = self._turns[batch]
        inner, place = self._inner[bucket][turn * self.batch_size + row]
        part = self._buckets[bucket][inner]
        while True:
            epoch, index = divmod(place, len(part.clips))
            yield part.source, int(part.clips[shuffled(index, len(part.clips), self._seed, bucket, inner, epoch)])
            place += 1
