"""Measures of single clips, on clips whose answer is known."""

import numpy as np
import pytest

from vpae_jax.tasks.digits import measures
from vpae_jax.tasks.digits.clips import unit


def dot(row, column, value=255, side=32, frames=9):
    """A clip of one square whose centre is given in every frame."""
    clip = np.zeros((frames, side, side, 3), np.uint8)
    for t in range(frames):
        r, c = int(row[t]), int(column[t])
        clip[t, r - 1 : r + 2, c - 1 : c + 2] = value
    return clip


def moving(direction, speed):
    down, right = unit(direction)
    steps = np.arange(9) * speed
    return dot(np.rint(16 + down * steps), np.rint(16 + right * steps))


def test_centroids_follow_a_square():
    row, column = np.arange(5, 14), np.full(9, 20)
    centre = measures.centroids(dot(row, column)[None])[0]
    np.testing.assert_allclose(centre, np.stack([row, column], 1))


def test_faint_noise_does_not_move_the_centroid():
    clip = dot(np.full(9, 6), np.full(9, 6)).astype(int)
    noise = np.random.default_rng(0).integers(0, 30, clip.shape)
    noisy = np.clip(clip + noise, 0, 255).astype(np.uint8)
    np.testing.assert_allclose(measures.centroids(noisy[None])[0, :, 0], 6, atol=0.1)


def test_an_empty_clip_has_a_middle_and_no_direction():
    empty = np.zeros((1, 9, 32, 32, 3), np.uint8)
    assert np.all(measures.centroids(empty) == 15.5)
    assert measures.directions(empty)[0] == -1


@pytest.mark.parametrize("direction", range(8))
def test_directions(direction):
    clips = moving(direction, 1.5)[None]
    assert measures.directions(clips)[0] == direction
    np.testing.assert_allclose(measures.displacement(clips), 12, atol=1.0)


def test_motion_after_the_first_frames_does_not_count():
    row = np.array([10, 11, 12, 13, 14, 15, 16, 17, 18, 17, 16, 15, 14])
    clips = dot(row, np.full(13, 16), frames=13)[None]
    assert measures.directions(clips)[0] == 6
    assert measures.displacement(clips)[0] == pytest.approx(8)


def test_difference_is_over_the_ink():
    one, other = dot(np.full(9, 8), np.full(9, 8))[None], dot(np.full(9, 20), np.full(9, 20))[None]
    assert measures.difference(one, one)[0] == 0
    np.testing.assert_allclose(measures.difference(one, other)[0], 1)
    np.testing.assert_allclose(
        measures.difference(one, dot(np.full(9, 8), np.full(9, 8), 127)[None])[0], 128 / 255, 1e-5
    )
