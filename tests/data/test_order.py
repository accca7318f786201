"""Which clips a batch is made of."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from vpae_jax.data.order import Alternation, ClipStream, Order, shuffled


@pytest.mark.parametrize(
    "shares", [[1.0], [1.0, 1.0], [3.0, 1.0], [0.7, 0.2, 0.1], [812_345.0, 187_655.0], [1e-3, 1.0]]
)
def test_turns_are_in_proportion_at_any_time_and_count_each_party(shares):
    turns, counts = Alternation(shares), Counter()
    for turn in range(3000):
        party, before = turns[turn]
        assert before == counts[party]
        counts[party] += 1
        for other, share in enumerate(shares):
            assert abs(counts[other] - (turn + 1) * share / sum(shares)) < len(shares)
    assert turns[10**15][1] >= 10**11, "any turn is found at once"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 64, 300])
def test_shuffled_is_a_permutation_for_every_key(count):
    for key in range(6):
        assert sorted(shuffled(i, count, key, 5) for i in range(count)) == list(range(count))


def test_shuffled_sends_every_place_everywhere_equally_often():
    for count in (3, 10):
        for place in (0, count - 1):
            times = Counter(shuffled(place, count, 7, key) for key in range(600))
            chi = sum((times[i] - 600 / count) ** 2 / (600 / count) for i in range(count))
            assert chi < 30, "of 9 degrees of freedom at most"
    after = Counter((shuffled(0, 5, key), shuffled(1, 5, key)) for key in range(1500))
    assert len(after) == 20 and min(after.values()) > 45, "pairs too"
    assert shuffled(10**9, 10**12, 1) != shuffled(10**9, 10**12, 2)


def test_the_order_does_not_change_between_versions():
    assert [shuffled(i, 10, 0, 0, 0, 0) for i in range(10)] == [6, 3, 2, 8, 5, 7, 9, 1, 0, 4]


def clips_of(order, batches, size):
    return [[next(order.candidates(batch, row)) for row in range(size)] for batch in batches]


def test_a_batch_is_of_one_bucket_and_an_epoch_has_every_clip_once():
    parts = [[ClipStream(0, np.arange(0, 14, 2), 7.0)], [ClipStream(0, np.arange(1, 7, 2), 3.0)]]
    order = Order(parts, 5, seed=0)
    batches = clips_of(order, range(140), 5)
    by_bucket = {0: [], 1: []}
    for batch in batches:
        (bucket,) = {clip % 2 for _, clip in batch}
        by_bucket[bucket] += [clip for _, clip in batch]
    assert (len(by_bucket[0]), len(by_bucket[1])) == (98 * 5, 42 * 5), "as many as their clips make of it"
    for bucket, clips in enumerate((range(0, 14, 2), range(1, 7, 2))):
        seen = by_bucket[bucket]
        epochs = [seen[i : i + len(clips)] for i in range(0, len(seen), len(clips))]
        assert all(sorted(epoch) == list(clips) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 2, "shuffled anew"


def test_sources_are_mixed_by_their_shares_in_every_bucket():
    order = Order([[ClipStream(0, np.arange(100), 0.75), ClipStream(1, np.arange(4), 0.25)]], 8, seed=3)
    clips = [clip for batch in clips_of(order, range(100), 8) for clip in batch]
    assert Counter(source for source, _ in clips) == {0: 600, 1: 200}
    assert Counter(clip for source, clip in clips if source == 0) == dict.fromkeys(range(100), 6)
    assert Counter(clip for source, clip in clips if source == 1) == dict.fromkeys(range(4), 50)


def test_the_seed_decides():
    parts = [[ClipStream(0, np.arange(50), 1.0)], [ClipStream(0, np.arange(50), 1.0)]]
    one, two, other = (clips_of(Order(parts, 5, seed), range(10), 5) for seed in (0, 0, 1))
    assert one == two != other
    assert one[0::2] != one[1::2], "two buckets of one size have orders of their own"
    first = Order(parts[:1], 5, 0)
    assert clips_of(first, range(10, 20), 5) != clips_of(Order(parts[:1], 5, 2**32 - 1), range(10, 20), 5)


def test_who_stands_in_is_another_clip_of_the_same_stream():
    order = Order([[ClipStream(0, np.array([3, 5, 8]), 1.0), ClipStream(1, np.array([1]), 1.0)]], 2, seed=0)
    for batch in range(5):
        for row in range(2):
            found = list(islice(order.candidates(batch, row), 7))
            assert len({source for source, _ in found}) == 1
            assert {clip for _, clip in found} == ({3, 5, 8} if found[0][0] == 0 else {1})
