"""Batch iterators: right values, the same for a seed, and exact continuation from a saved position."""

import json

import jax
import numpy as np
import pytest
from absl import flags

from vpae_jax.data.batches import to_float
from vpae_jax.inference.tokenizer import tokenize
from vpae_jax.tasks.digits.batches import captioned_batches, pixel_batches
from vpae_jax.tasks.digits.clips import MovingDigits
from vpae_jax.tasks.digits.words import build_tokenizer
from vpae_jax.types import CaptionedFrames, PixelBatch, UserError


@pytest.fixture(scope="module")
def source():
    return MovingDigits("train", size=10, frames=5, resolution=24)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_to_float_covers_the_range():
    values = to_float(np.array([0, 255], np.uint8))
    assert values.dtype == np.float32
    assert np.array_equal(values, [-1, 1])


def test_pixel_batches_hold_every_clip_once_an_epoch(source):
    batches = pixel_batches(source, batch_size=5, seed=0)
    first, second = next(batches), next(batches)
    assert isinstance(first, PixelBatch)
    seen = np.concatenate([first.video, second.video])
    expected = np.stack([to_float(source[i]["video"]) for i in range(10)])
    order = [int(np.flatnonzero([np.array_equal(a, b) for b in expected])[0]) for a in seen]
    assert sorted(order) == list(range(10))
    assert order != list(range(10)), "shuffled"
    again = np.concatenate([next(batches).video, next(batches).video])
    assert not np.array_equal(again, seen), "shuffled anew in the next epoch"


def test_captioned_batches_pair_frames_with_their_captions(source, tokenizer):
    batch = next(captioned_batches(source, tokenizer, batch_size=4, seed=1))
    assert isinstance(batch, CaptionedFrames)
    clips = [source[i] for i in range(10)]
    for row in range(4):
        (clip,) = [c for c in clips if np.array_equal(to_float(c["video"][0]), batch.first[row])]
        assert np.array_equal(to_float(clip["video"][-1]), batch.last[row])
        ids, mask = tokenize(tokenizer, [clip["caption"]])
        assert np.array_equal(ids[0], batch.ids[row])
        assert np.array_equal(mask[0], batch.mask[row])


def test_seed_decides_and_a_saved_position_continues_exactly(source):
    batches = pixel_batches(source, batch_size=3, seed=0)
    for _ in range(5):
        next(batches)
    position = json.loads(json.dumps(batches.get_state()))
    ahead = [next(batches).video for _ in range(4)]
    other = pixel_batches(source, batch_size=3, seed=0)
    next(other)
    other.set_state(position)
    for expected in ahead:
        assert np.array_equal(next(other).video, expected)
    assert not np.array_equal(
        next(pixel_batches(source, 3, seed=0)).video, next(pixel_batches(source, 3, seed=1)).video
    )


def test_workers_prepare_the_same_batches(source, tokenizer):
    flags.FLAGS.mark_as_parsed()  # as programs do; grain asks for it before it starts processes
    here, there = (captioned_batches(source, tokenizer, batch_size=3, seed=4, workers=n) for n in (0, 1))
    for _ in range(3):
        pairs = zip(jax.tree.leaves(next(here)), jax.tree.leaves(next(there)), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
    there.close()


def test_a_batch_larger_than_the_data_is_refused(source):
    with pytest.raises(UserError, match=r"config\.batch_size is 11, but there are 10 clips"):
        pixel_batches(source, batch_size=11, seed=0)
