"""The kernel distance: zero between equals, and larger the worse the clips."""

import numpy as np
import pytest
from moving_patterns import patterns
from scipy.ndimage import gaussian_filter

from vpae_jax.metrics.distances import SCALE, FeatureScale, Kernels, features
from vpae_jax.tasks.digits.clips import MovingDigits

COUNT = 100


def clips(seed, count=COUNT):
    source = MovingDigits("eval", count, seed)
    return np.stack([source[i]["video"] for i in range(count)])


def blur(videos, sigma):
    return np.clip(np.rint(gaussian_filter(videos.astype(np.float32), (0, 0, sigma, sigma, 0))), 0, 255).astype(
        np.uint8
    )


@pytest.fixture(scope="module")
def real():
    return clips(1)


@pytest.fixture(scope="module")
def distance():
    raw = features(clips(2, 200))
    scale = FeatureScale.of(raw)
    reference = scale(raw)
    return lambda videos: Kernels.of(scale(features(videos)), reference).distance


def test_worse_clips_are_farther(real, distance):
    rng = np.random.default_rng(0)
    frozen = np.repeat(real[:, :1], real.shape[1], 1)
    shuffled = np.stack([video[rng.permutation(len(video))] for video in real])
    scores = {
        "real": distance(real),
        "slightly blurred": distance(blur(real, 0.6)),
        "blurred": distance(blur(real, 1.2)),
        "very blurred": distance(blur(real, 2.4)),
        "shuffled": distance(shuffled),
        "frozen": distance(frozen),
        "few": distance(np.tile(real[:20], (COUNT // 20, 1, 1, 1, 1))),
        "mixed": distance(((real.astype(int) + np.roll(real, 1, 0)) // 2).astype(np.uint8)),
        "noisy": distance(np.clip(real + rng.normal(0, 16, real.shape), 0, 255).astype(np.uint8)),
    }
    assert scores["real"] < 12
    assert scores["slightly blurred"] > 5 * max(scores["real"], 5)
    assert scores["blurred"] > 2 * scores["slightly blurred"]
    assert scores["very blurred"] > scores["blurred"]
    for name in ("shuffled", "few", "mixed", "noisy"):
        assert scores[name] > 4 * max(scores["real"], 5), (name, scores)
    assert scores["frozen"] > 10 * max(scores["shuffled"], 5)


def test_unbiased_between_sets_of_one_distribution():
    rng = np.random.default_rng(0)
    draws = [Kernels.of(rng.normal(size=(30, 20)), rng.normal(size=(50, 20))).distance for _ in range(400)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / np.sqrt(len(draws))
    assert min(draws) < 0


def test_against_its_definition():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(4, 3)), rng.normal(1, 1, size=(5, 3))

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    within_x = np.mean([kernel(x[i], x[j]) for i in range(4) for j in range(4) if i != j])
    within_y = np.mean([kernel(y[i], y[j]) for i in range(5) for j in range(5) if i != j])
    across = np.mean([kernel(a, b) for a in x for b in y])
    np.testing.assert_allclose(Kernels.of(x, y).distance, SCALE * (within_x + within_y - 2 * across), rtol=1e-10)


def test_features_do_not_depend_on_the_batch(real):
    np.testing.assert_allclose(features(real[:5]), features(real[:7], batch=3)[:5], rtol=1e-4, atol=1e-5)


def test_a_constant_feature_does_not_blow_up():
    values = np.random.default_rng(0).normal(size=(50, 4))
    values[:, 2] = 1.0
    scale = FeatureScale.of(values)
    assert np.isfinite(scale(values)).all()
    assert np.abs(scale(values + 100)).max() <= 3.0


def test_moving_clips_are_far_from_real_ones_that_all_stand_still():
    """Two thirds of these have no spread at all, since nothing brightens or darkens."""
    moving = patterns(12, seed=1)
    still = [features(np.repeat(part[:, :1], part.shape[1], 1)) for part in (moving, patterns(12, seed=2))]
    scale = FeatureScale.of(still[0])
    floor, apart = (Kernels.of(scale(one), scale(still[0])).distance for one in (still[1], features(moving)))
    assert np.isfinite([floor, apart]).all() and apart > 10 * max(abs(floor), 20)


@pytest.mark.parametrize(
    "frames, height, width",
    [(9, 48, 48), (5, 48, 84), (17, 60, 104), pytest.param(81, 480, 832, marks=pytest.mark.long)],
)
def test_features_of_any_size_are_as_many_whatever_the_size(frames, height, width):
    moving = patterns(1, frames=frames, height=height, width=width)
    found = features(moving)
    assert found.shape[0] == 1 and np.isfinite(found).all()
    few = min(frames, 17)
    assert found.shape[1] == 3 * 8 * 27 + 2 * few
