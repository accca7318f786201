"""Moving digits: splits by image, determinism, and clips that do what their captions say."""

import numpy as np
import pytest

from vpae_jax.tasks.digits.clips import (
    DIGITS,
    DIRECTIONS,
    FREE_FRAMES,
    IMAGES_PER_CLASS,
    SPEED,
    SPLITS,
    MovingDigits,
    caption,
    captions,
    digit_images,
    unit,
)
from vpae_jax.types import UserError

COUNT = 150


@pytest.fixture(scope="module")
def source():
    return MovingDigits("eval", size=COUNT, seed=3)


@pytest.fixture(scope="module")
def clips(source):
    return [source[i] for i in range(COUNT)]


def centroids(clips):
    ink = np.stack([clip["video"][..., 0] for clip in clips]).astype(np.float64)
    grid = np.arange(ink.shape[-1])
    total = ink.sum((2, 3))
    return np.stack([(ink * grid[:, None]).sum((2, 3)) / total, (ink * grid).sum((2, 3)) / total], -1)


def test_splits_share_no_image_and_are_balanced():
    seen = set()
    for split in SPLITS:
        images, labels = digit_images(split)
        assert np.array_equal(np.bincount(labels), [IMAGES_PER_CLASS[split]] * 10)
        names = {image.tobytes() for image in images}
        assert len(names) == len(images), "an image appears twice"
        assert not names & seen, f"{split} shares an image with another split"
        seen |= names
    assert len(seen) == 5000


def test_items_depend_on_seed_split_and_index_only(source, clips):
    again = MovingDigits("eval", size=COUNT + 50, seed=3)
    for index in (0, 7, COUNT - 1):
        assert np.array_equal(again[index]["video"], clips[index]["video"])
        assert {k: v for k, v in again[index].items() if k != "video"} == {
            k: v for k, v in clips[index].items() if k != "video"
        }
    assert not np.array_equal(MovingDigits("eval", COUNT, seed=4)[0]["video"], clips[0]["video"])
    assert not np.array_equal(clips[0]["video"], clips[1]["video"])
    assert len({clip["id"] for clip in clips}) == COUNT
    with pytest.raises(IndexError, match="of 150"):
        source[COUNT]


def test_form(clips):
    for clip in clips[:20]:
        assert clip["video"].shape == (9, 48, 48, 3)
        assert clip["video"].dtype == np.uint8
        assert clip["video"].max() > 150, "a digit is nearly white"
        assert np.array_equal(clip["video"][..., 0], clip["video"][..., 2]), "the digits are grey"
        assert DIGITS[clip["digit"]] in clip["caption"].split()
        assert clip["caption"].endswith(DIRECTIONS[clip["direction"]])


def test_digits_stay_whole(clips):
    video = np.stack([clip["video"] for clip in clips])
    border = max(video[:, :, [0, -1]].max(), video[:, :, :, [0, -1]].max())
    assert border < 32, "only the faint rim of a stroke may touch the border"
    ink = video[..., 0].astype(np.float64).sum((2, 3))
    assert np.all(np.abs(ink / ink[:, :1] - 1) < 0.05), "ink neither leaves nor enters"


def test_motion_is_even_and_follows_the_caption(clips):
    steps = np.diff(centroids(clips), axis=1)
    for clip, step in zip(clips, steps, strict=True):
        speed = np.linalg.norm(step.mean(0))
        assert SPEED[0] - 0.05 < speed < SPEED[1] + 0.05
        assert np.abs(step - step.mean(0)).max() < 0.15, "drawn at fractions of a pixel"
        assert step.mean(0) @ unit(clip["direction"]) / speed > 0.995


def test_speeds_directions_and_digits_are_spread(clips):
    centre = centroids(clips)
    speed = np.linalg.norm(centre[:, -1] - centre[:, 0], axis=-1) / 8
    assert np.quantile(speed, 0.95) / np.quantile(speed, 0.05) > 2
    assert len({clip["direction"] for clip in clips}) == 8
    assert len({clip["digit"] for clip in clips}) == 10


def test_long_clips_bounce_and_stay_whole():
    source = MovingDigits("eval", size=40, frames=25)
    clips = [source[i] for i in range(40)]
    test_digits_stay_whole(clips)
    centre = centroids(clips)
    ways = np.array([unit(clip["direction"]) for clip in clips])
    along = (np.diff(centre, axis=1) * ways[:, None]).sum(-1)
    assert np.all(along[:, : FREE_FRAMES - 1] > 0.5)
    assert np.mean(along.min(1) < 0) > 0.3


def test_resolution_and_frames_scale():
    small = MovingDigits("train", size=2, resolution=24, frames=5)[1]["video"]
    assert small.shape == (5, 24, 24, 3)
    large = MovingDigits("train", size=2, resolution=96, frames=17)[1]["video"]
    assert large.shape == (17, 96, 96, 3)
    assert 8 < (large[0] > 127).sum() / (small[0] > 127).sum() < 32, "about 16 times the area"


def test_captions():
    assert caption(3, 3, 0) == "a three moves up and to the left"
    assert caption(3, 0, 1) == "the digit three is moving right"
    assert caption(8, 6, 0) == "an eight moves down"
    assert caption(8, 6, 2) == "a handwritten eight moving down"
    assert len(set(captions())) == 240


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"size": 1, "frames": 4}, "frames=4"),
        ({"size": 1, "resolution": 8}, "resolution=8"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(UserError, match=message):
        MovingDigits("eval", **options)
