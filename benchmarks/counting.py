"""Counts model FLOPs of a method's updates by tracing its losses with counting networks.

A counting network returns something of the right shape that depends on its inputs and weights, and adds the FLOPs of
its forward pass to a sum. If JAX differentiates through it, it also adds those of the backward pass: as many for the
gradient of the activations, and as many again for that of the weights. So whatever a loss evaluates, detaches or
differentiates is counted correctly, without knowing the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vpae_jax.methods.base import Context, Method
from vpae_jax.models.wan_dit import WanTransformerConfig
from vpae_jax.train.blueprint import Blueprint
from vpae_jax.types import Batch, Condition, Features, Latents, PerExample, Times, Tokens


@dataclass
class Count:
    """A sum of FLOPs."""

    total: float = 0.0


@dataclass(frozen=True)
class Counter:
    """A counting network.

    Attributes:
      count: the sum that it adds to.
      weight: stands for all its weights; differentiated for the trained role.
      trains_all: whether the gradient of the weights costs as much as a forward pass; that of adapters is ignored.
      config: of the transformer.
      taps: for heads, the blocks whose hidden states they read.
      heads: for heads, the FLOPs for one clip; None for a transformer.
    """

    count: Count
    weight: Any
    trains_all: bool
    config: WanTransformerConfig
    taps: tuple[int, ...]
    heads: Callable[[Features], float] | None = field(default=None)

    def __call__(self, first: Any, *rest: Any) -> Latents | Float[Array, "b 1"]:
        if self.heads is not None:
            return self._counted(self.heads(first), first)[:, None]
        x, _, condition = first, *rest
        found = self._counted(flops.transformer(self.config, x.shape, condition), x)
        return jnp.zeros_like(x) + found[:, None, None, None, None]

    def features(self, x: Latents, t: Times, condition: Condition, taps: tuple[int, ...]) -> Features:
        found = self._counted(flops.transformer(self.config, x.shape, condition, taps[-1]), x)
        (_, f, h, w, _), (pf, ph, pw) = x.shape, self.config.patch_size
        grid = (f // pf, h // ph, w // pw)

        def states(tokens: int) -> Tokens:
            return jnp.broadcast_to(found[:, None, None], (len(x), tokens, self.config.width))

        return Features(
            taps=(states(math.prod(grid)),) * len(taps),
            text=states(condition.text.shape[1]),
            text_mask=condition.text_mask,
            grid=grid,
            image=None if condition.image is None else states(condition.image.shape[1]),
        )

    def velocity_and_features(
        self, x: Latents, t: Times, condition: Condition, taps: tuple[int, ...]
    ) -> tuple[Latents, Features]:
        whole, part = (flops.transformer(self.config, x.shape, condition, *last) for last in ((), (taps[-1],)))
        rest = self._counted(whole - part, x)
        return jnp.zeros_like(x) + rest[:, None, None, None, None], self.features(x, t, condition, taps)

    def _counted(self, forward: float, inputs: Any) -> PerExample:
        """A number for each clip that depends on weights and inputs; counts a forward pass of `forward` FLOPs."""
        differentiated: list[bool] = []

        def number(weight: Any, *leaves: Any) -> PerExample:
            return weight * sum(jnp.sum(leaf, axis=tuple(range(1, leaf.ndim))) for leaf in leaves)

        @jax.custom_vjp
        def call(weight: Any, *leaves: Any) -> PerExample:
            self.count.total += forward
            return number(weight, *leaves)

        def ahead(*primals: Any) -> tuple[PerExample, Any]:
            self.count.total += forward
            differentiated.append(primals[0].perturbed)
            return jax.vjp(number, *(primal.value for primal in primals))

        def back(pull: Callable[..., Any], cotangent: Any) -> Any:
            self.count.total += forward * (2 if differentiated[0] and self.trains_all else 1)
            return pull(cotangent)

        call.defvjp(ahead, back, symbolic_zeros=True)
        return call(self.weight, *(leaf for leaf in jax.tree.leaves(inputs) if leaf.dtype != bool))


def step_flops(method: Method, blueprint: Blueprint, config: WanTransformerConfig, batch: Batch) -> list[float]:
    """Model FLOPs of one run of each update of a method.

    Args:
      method: its losses are traced.
      blueprint: networks and shapes of all roles.
      config: of the transformer.
      batch: the training batch; only its shapes matter.
    """
    params, models = blueprint.held, blueprint.models

    def network(name: str, count: Count, weights: Mapping[str, Any]) -> Counter:
        view = models.views[name]
        spec, heads, taps = method.roles[view.role], None, ()
        if spec.part == "heads":
            taps = nnx.merge(models.graphs[view.role], params[view.role]).config.taps

            def heads(features: Features) -> float:
                graph = models.graphs[view.role]
                return flops.products(lambda own, seen: nnx.merge(graph, own)(seen), params[view.role], features)

        trained = view.average is None and not view.constant
        weight = weights.get(view.role, 1.0) if trained else 1.0
        return Counter(count, weight, spec.adapters is None, config, taps, heads)

    result = []
    for update in method.updates:
        count = Count()

        def loss(weights: Any, batch: Batch, update: Any = update, count: Count = count) -> Any:
            nets = {name: network(name, count, weights) for name in models.views}
            context = Context(jnp.int32(0), jax.random.key(0), jax.random.key(1))
            return jnp.mean(update.loss(nets, batch, context)[0])

        jax.eval_shape(jax.grad(loss), {role: jnp.ones(()) for role in update.trains}, batch)
        result.append(count.total)
    return result
