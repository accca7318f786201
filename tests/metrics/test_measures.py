"""Measures of clips of any content, on clips whose answer is known."""

import numpy as np
import pytest
from moving_patterns import blurred, fading, frozen, noisy, patterns

from vpae_jax.metrics import latents, measures
from vpae_jax.metrics.latents import Channels


@pytest.fixture(scope="module")
def clips():
    return patterns(6)


def test_large_clips_are_reduced_to_block_means_of_every_nth_frame():
    rng = np.random.default_rng(0)
    large = rng.integers(0, 255, (1, 81, 100, 146, 3), np.uint8)
    small = measures.reduced(large)
    assert small.shape == (1, 17, 50, 73, 3)
    np.testing.assert_allclose(small[0, 2, 3, 4], large[0, 10, 6:8, 8:10].mean((0, 1)), atol=0.5)
    assert measures.reduced(large[:, :, :97, :97]).shape == (1, 17, 48, 48, 3), "what fills no block is cut off"
    tiny = large[:, :9, :48, :60]
    assert measures.reduced(tiny) is tiny or np.array_equal(measures.reduced(tiny), tiny)


def test_blur_lowers_sharpness_and_noise_raises_it(clips):
    sharp = measures.sharpness(clips)
    assert np.all(measures.sharpness(blurred(clips)) < 0.7 * sharp)
    assert np.all(measures.sharpness(noisy(clips)) > 1.5 * sharp)
    assert measures.sharpness(np.zeros((1, 9, 32, 32, 3), np.uint8))[0] == 0


def test_color_drift_sees_one_channel(clips):
    even = np.full((1, 9, 8, 8, 3), 100, np.uint8)
    assert measures.color_drift(even)[0] == 0
    even[0, -1, ..., 2] = 151
    np.testing.assert_allclose(measures.color_drift(even)[0], 51 / 100)
    assert measures.color_drift(fading(clips)).min() > 0.2 > 2 * measures.color_drift(clips).max()


@pytest.mark.parametrize("speed", [0.25, 0.5, 1.0])
def test_speed_is_that_of_what_moves_along_its_edges(speed):
    phase = np.arange(64)[None, :] - speed * np.arange(9)[:, None]
    wave = 128 + 90 * np.sin(2 * np.pi * phase / 16)
    clip = np.rint(np.broadcast_to(wave[:, None, :, None], (9, 48, 64, 3))).astype(np.uint8)
    assert measures.speed(clip[None])[0] == pytest.approx(speed, rel=0.06)
    faint = np.rint(96 + clip / 4).astype(np.uint8)
    assert measures.speed(faint[None])[0] == pytest.approx(speed, rel=0.2), "whatever the contrast"


def test_what_stands_still_has_neither_speed_nor_change(clips):
    assert measures.speed(frozen(clips)).max() == measures.change(frozen(clips)).max() == 0
    assert measures.speed(clips).min() > 0.2 and measures.change(clips).min() > 1
    slow = clips[:, [0, 0, 1, 1, 2, 2, 3, 3, 4]]
    assert np.all(measures.speed(slow) < 0.8 * measures.speed(clips))


def test_psnr():
    black = np.zeros((1, 8, 8, 3), np.uint8)
    assert measures.psnr(black, black)[0] == 60
    np.testing.assert_allclose(measures.psnr(black, black + 255)[0], 0)
    np.testing.assert_allclose(measures.psnr(black, black + 25)[0], 20 * np.log10(255 / 25))


def test_difference_of_clips():
    black = np.zeros((2, 3, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(measures.difference(black, black + 51), [51, 51])


def test_statistics_of_latent_channels():
    rng = np.random.default_rng(0)
    scale, offset = np.array([1.0, 2.0, 0.5]), np.array([0.0, 1.0, -1.0])
    real = rng.standard_normal((40, 2, 4, 4, 3)) * scale + offset
    found = Channels.of(latents.moments(real))
    np.testing.assert_allclose(found.mean, offset, atol=0.1)
    np.testing.assert_allclose(found.std, scale, rtol=0.05)
    moved = Channels.of(latents.moments(real + 0.5 * scale))
    assert latents.shift(moved, found) == pytest.approx(0.5, rel=0.05)
    assert latents.spread(moved, found) == pytest.approx(1)
    weak = Channels.of(latents.moments(0.7 * (real - offset) + offset))
    assert latents.spread(weak, found) == pytest.approx(0.7, rel=0.02)
    assert latents.shift(weak, found) < 0.05
