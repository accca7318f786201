"""What several methods share: random keys by name, reductions, guided predictions, and gradients with respect to x0.

A generator's loss is built from `Term`s, each with its value and its gradient with respect to the generated clip, so
that both can be reported. The gradient is computed first, on a constant copy of the clip, and then *injected*: the
backward pass of a discriminator's backbone or a teacher has finished, and freed its activations, before that of the
generator begins, and reporting the norm costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from clu.metrics import Metric
from flax import struct
from jax import Array
from jax.lax import stop_gradient
from jaxtyping import Bool, Float, Int

from vpae_jax.flow import draws
from vpae_jax.flow.guidance import guided
from vpae_jax.flow.schedule import velocity_to_x0
from vpae_jax.methods.base import Velocity
from vpae_jax.types import Batch, Condition, Latents, Metrics, PerExample, PRNGKey, Times, UserError

T = TypeVar("T")
Step = Int[Array, ""] | int


def named_keys(key: PRNGKey, *names: str) -> SimpleNamespace:
    """One independent key per name, as attributes: `keys = named_keys(key, "t", "noise"); keys.t`.

    Per-clip keys give per-clip keys.
    """
    if len(set(names)) != len(names):
        raise ValueError(f"a name is repeated in {names}: two draws would share one key")
    return SimpleNamespace(**dict(zip(names, draws.split(key, len(names)), strict=True)))


def f32(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """A network's output in float32; losses are never computed in lower precision."""
    return x.astype(jnp.float32)


def real_clips(batch: Batch) -> Latents:
    """The batch's real clips, in float32.

    Raises:
      ValueError: the batch has none, because the method declares that it does not need them (`Method.needs_clips`).
    """
    if batch.latents is None:
        raise ValueError("a loss reads real clips, but the batch has prompts only; correct the method's needs_clips")
    return f32(batch.latents)


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

    def scaled(self, weight: float | Float[Array, ""]) -> Term:
        """The term times a weight."""
        return Term(weight * self.value, weight * self.grad)

    @property
    def grad_norm(self) -> PerExample:
        """L2 norm of each clip's gradient."""
        return jnp.sqrt(example_sum(self.grad**2))


def term_of(loss: Callable[[Latents], tuple[PerExample, Any]], x0: Latents) -> tuple[Term, Any]:
    """The term of a per-clip loss, and the second result of the loss.

    Args:
      loss: a loss none of whose weights is being trained.
      x0: clips, as constants.
    """
    value, backward, more = jax.vjp(loss, x0, has_aux=True)
    return Term(value, backward(jnp.ones_like(value))[0]), more


def inject(x0: Latents, *terms: Term) -> PerExample:
    """The sum of the terms, as a function of x0 whose gradient is the sum of their gradients.

    Args:
      x0: generated clips, attached to the generator.
      terms: computed from a constant copy of x0.
    """
    value = stop_gradient(sum(term.value for term in terms))
    grad = stop_gradient(sum(term.grad for term in terms))
    linear = example_sum(x0 * grad)
    # The difference is exactly 0, so the value loses no precision.
    return value + (linear - stop_gradient(linear))


def predict_x0(
    network: Velocity,
    x: Latents,
    t: Times,
    condition: Condition,
    unconditional: Condition | None = None,
    guidance: float = 1.0,
) -> Latents:
    """The network's x0 at (x, t) in float32, guided if `guidance` is not 1 (one more evaluation)."""
    return velocity_to_x0(guided_velocity(network, x, t, condition, unconditional, guidance), x, t)


def guided_velocity(
    network: Velocity,
    x: Latents,
    t: Times,
    condition: Condition,
    unconditional: Condition | None,
    guidance: float,
) -> Latents:
    """The network's velocity at (x, t) in float32, guided if `guidance` is not 1 (one more evaluation)."""
    v = f32(network(x, t, condition))
    if guidance == 1:
        return v
    if unconditional is None:
        raise ValueError(f"guidance {guidance} needs the unconditional inputs")
    return guided(f32(network(x, t, unconditional)), v, guidance)


class Sums(Metric):
    """A metric of a whole batch whose fields are sums over clips, so that processing in parts gives the same value."""

    def merge(self, other: Sums) -> Sums:
        return jax.tree.map(jnp.add, self, other)


@struct.dataclass
class MeanDrift(Sums):
    """Distance between the channel means of two sets, averaged over channels."""

    x0: Float[Array, "*parts c"]
    data: Float[Array, "*parts c"]
    count: Float[Array, "*parts"]

    def compute(self) -> Float[Array, ""]:
        return jnp.abs(self.x0 - self.data).mean() / self.count


@struct.dataclass
class StdRatio(Sums):
    """The standard deviation of one set over that of another."""

    x0: Float[Array, "*parts"]
    x0_squares: Float[Array, "*parts"]
    data: Float[Array, "*parts"]
    data_squares: Float[Array, "*parts"]
    count: Float[Array, "*parts"]

    def compute(self) -> Float[Array, ""]:
        def std(total: Float[Array, ""], squares: Float[Array, ""]) -> Float[Array, ""]:
            return jnp.sqrt(jnp.maximum(squares / self.count - (total / self.count) ** 2, 0.0))

        return std(self.x0, self.x0_squares) / jnp.maximum(std(self.data, self.data_squares), 1e-6)


@struct.dataclass
class Ratio(Sums):
    """The mean of one per-clip quantity divided by the mean of another."""

    above: Float[Array, "*parts"]
    below: Float[Array, "*parts"]

    def compute(self) -> Float[Array, ""]:
        return self.above / jnp.maximum(self.below, 1e-12)


def drift(x0: Latents, data: Latents | None) -> Metrics:
    """How far generated latents have moved from the data; collapse and colour drift show here first.

    Returns:
      x0_mean_drift: distance between the channel means, averaged over channels.
      x0_std_ratio: standard deviation divided by that of the data.
      Empty if there are no real clips.
    """
    if data is None:
        return {}
    data, axes = f32(data), tuple(range(x0.ndim - 1))
    clips, values = jnp.float32(len(x0)), x0[0].size

    def per_clip(x: Latents) -> Float[Array, ""]:
        return x.sum() / values  # divided before the sum over clips, so that sums stay small

    return {
        "x0_mean_drift": MeanDrift(clips * x0.mean(axes), clips * data.mean(axes), clips),
        "x0_std_ratio": StdRatio(per_clip(x0), per_clip(x0**2), per_clip(data), per_clip(data**2), clips),
    }


def is_due(every: int, step: Step) -> Bool[Array, ""]:
    """Whether a term that is computed every `every` steps is part of the current step, with `step` completed before it.

    It is part of steps number `every`, 2 `every`, and so on.
    """
    return (jnp.asarray(step) + 1) % every == 0


def every_kth_step(every: int, step: Step, term: Callable[[], T]) -> T:
    """`term()` on every `every`-th step (`is_due`), and zeros on the others.

    On the others it is computed neither forwards nor backwards. All devices take the same branch, so it may contain
    collectives. The name of the scope tells `planning.flops` how often the branch is taken.
    """
    if every == 1:
        return term()
    shapes = jax.eval_shape(term)
    with jax.named_scope(f"every_{every}_steps"):
        return jax.lax.cond(
            is_due(every, step), term, lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        )


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


def check_decay(owner: str, **fields: float) -> None:
    """Raises UserError, naming the field, unless each value is the decay of an average: 0 (none), or up to below 1."""
    for name, value in fields.items():
        if not 0 <= value < 1:
            raise UserError(f"{owner}.{name} is {value}, expected a decay below 1, or 0 for no average")


def drop_conditions(batch: Batch, key: PRNGKey, text: float, image: float) -> Condition:
    """The batch's conditions with some removed at random, independently for each example.

    Args:
      batch: clips with their conditions and the negative prompt.
      key: random key.
      text: probability that a prompt becomes the negative prompt.
      image: probability that the image states and the given frames become zeros, which means "no image given", so that
        one network learns text-to-video and image-to-video.
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
