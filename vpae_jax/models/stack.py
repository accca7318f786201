"""Identical layers stored as one: every parameter gains a leading layer axis, and the forward pass scans over it.

One layer is traced and compiled for any depth, so a 32-layer model compiles as fast as a 2-layer one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx
from jaxtyping import Array, Float

M = TypeVar("M", bound=nnx.Module)


def stack_layers(make: Callable[[nnx.Rngs], M], num_layers: int, rngs: nnx.Rngs) -> M:
    """Builds `num_layers` layers with independent initial weights as one module of stacked parameters."""
    return nnx.split_rngs(splits=num_layers)(nnx.vmap(make, in_axes=(0,), out_axes=0))(rngs)


def scan_layers(
    layers: M,
    x: Float[Array, "b n d"],
    apply: Callable[[M, Float[Array, "b n d"]], Float[Array, "b n d"]],
    stop: int | None = None,
    start: int = 0,
) -> Float[Array, "b n d"]:
    """Applies stacked layers in turn.

    Args:
      layers: a module made by `stack_layers`.
      x: the first layer's input.
      apply: applies one layer to the hidden states; it must keep their shape and dtype.
      stop: index of the layer before which to stop; None runs all.
      start: index of the first layer to run.
    """
    graph, weights = nnx.split(layers)
    if stop is not None or start:
        weights = jax.tree.map(lambda leaf: leaf[start:stop], weights)

    def step(states, layer):
        return apply(nnx.merge(graph, layer), states), None

    return jax.lax.scan(step, x, weights)[0]
