"""From a method's roles to networks: which weights each role trains, which are frozen, and how both become callable.

Every role's model is split into a graph definition and plain nested dicts of arrays. Trained weights live in the train
state; frozen ones are a separate argument of every step, in no optimizer and no checkpoint. A role with low-rank
adapters holds only these: it runs on its base role's frozen weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from vpae_jax.methods.base import Method, Role
from vpae_jax.types import Condition, Features, Latents, Params, PerExample, Times, UserError


@dataclass(frozen=True)
class TransformerNetwork:
    """A Wan transformer bound to weights, as methods see it (`methods.base.Backbone`).

    Attributes:
      graph, params: the transformer, split.
      taps: 1-indexed blocks whose hidden states are read.
      trained: whether the weights are differentiated.
    """

    graph: nnx.GraphDef
    params: Params
    taps: tuple[int, ...] = ()
    trained: bool = False

    def __call__(self, x: Latents, t: Times, condition: Condition) -> Latents:
        return nnx.merge(self.graph, self.params)(x, t, condition)

    def features(self, x: Latents, t: Times, condition: Condition) -> Features:
        return nnx.merge(self.graph, self.params).features(x, t, condition, self.taps, self.trained)


@dataclass(frozen=True)
class HeadNetwork:
    """Discriminator heads bound to weights (`methods.base.Head`)."""

    graph: nnx.GraphDef
    params: Params
    taps: tuple[int, ...] = ()
    trained: bool = False

    def __call__(self, features: Features) -> PerExample:
        return nnx.merge(self.graph, self.params)(features)


@dataclass(frozen=True)
class ModelNetwork:
    """Any other model bound to weights: the model itself."""

    graph: nnx.GraphDef
    params: Params
    taps: tuple[int, ...] = ()
    trained: bool = False

    def __call__(self, *args: Any) -> Any:
        return nnx.merge(self.graph, self.params)(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(nnx.merge(self.graph, self.params), name)


NETWORKS: Mapping[str, Callable[..., Any]] = {
    "transformer": TransformerNetwork,
    "heads": HeadNetwork,
    "vae": ModelNetwork,
    "encoders": ModelNetwork,
}


@dataclass(frozen=True)
class RoleModels:
    """How each role's weights become networks.

    Attributes:
      roles: the method's roles.
      graphs: each role's graph definition; adapters' graphs hold their base's parameters too.
      taps: 1-indexed blocks whose hidden states the heads read.
    """

    roles: Mapping[str, Role]
    graphs: Mapping[str, nnx.GraphDef]
    taps: tuple[int, ...] = ()

    def network(self, role: str, params: Params, frozen: Mapping[str, Params], trained: bool = False) -> Any:
        """The role's network for these weights (its adapters, when it trains adapters); `trained` in its own update."""
        spec = self.roles[role]
        if spec.trains == "lora":
            params = merge_trees(frozen[str(spec.base)], params)
        return NETWORKS[spec.model](self.graphs[role], params, self.taps, trained)

    def networks(
        self, trained: Mapping[str, Params], averages: Mapping[str, Params], frozen: Mapping[str, Params]
    ) -> dict[str, Any]:
        """Every role's network, and `<role>_ema` for each role that keeps an average."""
        result = {role: self.network(role, params, frozen) for role, params in {**frozen, **trained}.items()}
        result |= {f"{role}_ema": self.network(role, params, frozen) for role, params in averages.items()}
        return result


def split_lora(model: nnx.Module) -> tuple[nnx.GraphDef, Params, Params]:
    """A model with adapters as (graph, adapters, base weights)."""
    graph, lora, base = nnx.split(model, nnx.LoRAParam, nnx.Param)
    return graph, nnx.to_pure_dict(lora), nnx.to_pure_dict(base)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """A model as (graph, weights)."""
    graph, params = nnx.split(model, nnx.Param)
    return graph, nnx.to_pure_dict(params)


def merge_trees(base: Mapping[Any, Any], extra: Mapping[Any, Any]) -> dict[Any, Any]:
    """The union of two nested dicts whose leaves do not overlap. Raises `ValueError` when they do."""
    result = dict(base)
    for key, value in extra.items():
        if key not in result:
            result[key] = value
        elif isinstance(value, Mapping) and isinstance(result[key], Mapping):
            result[key] = merge_trees(result[key], value)
        else:
            raise ValueError(f"both trees hold {key!r}")
    return result


def check_roles(method: Method, optimizers: Mapping[str, Any]) -> None:
    """Every trained role needs an optimizer, and updates are for trained roles. Raises `UserError` naming the role.

    An optimizer may lie unused: a config holds one for every role that some setting of its method trains.
    """
    trained = {name for name, role in method.roles.items() if role.trains != "none"}
    updated = {update.trains for update in method.updates}
    if trained != updated:
        raise UserError(
            f"the method trains {sorted(trained)}, but has updates for {sorted(updated)}; correct the method"
        )
    for name in sorted(trained):
        if name not in optimizers:
            raise UserError(f"config.optimizers.{name}: missing; the method trains this role")


def count(params: Params) -> int:
    """Number of parameters in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
