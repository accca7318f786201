"""What several methods share: random keys by name, reductions, guided predictions, and gradients with respect to x0.

A generator's loss is built from `Term`s: each knows its value and its gradient with respect to the generated clip, so
both can be reported. The gradient is computed first, on a constant copy of the clip, and then *injected*: a
discriminator's backbone or a teacher has run backwards, and freed its activations, before the generator's backward
begins, and the reported norm costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient
from jaxtyping import Float

from vpae_jax.flow import draws
from vpae_jax.flow.guidance import guided
from vpae_jax.flow.schedule import velocity_to_x0
from vpae_jax.methods.base import Velocity
from vpae_jax.types import Batch, Condition, Latents, Metrics, PerExample, PRNGKey, Times, UserError


def named_keys(key: PRNGKey, *names: str) -> SimpleNamespace:
    """One independent key a name, as attributes: `keys = named_keys(key, "t", "noise"); keys.t`.

    Keys of clips give keys of clips.
    """
    if len(set(names)) != len(names):
        raise ValueError(f"a name is repeated in {names}: two draws would share one key")
    count = len(names)
    # Clips stay on the leading axis only within each name's keys.
    keys = (
        jax.vmap(lambda own: jax.random.split(own, count), out_axes=1)(key)
        if key.ndim
        else jax.random.split(key, count)
    )
    return SimpleNamespace(**dict(zip(names, keys, strict=True)))


def f32(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """A network's output in float32: losses are never computed in less."""
    return x.astype(jnp.float32)


def example_mean(x: Float[Array, "b *shape"]) -> PerExample:
    """Mean over everything but the batch."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def example_sum(x: Float[Array, "b *shape"]) -> PerExample:
    """Sum over everything but the batch."""
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))


class Term(NamedTuple):
    """One term of a generator's loss.

    Attributes:
      value: the term of each clip.
      grad: gradient of each clip's value with respect to that clip.
    """

    value: PerExample
    grad: Latents

    def scaled(self, weight: float) -> Term:
        """The term times a weight."""
        return Term(weight * self.value, weight * self.grad)

    @property
    def grad_norm(self) -> Float[Array, ""]:
        """L2 norm of a clip's gradient, mean over the batch."""
        return jnp.sqrt(example_sum(self.grad**2)).mean()


def inject(x0: Latents, *terms: Term) -> PerExample:
    """The sum of the terms, as a function of x0 whose gradient is the sum of their gradients.

    Args:
      x0: generated clips, attached to the generator.
      terms: computed from a constant copy of x0.
    """
    value = stop_gradient(sum(term.value for term in terms))
    grad = stop_gradient(sum(term.grad for term in terms))
    linear = example_sum(x0 * grad)
    # The difference is exactly 0, so the value keeps all its digits.
    return value + (linear - stop_gradient(linear))


def predict_x0(
    network: Velocity,
    x: Latents,
    t: Times,
    condition: Condition,
    unconditional: Condition | None = None,
    guidance: float = 1.0,
) -> Latents:
    """The network's x0 at (x, t) in float32, guided when `guidance` is not 1 (one more evaluation)."""
    v = f32(network(x, t, condition))
    if guidance != 1:
        if unconditional is None:
            raise ValueError(f"guidance {guidance} needs the unconditional inputs")
        v = guided(f32(network(x, t, unconditional)), v, guidance)
    return velocity_to_x0(v, x, t)


def drift(x0: Latents, data: Latents) -> Metrics:
    """How far generated latents have moved from the data's: collapse and colour drift show here first.

    Returns:
      x0_mean_drift: mean over channels of the distance between the channel's means.
      x0_std_ratio: standard deviation over that of the data.
    """
    axes = tuple(range(x0.ndim - 1))
    return {
        "x0_mean_drift": jnp.abs(x0.mean(axes) - data.mean(axes)).mean(),
        "x0_std_ratio": x0.std() / jnp.maximum(data.std(), 1e-6),
    }


def check_choice(owner: str, choices: Mapping[str, tuple[Any, ...]], values: Any) -> None:
    """Raises UserError, naming the field, unless each named attribute of `values` is one of its choices."""
    for name, allowed in choices.items():
        value = getattr(values, name)
        if value not in allowed:
            raise UserError(f"{owner}.{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")


def check_at_least(owner: str, low: int, **fields: float | int) -> None:
    """Raises UserError, naming the field, unless each value is at least `low`."""
    for name, value in fields.items():
        if not value >= low:
            raise UserError(f"{owner}.{name} is {value}, expected {low} or more")


def check_fraction(owner: str, **fields: float | int) -> None:
    """Raises UserError, naming the field, unless each value is in [0, 1]."""
    for name, value in fields.items():
        if not 0 <= value <= 1:
            raise UserError(f"{owner}.{name} is {value}, expected a number between 0 and 1")


def drop_conditions(batch: Batch, key: PRNGKey, text: float, image: float) -> Condition:
    """The batch's conditions with some removed, independently an example.

    Args:
      batch: clips with their conditions and the negative prompt.
      key: random key.
      text: probability that a prompt becomes the negative prompt.
      image: probability that the image states and the given frames become zeros, which means "no image given": one
        network thereby learns text-to-video and image-to-video.
    """
    keys = named_keys(key, "text", "image")
    condition = batch.condition
    size = condition.text.shape[0]
    no_text = draws.bernoulli(keys.text, text, size)
    no_image = draws.bernoulli(keys.image, image, size)
    null = batch.unconditional

    def without_image(x):
        return None if x is None else jnp.where(no_image.reshape((size,) + (1,) * (x.ndim - 1)), jnp.zeros_like(x), x)

    return replace(
        condition,
        text=jnp.where(no_text[:, None, None], null.text, condition.text),
        text_mask=jnp.where(no_text[:, None], null.text_mask, condition.text_mask),
        image=without_image(condition.image),
        frames=without_image(condition.frames),
    )
