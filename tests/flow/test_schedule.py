"""The algebra of rectified flow, its time axes, and Gaussian oracles whose velocity is known in closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpae_jax.flow import schedule as S
from vpae_jax.flow.times import VALUES_720P
from vpae_jax.types import UserError

SHAPE = (3, 2, 4, 5, 6)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def point():
    """Random x0, eps and t in (.05, .95), and x_t between them."""
    keys = jax.random.split(jax.random.key(0), 3)
    x0, eps = (jax.random.normal(k, SHAPE) for k in keys[:2])
    t = jax.random.uniform(keys[2], SHAPE[:1], minval=0.05, maxval=0.95)
    return x0, eps, t, S.add_noise(x0, eps, t)


def assert_close(a, b, tol=1e-5):
    np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


def test_path_ends_at_data_and_noise(point):
    x0, eps, _, _ = point
    assert_close(S.add_noise(x0, eps, jnp.zeros(3)), x0, 0)
    assert_close(S.add_noise(x0, eps, jnp.ones(3)), eps, 0)


def test_every_conversion_recovers_the_truth(point):
    x0, eps, t, x = point
    score = -eps / S.expand(t, x)
    assert_close(S.velocity_to_x0(eps - x0, x, t), x0, 1e-4)
    assert_close(S.velocity_to_score(eps - x0, x, t), score, 1e-4)
    assert_close(S.x0_to_score(x0, x, t), score, 1e-4)


def test_score_needs_the_plus_sign_for_velocities(point):
    """Fact 1: -(x + (1 - t) v) / t equals -(x - (1 - t) x0) / t^2; with x0 in place of v it would not."""
    x0, eps, t, x = point
    assert_close(S.velocity_to_score(eps - x0, x, t), S.x0_to_score(x0, x, t), 1e-3)
    assert np.abs(S.velocity_to_score(x0, x, t) - S.x0_to_score(x0, x, t)).max() > 1


def test_score_differences(point):
    """Facts 2 and 3, for two arbitrary velocities."""
    _, _, t, x = point
    v_r, v_f = jax.random.normal(jax.random.key(1), (2, *SHAPE))
    s_r, s_f = (S.velocity_to_score(v, x, t) for v in (v_r, v_f))
    x0_r, x0_f = (S.velocity_to_x0(v, x, t) for v in (v_r, v_f))
    tb = S.expand(t, x)
    assert_close(s_r - s_f, (1 - tb) / tb * (v_f - v_r), 2e-4)
    assert_close(s_r - s_f, (1 - tb) / tb**2 * (x0_r - x0_f), 2e-3)
    assert_close(-(1 - tb) * (s_r - s_f), (1 - tb) ** 2 / tb**2 * (x0_f - x0_r), 2e-3)
    assert_close(-(1 - tb) * (s_r - s_f), (1 - tb) ** 2 / tb * (v_r - v_f), 2e-4)


def test_velocity_and_x0_errors(point):
    """Fact 6: ||v - v'||^2 = ||x0 - x0'||^2 / t^2."""
    x0, eps, t, x = point
    other = jax.random.normal(jax.random.key(2), SHAPE)
    left = (eps - x0 - other) ** 2
    right = (x0 - S.velocity_to_x0(other, x, t)) ** 2 / S.expand(t, x) ** 2
    assert_close(left, right, 1e-3)


@pytest.mark.parametrize("s", [1.0, 3.0, 5.0, 8.0, 12.0, 17.0])
def test_shift(s):
    """Fact 8."""
    u = np.linspace(0, 1, 101)
    t = S.shift(u, s)
    assert S.shift(0.0, s) == 0 and S.shift(1.0, s) == 1
    assert (np.diff(t) > 0).all()
    np.testing.assert_allclose(S.unshift(t, s), u, atol=1e-12)


@pytest.mark.parametrize(
    ("s", "expected"),
    [
        (3.0, (1, 0.9, 0.75, 0.5)),
        (5.0, (1, 0.9375, 0.833333, 0.625)),
        (8.0, (1, 0.96, 0.888889, 0.727273)),
        (12.0, (1, 0.972973, 0.923077, 0.8)),
    ],
)
def test_shifted_lists(s, expected):
    np.testing.assert_allclose(S.shifted_times(4, s), (*expected, 0), atol=1e-6)


def test_numbers_of_the_shift():
    assert S.unshift(0.9, 5.0) == pytest.approx(0.642857, abs=1e-6)
    assert S.shift(0.9, 5.0) == pytest.approx(0.978261, abs=1e-6)


def test_dcm_grid():
    """The 50-step grid of shift 17 on which DCM splits its experts."""
    raw = np.arange(50, 0, -1) / 50
    sigmas = S.shift(raw, 17.0)[::-1]
    assert sigmas[35] == pytest.approx(0.977636, abs=1e-6)
    assert sigmas[37] == pytest.approx(0.981763, abs=1e-6)
    assert sigmas[34] == pytest.approx(0.975410, abs=1e-6)


def test_translate_between_resolutions():
    assert S.translate(0.9, VALUES_720P, 5 * 24 * 24) == pytest.approx(0.18, abs=0.005)
    assert S.translate(0.9, VALUES_720P, VALUES_720P) == pytest.approx(0.9)
    assert S.translate(1.0, VALUES_720P, 1728) == 1.0
    there = S.translate(0.7, VALUES_720P, 1728)
    assert S.translate(there, 1728, VALUES_720P) == pytest.approx(0.7)


def test_translation_keeps_the_snr_of_the_average():
    """Averaging N / n values multiplies the SNR by N / n; the translated time has that SNR."""
    moved = S.translate(0.9, 64 * 100, 100)
    assert ((1 - moved) / moved) ** 2 == pytest.approx(64 * (0.1 / 0.9) ** 2)


def test_a_grid_without_steps_is_named():
    with pytest.raises(UserError, match="steps is 0"):
        S.shifted_times(0, 1.0)


M, SD = 1.3, 0.7


def oracle(x, t, mean=M, sd=SD):
    """Exact velocity, E[x0 | x_t] and score for data N(mean, sd^2)."""
    t = S.expand(t, x)
    var = (1 - t) ** 2 * sd**2 + t**2
    x0 = mean + (1 - t) * sd**2 * (x - (1 - t) * mean) / var
    eps = t * (x - (1 - t) * mean) / var
    return eps - x0, x0, -(x - (1 - t) * mean) / var


def test_oracle_agrees_with_the_conversions(point):
    _, _, t, x = point
    v, x0, score = oracle(x, t)
    assert_close(S.velocity_to_x0(v, x, t), x0)
    assert_close(S.velocity_to_score(v, x, t), score, 1e-4)


def test_oracle_difference_of_means():
    """Fact 9: x0_f - x0_r = t^2 / V (m_f - m_r), 1.642336 at t = .6, S = .7, difference 2."""
    x, t = jnp.linspace(-3, 3, 7)[:, None], jnp.full(7, 0.6)
    difference = oracle(x, t, mean=3.0)[1] - oracle(x, t, mean=1.0)[1]
    assert_close(difference, jnp.full((7, 1), 1.642336), 1e-5)


def test_conditional_mean_contracts():
    """Fact 13: over fresh noise, E[E[x0 | x_t]] = m + k (x0 - m), k = .178832 at t = .6, S = .7."""
    k = 0.4**2 * SD**2 / (0.4**2 * SD**2 + 0.36)
    assert k == pytest.approx(0.178832, abs=1e-6)
    x0 = jnp.full((200_000, 1), 2.5)
    t = jnp.full(200_000, 0.6)
    x = S.add_noise(x0, jax.random.normal(jax.random.key(0), x0.shape), t)
    assert float(oracle(x, t)[1].mean()) == pytest.approx(M + k * (2.5 - M), abs=3e-3)
    assert math.isclose(2 * (2.5 - (M + k * (2.5 - M))), 2 * (1 - k) * (2.5 - M), rel_tol=1e-9)


@pytest.mark.parametrize(("r", "t"), [(0.0, 0.3), (0.2, 0.9), (0.6, 0.8), (0.7, 0.7), (0.3, 1.0)])
def test_what_is_noised_on_lies_where_the_path_does(point, r, t):
    """Signal 1 - t, and independent noises whose variances add up to t^2; at the same time nothing happens."""
    x0, eps, _, _ = point
    r, t = jnp.full(3, r, jnp.float32), jnp.full(3, t, jnp.float32)
    zero = jnp.zeros_like(x0)
    assert_close(S.renoise(S.add_noise(x0, zero, r), zero, r, t), S.add_noise(x0, zero, t))
    old, new = (np.asarray(S.renoise(*two, r, t) / eps) for two in ((S.add_noise(zero, eps, r), zero), (zero, eps)))
    assert_close(old**2 + new**2, np.broadcast_to(np.asarray(t).reshape(3, 1, 1, 1, 1) ** 2, SHAPE))
    if r[0] == t[0]:
        assert_close(S.renoise(x0, eps, r, t), x0)


def test_noise_that_takes_a_clip_from_time_6_to_8():
    r, t = jnp.full(3, 0.6), jnp.full(3, 0.8)
    one = jnp.ones(SHAPE)
    assert_close(S.renoise(0 * one, one, r, t), 0.741620 * np.ones(SHAPE))
    assert_close(S.renoise(one, 0 * one, r, t), 0.5 * np.ones(SHAPE))


def test_noising_on_between_near_times_is_finite():
    times = jnp.linspace(0.0, 0.999, 300)
    near = jnp.minimum(times * (1 + 2e-7), 1.0)
    one = jnp.ones((300, 1))
    assert bool(jnp.isfinite(S.renoise(one, one, times, near)).all())
