"""One jitted pure function for each update of a method.

    run(state, frozen, batch, repeat) -> (state, metrics)

It differentiates the update's loss with respect to the trained role's weights alone, applies that role's optimizer and
average, and leaves everything else in the state as it is. The state's buffers are donated; frozen weights are an
argument, never a constant of the program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from vpae_jax.methods.base import Update
from vpae_jax.train import ema
from vpae_jax.train.roles import RoleModels
from vpae_jax.train.state import TrainState
from vpae_jax.types import Metrics, Params

UpdateFn = Callable[[TrainState, Mapping[str, Params], Any, Any], tuple[TrainState, Metrics]]


def make_update(update: Update, index: int, models: RoleModels, optimizer: optax.GradientTransformation) -> UpdateFn:
    """Builds the jitted step of one update.

    Args:
      update: what is trained, on which loss.
      index: the update's place in the method's order; part of its randomness.
      models: how weights become networks.
      optimizer: the trained role's.

    Returns:
      The step. Its metrics are scalars named `<role>/<metric>`: the loss, what the loss reports (means over the
      batch), the gradient's, the update's and the weights' L2 norms.
    """
    role = update.trains
    decay = models.roles[role].ema

    def run(state: TrainState, frozen: Mapping[str, Params], batch: Any, repeat: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(state.key, state.step), index), repeat)
        # All roles, the trained one too: there it is a constant, since only `params` below is differentiated.
        others = {**models.networks(state.params, state.ema, frozen), "step": state.step}

        def mean_loss(params: Params) -> tuple[Array, Metrics]:
            loss, metrics = update.loss(models.network(role, params, frozen), others, batch, key)
            return jnp.mean(loss), metrics

        params = state.params[role]
        (loss, metrics), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
        steps, opt = optimizer.update(grads, state.opt[role], params)
        params = optax.apply_updates(params, steps)
        averages = dict(state.ema)
        if decay is not None:
            averages[role] = ema.update(averages[role], params, decay)
        state = replace(state, params={**state.params, role: params}, opt={**state.opt, role: opt}, ema=averages)
        scalars = {name: jnp.mean(value) for name, value in metrics.items()}
        scalars |= {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(steps),
            "param_norm": optax.tree.norm(params),
        }
        return state, {f"{role}/{name}": value for name, value in scalars.items()}

    return jax.jit(run, donate_argnums=0)


def due(updates: tuple[Update, ...], step: int) -> list[tuple[int, Update]]:
    """The updates that run on a step, with their places in the method's order."""
    return [(i, u) for i, u in enumerate(updates) if step >= u.starts and (step - u.starts) % u.every == 0]
