"""Guidance in one convention."""

import jax
import numpy as np

from vpae_jax.flow.guidance import guided
from vpae_jax.flow.schedule import velocity_to_x0

SHAPE = (2, 3, 4)


def test_conventions():
    """Fact 7: w = s + 1."""
    u, c = jax.random.normal(jax.random.key(0), (2, *SHAPE))
    for s in (0.0, 3.0, 6.5):
        np.testing.assert_allclose(guided(u, c, s + 1), c + s * (c - u), rtol=1e-5, atol=1e-5)


def test_no_guidance_and_fixed_point():
    u, c = jax.random.normal(jax.random.key(0), (2, *SHAPE))
    np.testing.assert_allclose(guided(u, c, 1.0), c, atol=1e-6)
    np.testing.assert_allclose(guided(u, c, 0.0), u, atol=0)
    np.testing.assert_allclose(guided(c, c, 7.0), c, atol=0)


def test_guiding_velocity_is_guiding_x0():
    u, c, x = jax.random.normal(jax.random.key(0), (3, *SHAPE))
    t = np.array([0.3, 0.8], np.float32)
    t = jax.numpy.asarray(t)
    left = velocity_to_x0(guided(u, c, 5.0), x, t)
    right = guided(velocity_to_x0(u, x, t), velocity_to_x0(c, x, t), 5.0)
    np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)
