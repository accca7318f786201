"""Binds a method's roles and views to networks; this is where methods and models meet.

Every role's model is split into a graph definition and plain nested dicts of arrays. Trained weights are part of the
train state; frozen weights are a separate argument of every step, in no optimizer and no checkpoint. A role of adapters
contains only the adapters: its views combine them with the weights of their base, which are in memory only once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from vpae_jax.flow.chunks import Chunks
from vpae_jax.methods.base import Method, Role, View
from vpae_jax.models.wan_causal import CausalWan
from vpae_jax.types import Condition, Features, Latents, Params, Times, UserError


@dataclass(frozen=True)
class TransformerNetwork:
    """A Wan transformer bound to weights, with the interface that methods use (`methods.base.Backbone`).

    Attributes:
      graph, params: the transformer, split.
      trained: whether the weights are differentiated.
    """

    graph: nnx.GraphDef
    params: Params
    trained: bool = False

    def __call__(self, x: Latents, t: Times, condition: Condition) -> Latents:
        return nnx.merge(self.graph, self.params)(x, t, condition)

    def features(self, x: Latents, t: Times, condition: Condition, taps: tuple[int, ...]) -> Features:
        return nnx.merge(self.graph, self.params).features(x, t, condition, taps, self.trained)

    def velocity_and_features(
        self, x: Latents, t: Times, condition: Condition, taps: tuple[int, ...]
    ) -> tuple[Latents, Features]:
        return nnx.merge(self.graph, self.params).velocity_and_features(x, t, condition, taps, self.trained)

    def readings(self, features: Features, x: Latents, t: Times) -> tuple[Latents, ...]:
        return nnx.merge(self.graph, self.params).readings(features, x, t)

    def causal(self, chunks: Chunks) -> CausalWan:
        return CausalWan(nnx.merge(self.graph, self.params), chunks)


@dataclass(frozen=True)
class HeadsNetwork:
    """Discriminator heads bound to weights (`methods.base.Heads`)."""

    graph: nnx.GraphDef
    params: Params
    trained: bool = False

    @property
    def taps(self) -> tuple[int, ...]:
        return nnx.merge(self.graph, self.params).config.taps

    def __call__(self, features: Features) -> Float[Array, "b k"]:
        return nnx.merge(self.graph, self.params)(features)


@dataclass(frozen=True)
class ModelNetwork:
    """Any other model bound to weights: the model itself."""

    graph: nnx.GraphDef
    params: Params
    trained: bool = False

    def __call__(self, *args: Any) -> Any:
        return nnx.merge(self.graph, self.params)(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(nnx.merge(self.graph, self.params), name)


NETWORKS: Mapping[str, Callable[..., Any]] = {
    "transformer": TransformerNetwork,
    "heads": HeadsNetwork,
    "vae": ModelNetwork,
    "decoder": ModelNetwork,
    "encoders": ModelNetwork,
    "image_encoder": ModelNetwork,
}


@dataclass(frozen=True)
class RoleModels:
    """How weights become networks.

    Attributes:
      roles: the method's roles.
      views: the networks by name (`methods.base.all_views`).
      graphs: each role's graph definition; for adapters, it includes the parameters of their base.
    """

    roles: Mapping[str, Role]
    views: Mapping[str, View]
    graphs: Mapping[str, nnx.GraphDef]

    def weights(
        self, name: str, held: Mapping[str, Params], averages: Mapping[str, Params]
    ) -> tuple[nnx.GraphDef, Params]:
        """Returns a view's network, split into graph and weights.

        Args:
          name: name of the view.
          held: weights by role, trained and frozen.
          averages: averages by `<role>_<average>`.
        """
        view = self.views[name]
        role = self.roles[view.role]
        params = held[view.role] if view.average is None else averages[f"{view.role}_{view.average}"]
        if role.adapters is not None:
            params = merge_trees(held[role.adapters.on], _scaled(params, view.scale))
        return self.graphs[view.role], params

    def networks(
        self,
        held: Mapping[str, Params],
        averages: Mapping[str, Params],
        constants: Mapping[str, Params] | None = None,
        trains: Collection[str] = (),
    ) -> dict[str, Any]:
        """Returns every view's network.

        Args:
          held: weights by role, trained and frozen; those in `trains` are being differentiated.
          averages: averages by `<role>_<average>`.
          constants: the same weights as `held`, but not differentiated, for constant views.
          trains: the roles being trained.
        """
        result = {}
        for name, view in self.views.items():
            chosen = constants if view.constant and constants is not None else held
            graph, params = self.weights(name, chosen, averages)
            role = self.roles[view.role]
            base = () if role.adapters is None else (role.adapters.on,)
            own = () if view.average is not None else (view.role,)
            trained = not view.constant and any(part in trains for part in (*own, *base))
            result[name] = NETWORKS[role.part](graph, params, trained)
        return result


def _scaled(adapters: Params, scale: float) -> Params:
    """Scales the effect of adapters, by multiplying the second matrix of each pair."""
    if scale == 1:
        return adapters

    def one(path: tuple[Any, ...], leaf: Array) -> Array:
        return leaf * scale if jax.tree_util.keystr(path[-1:], simple=True) == "lora_b" else leaf

    return jax.tree_util.tree_map_with_path(one, adapters)


def split_lora(model: nnx.Module) -> tuple[nnx.GraphDef, Params, Params]:
    """Splits a model with adapters into (graph, adapters, base weights)."""
    graph, lora, base = nnx.split(model, nnx.LoRAParam, nnx.Param)
    return graph, nnx.to_pure_dict(lora), nnx.to_pure_dict(base)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Splits a model into (graph, weights)."""
    graph, params = nnx.split(model, nnx.Param)
    return graph, nnx.to_pure_dict(params)


def merge_trees(base: Mapping[Any, Any], extra: Mapping[Any, Any]) -> dict[Any, Any]:
    """Returns the union of two nested dicts. Raises `ValueError` if their leaves overlap."""
    result = dict(base)
    for key, value in extra.items():
        if key not in result:
            result[key] = value
        elif isinstance(value, Mapping) and isinstance(result[key], Mapping):
            result[key] = merge_trees(result[key], value)
        else:
            raise ValueError(f"both trees contain {key!r}")
    return result


def check_roles(method: Method, optimizers: Mapping[str, Any]) -> None:
    """Checks a method's roles. Raises `UserError`, naming the role, unless every trained role has an update and an
    optimizer, updates only train trained roles, adapters are based on a full model of the same part, and a follower and
    the role that it follows are full, trained models of the same part.

    Unused optimizers are allowed: a config has one for every role that any setting of its method trains.
    """
    trained = {name for name, role in method.roles.items() if role.trains}
    updates = [one for update in method.updates for one in update.program]
    updated = {name for update in updates for name in update.trains}
    if trained != updated:
        raise UserError(f"the method trains {sorted(trained)}, but has updates for {sorted(updated)}; fix the method")
    for name, role in method.roles.items():
        if role.adapters is None:
            continue
        base = method.roles.get(role.adapters.on)
        if base is None or base.adapters is not None or base.part != role.part:
            raise UserError(
                f"role {name} has adapters on {role.adapters.on!r}, which is not a full {role.part}; fix the method"
            )
    for update in updates:
        for name in update.followers:
            pair = [method.roles[one] for one in (name, *update.trains) if one in method.roles]
            parts, adapters = ({getattr(role, field) for role in pair} for field in ("part", "adapters"))
            single = len(update.trains) == 1 and name in trained - {*update.trains}
            if not single or len(parts) > 1 or adapters != {None}:
                raise UserError(
                    f"role {name} follows {update.name}: both must be trained, full models of the same part; fix the "
                    "method"
                )
    for name in sorted(trained):
        if name not in optimizers:
            raise UserError(f"config.optimizers.{name}: missing; the method trains this role")
