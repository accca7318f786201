"""What is measured of clips, and which are not used."""

import numpy as np
import pytest
from video_files import numbered

from vpae_jax.encoding.filters import Filters
from vpae_jax.encoding.frame_statistics import measure, small_grey
from vpae_jax.types import UserError


def flat(value, t=9, height=96, width=128):
    return np.full((t, height, width, 3), value, np.uint8)


def test_measures_of_flat_clips():
    found = measure(flat(100))
    assert found == {"motion": 0.0, "brightness": 100.0, "contrast": 0.0, "black": 0.0}
    assert measure(flat(3))["black"] == 1.0
    half = np.concatenate([flat(0, 4), flat(100, 4)])
    assert measure(half)["black"] == 0.5 and measure(half)["motion"] == pytest.approx(100 / 7, abs=1e-3)
    assert "motion" not in measure(flat(100, t=1))


def test_motion_of_a_known_change():
    """Half of the pixels change by 30 from frame to frame; each colour counts by a third."""
    video = flat(100)
    video[1::2, :, :64] = 130
    assert measure(video)["motion"] == pytest.approx(15.0, abs=0.2)
    red = flat(100)
    red[1::2, ..., 0] = 130
    assert measure(red)["motion"] == pytest.approx(10.0, abs=0.01)


@pytest.mark.parametrize("size", [(480, 832), (96, 128), (17, 23), (1, 1), (16, 4000), (2, 3)])
def test_grey_copies_are_small_and_true(size):
    video = np.random.default_rng(0).integers(0, 256, (3, *size, 3), np.uint8)
    video[1] = 77
    grey = small_grey(video)
    assert min(grey.shape[1:]) <= 120 and grey[1] == pytest.approx(77.0)


def test_noise_is_no_motion():
    """Noise of compression passes as little motion; a pan as much."""
    rng = np.random.default_rng(0)
    still = np.repeat(numbered(86, 480, 832)[-1:], 9, 0)
    noisy = (still.astype(int) + rng.integers(-1, 2, still.shape)).clip(0, 255).astype(np.uint8)
    pan = np.stack([np.roll(still[0], 8 * i, axis=1) for i in range(9)])
    assert measure(still)["motion"] == 0.0
    assert measure(noisy)["motion"] < 0.5
    assert measure(pan)["motion"] > 2


@pytest.mark.parametrize(
    "filters, refused, passed, kind, reason",
    [
        (
            Filters(min_motion=2.0),
            {"motion": 1.9},
            {"motion": 2.0},
            "static",
            "motion is 1.900, expected at least 2",
        ),
        (
            Filters(max_black=0.25),
            {"black": 0.26},
            {"black": 0.25},
            "black",
            "26.0% of the frames are black, allowed 25%",
        ),
        (Filters(), {"motion": 0.0}, {"motion": 0.1}, "static", "at least 0.1"),
    ],
)
def test_clips(filters, refused, passed, kind, reason):
    usual = {"motion": 5.0, "brightness": 100.0, "contrast": 50.0, "black": 0.0}
    assert filters.clip({**usual, **passed}) is None
    found = filters.clip({**usual, **refused})
    assert found and found[0] == kind and reason in found[1]


def test_a_single_frame_has_no_motion_to_be_refused_for():
    assert Filters(min_motion=200.0).clip(measure(flat(100, t=1))) is None
    assert Filters(min_motion=200.0).clip(measure(flat(100, t=2))) == (
        "static",
        "motion is 0.000, expected at least 200 (--min_motion)",
    )


def test_videos():
    filters = Filters(min_seconds=3.0, min_side=256, max_crop=0.5)
    bucket = (480, 832)
    assert filters.video(3.0, 256, 512, bucket) is None
    assert filters.video(2.9, 256, 512, bucket) == ("too short", "lasts 2.90 s, expected at least 3 s (--min_seconds)")
    assert filters.video(3.0, 255, 512, bucket) == (
        "too small",
        "is 512x255; the shorter side must have at least 256 pixels (--min_side)",
    )
    kind, reason = filters.video(3.0, 1920, 1080, bucket) or ("", "")
    assert kind == "shape" and "is 1080x1920; cropping to 832x480 loses 67.5%" in reason
    assert Filters().video(3.0, 1920, 1080, bucket) is None


def test_captions():
    filters = Filters(min_caption=3, max_caption=5)
    assert filters.caption("abc") is None and filters.caption("abcde") is None
    assert filters.caption(" ab \n") == ("caption", "caption has 2 characters, expected at least 3 (--min_caption)")
    assert filters.caption("abcdef") == ("caption", "caption has 6 characters, expected at most 5 (--max_caption)")
    assert Filters().caption("  ") and not Filters(min_caption=0).caption("")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_black": 1.5}, "max_black is 1.5; expected a fraction"),
        ({"min_motion": float("nan")}, "min_motion is nan"),
        ({"min_side": -1}, "min_side is -1"),
        ({"min_caption": 5, "max_caption": 4}, "max_caption is 4; expected at least min_caption, 5"),
    ],
)
def test_bad_bounds_are_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        Filters(**settings)
