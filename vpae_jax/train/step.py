"""One jitted pure function for each update of a method.

    run(state, frozen, batch, repeat) -> (state, metrics)

It differentiates the update's loss with respect to the trained role's weights alone, applies that role's optimizer and
average, and leaves everything else in the state as it is. Records come as they are stored, in bfloat16, and are
computed with in float32. The state's buffers are donated; frozen weights are an argument, never a constant of
the program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from vpae_jax import sharding
from vpae_jax.flow.draws import clip_keys
from vpae_jax.methods.base import Update
from vpae_jax.train import ema
from vpae_jax.train.roles import RoleModels
from vpae_jax.train.state import TrainState
from vpae_jax.types import Metrics, Params, in_float32

UpdateFn = Callable[[TrainState, Mapping[str, Params], Any, Any], tuple[TrainState, Metrics]]


def make_update(
    update: Update,
    index: int,
    models: RoleModels,
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
    places: TrainState | None = None,
) -> UpdateFn:
    """Builds the jitted step of one update.

    Args:
      update: what is trained, on which loss.
      index: the update's place in the method's order; part of its randomness.
      models: how weights become networks.
      optimizer: the trained role's.
      accumulation: parts that the batch is processed in, one after the other; their gradients are averaged.
      places: the state's shardings; a new state lies where the old one did. None leaves it to the compiler.

    Returns:
      The step. Its metrics are scalars named `<role>/<metric>`: the loss, what the loss reports (means over the
      batch), the gradient's, the update's and the weights' L2 norms.
    """
    role = update.trains
    decay = models.roles[role].ema

    def placed(grads: Params) -> Params:
        """Gradients lie where their weights do, so that summing them over devices leaves each its own share."""
        return grads if places is None else jax.lax.with_sharding_constraint(grads, places.params[role])

    def run(state: TrainState, frozen: Mapping[str, Params], batch: Any, repeat: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(state.key, state.step), index), repeat)
        # All roles, the trained one too: there it is a constant, since only `params` below is differentiated.
        others = {**models.networks(state.params, state.ema, frozen), "step": state.step}
        params = state.params[role]

        def differentiate(batch: Any, keys: Any) -> tuple[tuple[Array, Metrics], Params]:
            batch = in_float32(batch)  # here, so that of a batch in parts one is wide at a time

            def mean_loss(params: Params) -> tuple[Array, Metrics]:
                loss, metrics = update.loss(models.network(role, params, frozen, trained=True), others, batch, keys)
                return jnp.mean(loss), {name: jnp.mean(value) for name, value in metrics.items()}

            value, grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
            return value, placed(grads)

        keys = clip_keys(key, sharding.count_clips(batch))
        if accumulation == 1:
            (loss, metrics), grads = differentiate(batch, keys)
        else:

            def add(total: Params, part: Array) -> tuple[Params, tuple[Array, Metrics]]:
                value, grads = differentiate(*sharding.part_of((batch, keys), part, accumulation))
                return jax.tree.map(jnp.add, total, grads), value

            zeros = placed(jax.tree.map(jnp.zeros_like, params))
            total, values = jax.lax.scan(add, zeros, jnp.arange(accumulation))
            grads = jax.tree.map(lambda grad: grad / accumulation, total)
            loss, metrics = jax.tree.map(lambda value: jnp.mean(value, axis=0), values)

        steps, opt = optimizer.update(grads, state.opt[role], params)
        params = optax.apply_updates(params, steps)
        averages = dict(state.ema)
        if decay is not None:
            averages[role] = ema.update(averages[role], params, decay)
        state = replace(state, params={**state.params, role: params}, opt={**state.opt, role: opt}, ema=averages)
        scalars = {
            **metrics,
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(steps),
            "param_norm": optax.tree.norm(params),
        }
        return state, {f"{role}/{name}": value for name, value in scalars.items()}

    if places is None:
        return jax.jit(run, donate_argnums=0)
    return jax.jit(run, donate_argnums=0, out_shardings=(places, places.step))


def due(updates: tuple[Update, ...], step: int) -> list[tuple[int, Update]]:
    """The updates that run on a step, with their places in the method's order."""
    return [(i, u) for i, u in enumerate(updates) if step >= u.starts and (step - u.starts) % u.every == 0]
