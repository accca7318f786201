"""One jitted pure function for each update of a method.

    run(state, frozen, batch, repeat) -> (state, metrics)

It differentiates the update's loss with respect to the weights of the roles that it trains and nothing else, applies
each role's optimizer and averages, moves the roles that follow it, and leaves everything else in the state as it is.
Then come the updates that learn from the clips that it made (`Update.then`), if any: the clips live within the program.
Records come as they are stored, in bfloat16, and are computed with in float32. The state's buffers are donated; frozen
weights are an argument, never a constant of the program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from clu.metrics import Metric
from jax import Array

from vpae_jax import sharding
from vpae_jax.flow.draws import batch_key, clip_keys, following_key
from vpae_jax.methods.base import Context, Update
from vpae_jax.train import ema
from vpae_jax.train.roles import RoleModels
from vpae_jax.train.state import TrainState
from vpae_jax.types import Params, PRNGKey, in_float32

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
      optimizers: by role, of those that its program (`Update.program`) trains at least.
      accumulation: parts that the batch is processed in, one after the other; their gradients are averaged.
      places: the state's shardings; a new state lies where the old one did. None leaves it to the compiler.

    Returns:
      The step. Its metrics are scalars: `<update>/loss` and what the loss reports under `<update>/`, of the whole
      batch; and for each role that it trains the L2 norms `<role>/grad_norm`, `/update_norm` and `/param_norm`. Of
      updates that follow in the program, those of the last repeat.
    """

    one = partial(_Step, models=models, optimizers=optimizers, accumulation=accumulation, places=places)

    def run(
        state: TrainState, frozen: Mapping[str, Params], batch: Any, repeat: Any
    ) -> tuple[TrainState, Mapping[str, Array]]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(state.key, state.step), index), repeat)
        state, scalars, made = one(update)(state, frozen, batch, key)
        for number, following in enumerate(update.then):

            def again(state: TrainState, repeat: Any, number: int = number, following: Update = following) -> Any:
                own = following_key(key, number, repeat)
                state, scalars, _ = one(following)(state, frozen, batch, own, made)
                return state, scalars

            if following.repeats == 1:
                state, more = again(state, 0)
            else:
                state, each = jax.lax.scan(again, state, jnp.arange(following.repeats))
                more = jax.tree.map(lambda values: values[-1], each)
            scalars |= more
        return state, scalars

    if places is None:
        return jax.jit(run, donate_argnums=0)
    return jax.jit(run, donate_argnums=0, out_shardings=(places, places.step))


@dataclass(frozen=True)
class _Step:
    """One update of a state, as it is traced; fields as the arguments of `make_update`."""

    update: Update
    models: RoleModels
    optimizers: Mapping[str, optax.GradientTransformation]
    accumulation: int
    places: TrainState | None

    def __call__(
        self, state: TrainState, frozen: Mapping[str, Params], batch: Any, key: PRNGKey, made: Any = None
    ) -> tuple[TrainState, dict[str, Array], Any]:
        """The new state, metrics, and the clips that the update makes for others, if any, as these are given `made`:
        of a batch in parts, on a leading axis."""
        loss, reported, grads, made = self._differentiate(state, frozen, batch, key, made)
        scalars = {f"{self.update.name}/{name}": _finished(value) for name, value in reported.items()}
        scalars[f"{self.update.name}/loss"] = loss
        params, opt, averages = dict(state.params), dict(state.opt), dict(state.averages)
        for role in self.update.trains:
            steps, opt[role] = self.optimizers[role].update(grads[role], state.opt[role], state.params[role])
            params[role] = optax.apply_updates(state.params[role], steps)
            for name, average in self.models.roles[role].averages.items():
                name = f"{role}_{name}"
                decay = jnp.where(state.step >= average.start, average.decay, 0.0)
                averages[name] = ema.update(averages[name], params[role], decay)
            norms = {"grad_norm": grads[role], "update_norm": steps, "param_norm": params[role]}
            scalars |= {f"{role}/{name}": optax.tree.norm(tree) for name, tree in norms.items()}
        for role, kept in self.update.followers.items():
            params[role] = ema.update(params[role], params[self.update.trains[0]], kept)
        return replace(state, params=params, opt=opt, averages=averages), scalars, made

    def _differentiate(
        self, state: TrainState, frozen: Mapping[str, Params], batch: Any, key: PRNGKey, made: Any
    ) -> tuple[Array, dict[str, Any], Params, Any]:
        """Loss, what it reports, gradients and clips of the whole batch."""
        update, parts = self.update, self.accumulation
        constants = {**frozen, **state.params}
        own = {role: state.params[role] for role in update.trains}

        def of_part(batch: Any, keys: Any, given: Any) -> tuple[tuple[Array, tuple[dict[str, Any], Any]], Params]:
            batch = in_float32(batch)  # here, so that of a batch in parts one is wide at a time

            def mean_loss(trained: dict[str, Params]) -> tuple[Array, tuple[dict[str, Any], Any]]:
                nets = self.models.networks({**constants, **trained}, state.averages, constants, update.trains)
                context = Context(state.step, keys, batch_key(key), given)
                fresh = None if update.makes is None else update.makes(nets, batch, context)
                loss, reported = update.loss(nets, batch, context if fresh is None else replace(context, made=fresh))
                return jnp.mean(loss), ({name: _of_part(value) for name, value in reported.items()}, fresh)

            value, grads = jax.value_and_grad(mean_loss, has_aux=True)(own)
            return value, self._placed(grads)

        keys = clip_keys(key, sharding.count_clips(batch))
        if parts == 1:
            (loss, (reported, fresh)), grads = of_part(batch, keys, made)
            return loss, reported, grads, fresh

        def add(total: Params, part: tuple[Array, Any]) -> tuple[Params, tuple[Array, tuple[dict[str, Any], Any]]]:
            number, given = part
            clips, own_keys = sharding.part_of((batch, keys), number, parts)
            value, grads = of_part(clips, own_keys, given)
            return jax.tree.map(jnp.add, total, grads), value

        zeros = self._placed(jax.tree.map(jnp.zeros_like, own))
        total, (losses, (reported, fresh)) = jax.lax.scan(add, zeros, (jnp.arange(parts), made))
        grads = jax.tree.map(lambda grad: grad / parts, total)
        return losses.mean(), {name: _merged(value) for name, value in reported.items()}, grads, fresh

    def _placed(self, grads: Params) -> Params:
        """Gradients lie where their weights do, so that summing them over devices leaves each its own share."""
        if self.places is None:
            return grads
        return jax.lax.with_sharding_constraint(grads, {role: self.places.params[role] for role in self.update.trains})


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
    running = [(i, u) for i, u in enumerate(updates) if u.starts <= step and (u.ends is None or step < u.ends)]
    found = [(i, u) for i, u in running if (step - u.starts) % u.every == 0]
    return [(i, repeat) for i, update in found for repeat in range(update.repeats)]
