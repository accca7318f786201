"""Injected gradients, guided predictions and the checks of fields."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpae_jax.flow.schedule import expand
from vpae_jax.methods.common import (
    Term,
    check_at_least,
    check_choice,
    check_fraction,
    drift,
    example_mean,
    inject,
    predict_x0,
)
from vpae_jax.types import Condition, UserError

SHAPE = (3, 2, 2, 2, 4)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape).astype(np.float32))


def term_of(x):
    """mean x^2 of each clip, with its gradient by hand."""
    x = jax.lax.stop_gradient(x)
    return Term(example_mean(x**2), 2 * x / x[0].size)


def test_injected_value_and_gradient_are_the_function_s():
    x = normal(*SHAPE)
    direct = jax.value_and_grad(lambda x: example_mean(x**2).mean())(x)
    injected = jax.value_and_grad(lambda x: inject(x, term_of(x)).mean())(x)
    np.testing.assert_allclose(injected[0], direct[0], rtol=1e-6)
    np.testing.assert_allclose(injected[1], direct[1], rtol=1e-5)
    both = jax.grad(lambda x: inject(x, term_of(x), term_of(x).scaled(2.0)).mean())(x)
    np.testing.assert_allclose(both, 3 * direct[1], rtol=1e-5)


def test_injection_keeps_small_values_beside_large_clips():
    x = 1e4 * jnp.ones(SHAPE)
    term = Term(jnp.full(3, 1e-3), jnp.ones(SHAPE))
    np.testing.assert_array_equal(inject(x, term), jnp.full(3, 1e-3))


def test_grad_norm():
    np.testing.assert_allclose(Term(jnp.zeros(3), jnp.full(SHAPE, 0.5)).grad_norm, 0.5 * np.sqrt(32))


def test_predicting_x0_with_guidance():
    x = normal(*SHAPE)
    t = jnp.array([0.2, 0.5, 0.9])
    prompt, none = (Condition(text=jnp.full((3, 1, 1), v), text_mask=jnp.ones((3, 1), bool)) for v in (1.0, 0.0))
    calls = []

    def network(x, t, condition):
        calls.append(condition)
        return jnp.broadcast_to(condition.text[:, :, :, None, None], x.shape).astype(jnp.bfloat16)

    got = predict_x0(network, x, t, prompt, none, 5.0)
    np.testing.assert_allclose(got, x - 5 * expand(t, x), rtol=1e-5, atol=1e-5)
    assert got.dtype == jnp.float32 and len(calls) == 2
    predict_x0(network, x, t, prompt, none, 1.0)
    assert len(calls) == 3
    with pytest.raises(ValueError, match="unconditional"):
        predict_x0(network, x, t, prompt, None, 5.0)


def test_drift():
    data = normal(8, 2, 6, 6, 4)
    found = drift(2 * data + 0.5, data)
    assert float(found["x0_std_ratio"].compute()) == pytest.approx(2, rel=1e-3)
    assert float(found["x0_mean_drift"].compute()) == pytest.approx(0.5, abs=0.05)
    assert float(drift(data, data)["x0_mean_drift"].compute()) == 0


def test_checks_name_the_field():
    with pytest.raises(UserError, match=r"Owner.rate is 2"):
        check_fraction("Owner", rate=2.0)
    with pytest.raises(UserError, match=r"Owner.count is 0, expected 1 or more"):
        check_at_least("Owner", 1, count=0)
    with pytest.raises(UserError, match=r"Owner.grad_norm is .* 'a', 'b'"):
        check_choice("Owner", {"grad_norm": ("a", "b")}, Term(jnp.zeros(3), jnp.zeros(SHAPE)))
