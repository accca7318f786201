"""The average of weights: its numbers and its precision. That it follows each update is tested with the steps."""

import jax.numpy as jnp
import numpy as np
import pytest

from vpae_jax.train import ema


def test_a_trajectory():
    rng = np.random.default_rng(0)
    path = [{"w": rng.normal(size=(3, 4)), "b": rng.normal(size=2)} for _ in range(10)]
    average = ema.start({name: jnp.float32(leaf) for name, leaf in path[0].items()})
    expected = dict(path[0])
    for params in path:
        average = ema.update(average, {name: jnp.float32(leaf) for name, leaf in params.items()}, 0.8)
        expected = {name: 0.8 * expected[name] + 0.2 * leaf for name, leaf in params.items()}
        for name, leaf in expected.items():
            np.testing.assert_allclose(average[name], leaf, rtol=1e-5, atol=1e-6)


def test_half_life_and_what_is_left_after_a_thousand_updates():
    average = {"w": jnp.ones(())}
    values = []
    for _ in range(1000):
        average = ema.update(average, {"w": jnp.zeros(())}, 0.995)
        values.append(float(average["w"]))
    assert values[0] == pytest.approx(0.995) and values[-1] == pytest.approx(0.006654, rel=1e-3)
    assert values[137] > 0.5 > values[138]  # log(1/2) / log(0.995) = 138.3 updates


def test_the_average_is_a_float32_copy():
    """It keeps updates that bfloat16 would round away, and does not share the weights' buffer."""
    average = ema.start({"w": jnp.ones((), jnp.bfloat16)})
    assert average["w"].dtype == jnp.float32
    moved = ema.update(average, {"w": jnp.bfloat16(1.0078125)}, 0.995)
    assert moved["w"].dtype == jnp.float32 and float(moved["w"]) == pytest.approx(1 + 0.005 * 0.0078125, abs=1e-7)
    weights = {"w": jnp.ones(3)}
    copied = ema.start(weights)["w"]
    weights["w"].delete()
    np.testing.assert_array_equal(copied, 1)
