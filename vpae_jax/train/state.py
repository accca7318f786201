"""What training changes: one pytree, checkpointed whole."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array
from jaxtyping import Int

from vpae_jax.methods.base import Role
from vpae_jax.train import ema
from vpae_jax.types import Params, PRNGKey


@struct.dataclass
class TrainState:
    """State of all trained roles.

    Attributes:
      step: completed steps.
      key: root of all randomness; never changes. Each draw folds in the step, the update and its repeat.
      params: float32 master weights of each trained role (only the adapters, for a role with adapters).
      opt: each trained role's optimizer state.
      ema: float32 average of the weights of each role that keeps one.
    """

    step: Int[Array, ""]
    key: PRNGKey
    params: dict[str, Params]
    opt: dict[str, optax.OptState]
    ema: dict[str, Params]


def create(
    seed: int,
    params: Mapping[str, Params],
    roles: Mapping[str, Role],
    optimizers: Mapping[str, optax.GradientTransformation],
) -> TrainState:
    """A fresh state at step 0: float32 copies of the given weights, empty moments, averages equal to the weights."""
    # Copies: the step donates its state, and two roles may have started from the same arrays.
    params = {name: ema.start(tree) for name, tree in params.items()}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key(seed),
        params=params,
        opt={name: optimizers[name].init(tree) for name, tree in params.items()},
        ema={name: ema.start(params[name]) for name in params if roles[name].ema is not None},
    )
