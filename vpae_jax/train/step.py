"""One jitted pure function for each update of a method.

    run(state, frozen, batch, repeat) -> (state, metrics)

It differentiates the update's loss with respect to the weights of the roles that it trains and nothing else, applies
each role's optimizer and averages, moves the roles that follow it, and leaves everything else in the state as it is.
Records come as they are stored, in bfloat16, and are computed with in float32. The state's buffers are donated; frozen
weights are an argument, never a constant of the program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from clu.metrics import Metric
from jax import Array

from vpae_jax import sharding
from vpae_jax.flow.draws import batch_key, clip_keys
from vpae_jax.methods.base import Context, Update
from vpae_jax.train import ema
from vpae_jax.train.roles import RoleModels
from vpae_jax.train.state import TrainState
from vpae_jax.types import Params, in_float32

UpdateFn = Callable[[TrainState, Mapping[str, Params], Any, Any], tuple[TrainState, Mapping[str, Array]]]


def make_update(
    update: Update,
    index: int,
    models: RoleModels,
    optimizers: Mapping[str, optax.GradientTransformation],
    accumulation: int = 1,
    places: TrainState | None = None,
) -> UpdateFn:
    """Builds the jitted step of one update.

    Args:
      update: what is trained, on which loss.
      index: the update's place in the method's order; part of its randomness.
      models: how weights become networks.
      optimizers: by role, of those that it trains at least.
      accumulation: parts that the batch is processed in, one after the other; their gradients are averaged.
      places: the state's shardings; a new state lies where the old one did. None leaves it to the compiler.

    Returns:
      The step. Its metrics are scalars: `<update>/loss` and what the loss reports under `<update>/`, of the whole
      batch; and for each role that it trains the L2 norms `<role>/grad_norm`, `/update_norm` and `/param_norm`.
    """

    def run(
        state: TrainState, frozen: Mapping[str, Params], batch: Any, repeat: Any
    ) -> tuple[TrainState, Mapping[str, Array]]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(state.key, state.step), index), repeat)
        constants = {**frozen, **state.params}
        own = {role: state.params[role] for role in update.trains}

        def placed(grads: Params) -> Params:
            """Gradients lie where their weights do, so that summing them over devices leaves each its own share."""
            if places is None:
                return grads
            return jax.lax.with_sharding_constraint(grads, {role: places.params[role] for role in update.trains})

        def differentiate(batch: Any, keys: Any) -> tuple[tuple[Array, dict[str, Any]], Params]:
            batch = in_float32(batch)  # here, so that of a batch in parts one is wide at a time
            context = Context(state.step, keys, batch_key(key))

            def mean_loss(trained: dict[str, Params]) -> tuple[Array, dict[str, Any]]:
                nets = models.networks({**constants, **trained}, state.averages, constants, update.trains)
                loss, reported = update.loss(nets, batch, context)
                return jnp.mean(loss), {name: _of_part(value) for name, value in reported.items()}

            value, grads = jax.value_and_grad(mean_loss, has_aux=True)(own)
            return value, placed(grads)

        keys = clip_keys(key, sharding.count_clips(batch))
        if accumulation == 1:
            (loss, reported), grads = differentiate(batch, keys)
        else:

            def add(total: Params, part: Array) -> tuple[Params, tuple[Array, dict[str, Any]]]:
                value, grads = differentiate(*sharding.part_of((batch, keys), part, accumulation))
                return jax.tree.map(jnp.add, total, grads), value

            zeros = placed(jax.tree.map(jnp.zeros_like, own))
            total, values = jax.lax.scan(add, zeros, jnp.arange(accumulation))
            grads = jax.tree.map(lambda grad: grad / accumulation, total)
            loss = values[0].mean()
            reported = {name: _merged(value) for name, value in values[1].items()}

        scalars = {f"{update.name}/{name}": _finished(value) for name, value in reported.items()}
        scalars[f"{update.name}/loss"] = loss
        params, opt, averages = dict(state.params), dict(state.opt), dict(state.averages)
        for role in update.trains:
            steps, opt[role] = optimizers[role].update(grads[role], state.opt[role], state.params[role])
            params[role] = optax.apply_updates(state.params[role], steps)
            for name, average in models.roles[role].averages.items():
                name = f"{role}_{name}"
                decay = jnp.where(state.step >= average.start, average.decay, 0.0)
                averages[name] = ema.update(averages[name], params[role], decay)
            norms = {"grad_norm": grads[role], "update_norm": steps, "param_norm": params[role]}
            scalars |= {f"{role}/{name}": optax.tree.norm(tree) for name, tree in norms.items()}
        for role, kept in update.followers.items():
            params[role] = ema.update(params[role], params[update.trains[0]], kept)
        return replace(state, params=params, opt=opt, averages=averages), scalars

    if places is None:
        return jax.jit(run, donate_argnums=0)
    return jax.jit(run, donate_argnums=0, out_shardings=(places, places.step))


def _of_part(value: Array | Metric) -> Array | Metric:
    """A reported number of a batch, or of a part of one."""
    return value if isinstance(value, Metric) else jnp.mean(value)


def _merged(parts: Any) -> Any:
    """The same of a batch, from those of its parts along the first axis."""
    return parts.reduce() if isinstance(parts, Metric) else jnp.mean(parts, axis=0)


def _finished(value: Array | Metric) -> Array:
    return value.compute() if isinstance(value, Metric) else value


def due(updates: tuple[Update, ...], step: int) -> list[tuple[int, int]]:
    """What runs on a step, in order: the place of an update among the method's, and which repeat it is."""
    found = [(i, u) for i, u in enumerate(updates) if step >= u.starts and (step - u.starts) % u.every == 0]
    return [(i, repeat) for i, update in found for repeat in range(update.repeats)]
