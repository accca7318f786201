"""The train state: everything that training changes, as one pytree that is checkpointed as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from vpae_jax.methods.base import Role
from vpae_jax.train import ema
from vpae_jax.types import Params, pytree


@pytree
class TrainState:
    """State of all trained roles; or a tree of the same structure with its shapes or shardings.

    Attributes:
      step: completed steps, int32.
      key: root key of all randomness, which never changes. Each draw folds in the step, the update and its repeat.
      params: float32 master weights of each trained role (for a role with adapters, only the adapters).
      opt: optimizer state of each trained role.
      averages: float32 averages of roles' weights, by `<role>_<average>`.
    """

    step: Any
    key: Any
    params: dict[str, Params]
    opt: dict[str, optax.OptState]
    averages: dict[str, Params]


def create(
    seed: int,
    params: Mapping[str, Params],
    roles: Mapping[str, Role],
    optimizers: Mapping[str, optax.GradientTransformation],
) -> TrainState:
    """Creates a state at step 0: the given weights in float32, zero moments, averages equal to the weights.

    Moments and averages are sharded like their weights. The buffers of `params` are donated.
    """
    params = dict(params)
    places = places_of(abstract(params, roles, optimizers))
    return jax.jit(_builder(seed, roles, optimizers), out_shardings=places, donate_argnums=0)(params)


def abstract(
    params: Mapping[str, Params], roles: Mapping[str, Role], optimizers: Mapping[str, optax.GradientTransformation]
) -> TrainState:
    """Returns shapes, dtypes and shardings of the state that `create` would return; `params` may be abstract, too."""
    params = dict(params)
    shapes = jax.eval_shape(_builder(0, roles, optimizers), params)
    weights = places_of(params)
    whole = _everywhere(jax.tree.leaves(weights)[0])
    places = TrainState(
        step=whole,
        key=whole,
        params=weights,
        opt={name: _moments(optimizers[name], shapes.opt[name], weights[name], whole) for name in shapes.opt},
        averages={name: weights[role] for name, role in _averages(params, roles)},
    )
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, places)


def places_of(tree: Any) -> Any:
    """Returns the shardings of a tree of arrays, or of abstract arrays with shardings."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _builder(
    seed: int, roles: Mapping[str, Role], optimizers: Mapping[str, optax.GradientTransformation]
) -> Callable[[dict[str, Params]], TrainState]:
    def build(params: dict[str, Params]) -> TrainState:
        params = {name: ema.start(tree) for name, tree in params.items()}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            key=jax.random.key(seed),
            params=params,
            opt={name: optimizers[name].init(tree) for name, tree in params.items()},
            averages={name: ema.start(params[role]) for name, role in _averages(params, roles)},
        )

    return build


def _moments(optimizer: optax.GradientTransformation, state: Any, weights: Any, whole: Any) -> Any:
    """Returns the shardings of an optimizer's state: like the weights for moments, replicated for everything else."""
    return optax.tree.map_params(
        optimizer, lambda _, place: place, state, weights, transform_non_params=lambda _: whole
    )


def _averages(params: Mapping[str, Any], roles: Mapping[str, Role]) -> list[tuple[str, str]]:
    """Returns the name of every average with its role."""
    return [(f"{role}_{name}", role) for role in params for name in roles[role].averages]


def _everywhere(place: Any) -> Any:
    return NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else place
