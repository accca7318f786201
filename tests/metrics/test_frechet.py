"""The Frechet distance, and intervals of numbers over clips."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from vpae_jax.metrics.distances import Kernels
from vpae_jax.metrics.frechet import frechet_distance
from vpae_jax.metrics.intervals import half, intervals


def test_against_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 5)), rng.normal(1, 2, size=(80, 5)) @ rng.normal(size=(5, 5))
    s, t = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)


def test_fewer_clips_than_features():
    """Where a root of the product of covariances is that of a singular matrix."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(6, 40))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(x, x + 3) == pytest.approx(9 * 40)
    assert frechet_distance(x, rng.normal(size=(6, 40))) > 40, "of one distribution, and far above 0"
    with pytest.raises(ValueError, match="sets of 1 and 6 vectors"):
        frechet_distance(x[:1], x)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng, held = np.random.default_rng(2), []
    for _ in range(200):
        clips = rng.normal(size=41)
        found = intervals({"mean": clips.mean()}, 41, lambda draw, x=clips: {"mean": x[half(41, draw)].mean()})
        held.append(found["mean"][0] < 0 < found["mean"][1])
    assert 0.9 < np.mean(held) < 0.99


def test_intervals_of_a_kernel_distance_are_about_its_own_scatter():
    rng = np.random.default_rng(3)
    values, widths = [], []
    for trial in range(60):
        x, y = rng.normal(0.5, 1, (40, 8)), rng.normal(size=(40, 8))
        values.append(Kernels.of(x, y).distance)
        if trial < 8:
            found = intervals(
                {"kvd": values[-1]},
                40,
                lambda draw, x=x, y=y: {"kvd": Kernels.of(x[half(40, draw)], y[half(40, draw)]).distance},
            )
            widths.append(np.ptp(found["kvd"]))
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(values), rel=0.5)


def test_halves_are_drawn_without_replacement():
    rows = half(9, np.random.default_rng(0))
    assert len(rows) == len({*rows.tolist()}) == 4 and rows.tolist() == sorted(rows)
    assert len(half(3, np.random.default_rng(0))) == 2


def test_a_bias_of_halves_is_taken_out():
    found = intervals({"a": 1.0}, 10, lambda draw: {"a": 5 + draw.normal()} if draw.random() < 0.9 else {})
    assert found["a"][0] == pytest.approx(-0.96, abs=0.5) and found["a"][1] == pytest.approx(2.96, abs=0.5)
    assert intervals({"a": 1.0}, 10, lambda draw: {}) == {}
