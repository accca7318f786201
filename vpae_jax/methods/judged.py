"""Base of the methods that train a generator against a discriminator.

    JudgedDistillation    the updates of generator and discriminator, and the discriminator's loss
    with_distance         the generator's adversarial term plus its distance to the teacher

The discriminator is a set of heads on the hidden states of "backbone". A role of this name is trained together with the
heads, by one loss; a view of this name is constant in their loss. Instead of a backbone a method may have the roles of
`pixels.ROLES`: then the heads read an image encoder, which sees decoded frames.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from jax.lax import stop_gradient

from vpae_jax.flow import draws
from vpae_jax.methods import pixels
from vpae_jax.methods.adversarial import (
    LOSSES,
    AdversarialKind,
    ConstantFeatures,
    DifferencePenalty,
    DiscriminatorNoise,
    adversarial_term,
    discriminator_loss,
    judge,
)
from vpae_jax.methods.base import Context, FeatureExtractor, Nets, Update
from vpae_jax.methods.common import (
    Ratio,
    Step,
    Term,
    check_at_least,
    check_choice,
    drift,
    every_kth_step,
    inject,
    is_due,
    named_keys,
    predict_x0,
    real_clips,
)
from vpae_jax.methods.distillation import TaughtDistillation
from vpae_jax.methods.scores import ScoreDistillation
from vpae_jax.types import Batch, Latents, Metrics, PerExample, PRNGKey, Times

SHARED_NOISE = DiscriminatorNoise()
STR1 = DifferencePenalty()


@dataclass(frozen=True)
class JudgedDistillation(TaughtDistillation):
    """A method with roles "generator" and "heads", and a network "backbone" or the roles of a discriminator on pixels.

    Attributes:
      adversarial: the pair of adversarial losses.
      noise: how clips are noised for the discriminator.
      penalty: the discriminator's gradient penalty.
      disc_updates: updates of the discriminator per update of the generator.
      disc_warmup: number of first steps in which only the discriminator is trained.
    """

    adversarial: AdversarialKind = "hinge"
    noise: DiscriminatorNoise = SHARED_NOISE
    penalty: DifferencePenalty = STR1
    disc_updates: int = 1
    disc_warmup: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        check_choice(owner, {"adversarial": tuple(LOSSES)}, self)
        check_at_least(owner, 0, disc_warmup=self.disc_warmup)
        check_at_least(owner, 1, disc_updates=self.disc_updates)
        if self.noise.kind == "fig_literal":
            warnings.warn(
                f"{owner}.noise.kind is 'fig_literal': the noise level alone tells real from generated clips",
                stacklevel=4,
            )
        if self.sees_pixels:
            pixels.check_noise(owner, self.noise)
        if self.noise.hides_clips:
            warnings.warn(
                f"{owner}.noise.t is always 1: the discriminator is shown pure noise, and the generator learns nothing "
                "from it",
                stacklevel=4,
            )

    @property
    def sees_pixels(self) -> bool:
        """Whether the discriminator sees decoded frames."""
        return pixels.ENCODER in self.roles

    @property
    def trains_backbone(self) -> bool:
        """Whether the discriminator's loss also trains its backbone."""
        return "backbone" in self.roles

    @property
    def updates(self) -> tuple[Update, ...]:
        trained = ("heads", "backbone") if self.trains_backbone else ("heads",)
        return self.ordered_updates(
            Update(trained, self.discriminator_loss, repeats=self.disc_updates),
            Update(("generator",), self.generator_loss, starts=self.disc_warmup, delay="disc_warmup"),
        )

    def backbone_of(self, nets: Nets, batch: Batch, context: Context) -> FeatureExtractor:
        """The network whose features the heads read."""
        return pixels.look(nets, batch.shape[1], context) if self.sees_pixels else nets["backbone"]

    def generate(self, nets: Nets, batch: Batch, context: Context, key: PRNGKey) -> Latents:
        """x0 = eps - v(eps, 1) in float32: one evaluation, from pure noise.

        Args:
          key: for per-clip draws.
        """
        noise = draws.normal(key, batch.shape, jnp.float32)
        return predict_x0(nets["generator"], noise, jnp.ones(len(noise)), batch.condition)

    def discriminator_loss(self, nets: Nets, batch: Batch, context: Context) -> tuple[PerExample, Metrics]:
        """The adversarial loss of a generated and a real clip, plus the penalty."""
        keys = named_keys(context.clips, "images", "generate", "noise", "penalty")
        make = partial(self.generate, nets, context=context, key=keys.generate)
        batch, x0 = self.with_clips(batch, context, keys.images, make)
        shown = self.noise(stop_gradient(x0), real_clips(batch), keys.noise)
        backbone = self.backbone_of(nets, batch, context)
        judged = judge(backbone if self.trains_backbone else ConstantFeatures(backbone), nets["heads"], batch.condition)
        return discriminator_loss(judged, shown, self.adversarial, self.penalty, keys.penalty, context.step)

    @abstractmethod
    def generator_loss(self, nets: Nets, batch: Batch, context: Context) -> tuple[PerExample, Metrics]:
        """The generator's loss, which includes `judged_term`."""

    def judged_term(
        self, nets: Nets, batch: Batch, context: Context, x0: Latents, key: PRNGKey
    ) -> tuple[Term, Metrics, Times]:
        """The generator's unweighted adversarial term, metrics, and the timesteps told to the discriminator for x0."""
        constant, data = stop_gradient(x0), real_clips(batch)
        judged = judge(self.backbone_of(nets, batch, context), nets["heads"], batch.condition)
        term, metrics, t = adversarial_term(judged, self.noise, self.adversarial, constant, data, key)
        return term, {"adversarial": term.value, **metrics, **drift(constant, batch.latents)}, t


def with_distance(
    x0: Latents,
    adversarial: Term | None,
    distance: ScoreDistillation,
    nets: Nets,
    batch: Batch,
    disc_t: Times,
    key: PRNGKey,
    step: Step,
) -> tuple[PerExample, Metrics]:
    """The generator's loss: a weighted adversarial term, if any, plus the weighted distance to the teacher.

    Args:
      x0: the clips, attached to the generator.
      disc_t: the timesteps told to the discriminator.
      step: completed steps.

    Returns:
      The sum, and as metrics the distance, the per-clip L2 norms of both weighted gradients with respect to x0, and
      their ratio; each of these is 0 on a step without the distance.
    """
    terms: dict[str, Term] = {} if adversarial is None else {"adv": adversarial}
    metrics = {}
    if distance.weight:
        measure = partial(distance, x0, nets["teacher"], batch.condition, batch.unconditional, key, disc_t)
        term = every_kth_step(distance.every, step, measure)
        metrics["csds"], terms["csds"] = term.value, term.scaled(distance.weight * distance.every)
    metrics |= {f"{name}_grad": term.grad_norm for name, term in terms.items()}
    if len(terms) == 2:
        above, below = (term.grad_norm.sum() for term in terms.values())
        compared = above if distance.every == 1 else jnp.where(is_due(distance.every, step), above, 0.0)
        metrics["adv_csds_ratio"] = Ratio(compared, below)
    return inject(x0, *terms.values()) if terms else jnp.zeros(len(x0)), metrics
