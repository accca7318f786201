"""Where clips begin, and the sizes they are brought to."""

from itertools import pairwise

import numpy as np
import pytest

from vpae_jax.encoding.buckets import FAMILIES, choose, parse
from vpae_jax.encoding.cutting import clip_starts
from vpae_jax.types import UserError


def test_one_clip_is_taken_from_the_middle():
    assert clip_starts(7.0, 5.0) == (1.0,)
    assert clip_starts(5.0, 5.0) == (0.0,)
    assert clip_starts(4.9, 5.0) == ()
    (start,) = clip_starts(600.0, 5.0)
    assert 290 < start < 310


def test_many_clips_are_spread_and_do_not_overlap():
    starts = clip_starts(600.0, 5.0625, most=7)
    gaps = np.diff(starts)
    assert len(starts) == 7 and gaps.min() > 80 and gaps.max() < 90
    assert clip_starts(11.0, 5.0, most=9) == pytest.approx((1 / 3, 5 + 2 / 3))


def test_a_stride_counts_from_the_beginning():
    assert clip_starts(10.0, 4.0, stride=2.0, most=9) == (0.0, 2.0, 4.0, 6.0)
    assert clip_starts(10.0, 4.0, start=1.5, end=8.0, stride=2.0, most=9) == (1.5, 3.5)
    assert clip_starts(10.0, 4.0, stride=100.0, most=9) == (0.0,)


def test_the_part_that_is_meant_is_not_left():
    assert clip_starts(100.0, 5.0, start=20.0, end=26.0) == (20.5,)
    assert clip_starts(100.0, 5.0, start=97.0) == ()
    assert clip_starts(100.0, 5.0, start=97.0, end=400.0) == ()
    assert clip_starts(100.0, 5.0, start=20.0, end=10.0) == ()
    assert clip_starts(100.0, 5.0, start=-5.0, end=5.0) == (0.0,)
    # Manifests round their times.
    assert clip_starts(4.9995, 5.0) == (0.0,)


def test_random_videos_keep_all_promises():
    rng = np.random.default_rng(0)
    for _ in range(500):
        seconds, length = rng.uniform(0, 60), rng.uniform(0.1, 8)
        cuts = tuple(rng.uniform(-5, 65, rng.integers(0, 6)))
        start = float(rng.uniform(0, 30)) if rng.random() < 0.5 else None
        end = float(rng.uniform(0, 60)) if rng.random() < 0.5 else None
        stride = float(rng.uniform(0.2, 9)) if rng.random() < 0.5 else None
        most = int(rng.integers(1, 9))
        starts = clip_starts(seconds, length, start, end, cuts, stride, most)
        assert starts == clip_starts(seconds, length, start, end, cuts, stride, most)
        assert len(starts) <= most and list(starts) == sorted(set(starts))
        for begin in starts:
            assert begin >= (start or 0) - 2e-3 and begin + length <= min(seconds, end or seconds) + 2e-3
            assert not any(begin + 2e-3 < cut < begin + length - 2e-3 for cut in cuts)
        if stride is None:
            assert all(b - a >= length - 2e-3 for a, b in pairwise(starts))
        first, last = start or 0.0, min(seconds, seconds if end is None else end)
        bounds = [first, *sorted(c for c in cuts if first < c < last), last]
        room = any(b - a >= length for a, b in pairwise(bounds))
        assert bool(starts) or not room


@pytest.mark.parametrize("family, area", [("480p", 480 * 832), ("720p", 720 * 1280)])
def test_families_have_one_area(family, area):
    sizes = parse(family)
    assert len(sizes) == 5 and {(w, h) for h, w in sizes} == set(sizes)
    for height, width in sizes:
        assert height % 16 == width % 16 == 0 and abs(height * width / area - 1) < 0.04


def test_sizes_can_be_listed():
    assert parse("480x832, 832x480") == ((480, 832), (832, 480))
    assert parse("48x64", multiple=8) == ((48, 64),)


@pytest.mark.parametrize(
    "text, message",
    [
        ("481x832", "bucket 481x832: sides must be multiples of 16; the nearest is 480x832"),
        ("0x64", "nearest is 16x64"),
        ("360p", "expected 480p, 720p, or HEIGHTxWIDTH"),
        ("", "expected 480p"),
        ("480x832,", "expected 480p"),
        ("480x832,480x832", "listed twice"),
        ("-480x832", "expected 480p"),
    ],
)
def test_bad_lists_are_one_line(text, message):
    with pytest.raises(UserError, match=message) as error:
        parse(text)
    assert "\n" not in str(error.value)


def test_the_nearest_aspect_ratio_is_chosen():
    sizes = FAMILIES["480p"]
    assert choose(sizes, 1080, 1920) == (480, 832)
    assert choose(sizes, 1920, 1080) == (832, 480)
    assert choose(sizes, 480, 640) == (544, 736)
    assert choose(sizes, 17, 16) == (640, 640)
    assert choose(sizes, 16, 4000) == (480, 832)
    # Half way as a factor between 1 and 4 is 2, not 2.5.
    assert choose(((64, 64), (64, 256)), 100, 199) == (64, 64)
    assert choose(((64, 64), (64, 256)), 100, 201) == (64, 256)
