"""Samplers against data whose velocity is known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from vpae_jax.flow.schedule import expand, shift, shifted_times
from vpae_jax.flow.solvers import consistency, euler, unipc, unipc_coefficients, unipc_levels, unipc_times
from vpae_jax.types import UserError

M, SD = 1.3, 0.7


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def gaussian(x, t):
    """Exact velocity for data N(M, SD^2)."""
    t = expand(t, x)
    gain = (x - (1 - t) * M) / ((1 - t) ** 2 * SD**2 + t**2)
    return t * gain - (M + (1 - t) * SD**2 * gain)


def delta(x, t, c=0.4):
    """Exact velocity for data that is always c (fact 12); t > 0."""
    return (x - c) / expand(t, x)


def test_one_step_gives_the_mean():
    """Fact 10: v(eps, 1) = eps - m, so one Euler step always outputs m."""
    x = jax.random.normal(jax.random.key(0), (4, 2, 3))
    np.testing.assert_allclose(euler(gaussian, x, shifted_times(1, 5.0)), M, atol=1e-6)


def test_many_steps_follow_the_flow():
    """Fact 11: the exact map is x0 = m + S eps; 2000 Euler steps give 2.3493 for 2.35."""
    x = jnp.full((1, 1), 1.5)
    out = jax.jit(lambda x: euler(gaussian, x, shifted_times(2000, 1.0)))(x)
    assert float(out[0, 0]) == pytest.approx(2.3493, abs=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_delta_data_is_exact(steps):
    x = jax.random.normal(jax.random.key(0), (3, 4))
    np.testing.assert_allclose(euler(delta, x, shifted_times(steps, 5.0)), 0.4, atol=1e-6)
    np.testing.assert_allclose(consistency(delta, x, shifted_times(steps, 5.0), jax.random.key(1)), 0.4, atol=1e-6)


def test_consistency_renoises_with_fresh_noise():
    """A network that always answers x0 = 0 leaves exactly the fresh noise, scaled by the next time."""
    seen = []

    def zero(x, t):
        seen.append(np.asarray(x))
        return x / expand(t, x)

    x = jax.random.normal(jax.random.key(0), (2, 500))
    with jax.disable_jit():
        out = consistency(zero, x, np.array([1, 0.8, 0.3, 0], np.float32), jax.random.key(1))
    assert seen[1].std() == pytest.approx(0.8, abs=0.05) and seen[2].std() == pytest.approx(0.3, abs=0.03)
    assert abs(np.corrcoef(seen[1].ravel(), seen[2].ravel())[0, 1]) < 0.15
    np.testing.assert_allclose(out, 0, atol=1e-6)


def test_steps_keep_the_precision_of_x():
    x = jax.random.normal(jax.random.key(0), (2, 3), jnp.float32)
    half = lambda x, t: gaussian(x, t).astype(jnp.bfloat16)  # noqa: E731
    assert euler(half, x, shifted_times(3, 3.0)).dtype == jnp.float32


@pytest.mark.parametrize(("steps", "flow_shift"), [(1, 5.0), (2, 3.0), (3, 1.0), (4, 5.0), (10, 3.0), (50, 5.0)])
def test_unipc_equals_diffusers(steps, flow_shift):
    """Same levels, same integer timesteps, same result on a nonlinear, time-dependent velocity field."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift, num_train_timesteps=1000
    )
    scheduler.set_timesteps(steps)
    sigmas = unipc_levels(steps, flow_shift)
    times = unipc_times(sigmas)
    np.testing.assert_array_equal(np.float32(sigmas), scheduler.sigmas.numpy())
    np.testing.assert_array_equal(np.round(times * 1000), scheduler.timesteps.numpy())

    start = jax.random.normal(jax.random.key(0), (2, 3, 4))
    weight = np.asarray(jax.random.normal(jax.random.key(1), (4, 4)))
    x = torch.tensor(np.asarray(start))
    for t in scheduler.timesteps:
        v = torch.tanh(x @ torch.tensor(weight)) * (0.5 + float(t) / 1000) + x
        x = scheduler.step(v, t, x).prev_sample

    def velocity(x, t):
        return jnp.tanh(x @ jnp.asarray(weight)) * (0.5 + expand(t, x)) + x

    ours = jax.jit(lambda x: unipc(velocity, x, sigmas, times))(start)
    np.testing.assert_allclose(ours, x.numpy(), atol=1e-5, rtol=1e-5)


def test_wan_grid():
    """Wan's own scheduler starts from .999 on the raw axis."""
    sigmas = unipc_levels(50, 5.0, grid="wan")
    times = unipc_times(sigmas)
    np.testing.assert_allclose(sigmas[0], shift(0.999, 5.0), rtol=1e-6)
    np.testing.assert_allclose(sigmas[1], shift(0.999 * 49 / 50, 5.0), rtol=1e-6)
    assert len(sigmas) == 51 and sigmas[-1] == 0 and times[0] == np.float32(0.999)
    with pytest.raises(UserError, match="steps"):
        unipc_levels(0, 5.0)


def test_unipc_converges_faster_than_euler():
    """Fact 11 again: 20 steps of order 2 beat 200 Euler steps."""
    x = jnp.full((1, 1), 1.5)
    exact = M + SD * 1.5
    second = unipc(gaussian, x, unipc_levels(20, 1.0))
    first = euler(gaussian, x, shifted_times(200, 1.0))
    assert abs(float(second[0, 0]) - exact) < abs(float(first[0, 0]) - exact) < 0.02


def test_unipc_is_exact_on_delta_data_and_consistent():
    """Rows sum so that a state on the straight path to a constant prediction stays on it."""
    sigmas = unipc_levels(7, 3.0)
    x = jax.random.normal(jax.random.key(0), (3, 4))
    np.testing.assert_allclose(unipc(delta, x, sigmas), 0.4, atol=1e-5)
    rows = unipc_coefficients(sigmas).astype(np.float64)
    np.testing.assert_allclose(rows[:, 5], sigmas[1:] / sigmas[:-1], rtol=1e-6)
    np.testing.assert_allclose(rows[:, 5] * (1 - sigmas[:-1]) + rows[:, 6] + rows[:, 7], 1 - sigmas[1:], atol=1e-5)
    np.testing.assert_allclose(rows[-1, 5:], [0, 1, 0], atol=1e-12)
