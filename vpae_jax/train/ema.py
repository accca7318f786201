"""Exponential moving averages of weights, in float32.

In bfloat16, an average with decay 0.995 would lose its updates: 0.005 of a small change is below half a unit in the
last place.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from vpae_jax.types import Params


def start(params: Params) -> Params:
    """Returns the average before the first update: a float32 copy of the weights."""
    return jax.tree.map(lambda p: jnp.array(p, dtype=jnp.float32, copy=True), params)


def update(average: Params, params: Params, decay: float | Array) -> Params:
    """Returns `decay * average + (1 - decay) * params`, in float32."""
    return jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p.astype(jnp.float32), average, params)
