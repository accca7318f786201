"""Adversarial losses, the noise on the discriminator's input, and its finite-difference gradient penalty.

A discriminator is a set of small heads on the hidden states of a backbone: logits [b, k], high for real. The loss is
computed for each logit and averaged over k.

    kind          discriminator                        generator
    hinge         relu(1 - r) + relu(1 + f)            -f                    Miyato et al. (V-PAE's text)
    pcm_hinge     relu(1 - r) + relu(1 + f)            relu(1 - f)           PCM
    ns_logistic   softplus(-r) + softplus(f)           softplus(-f)          APT, DMD2
    rpgan         softplus(-(r - f))                   softplus(-(f - r))    AAPT, ASD
    literal       softplus(-r) + softplus(f)           -softplus(f)          V-PAE's Eq. 3

where r and f are the logits of a real and of a generated clip. Eq. 3 is log D(fake) + log(1 - D(real)), where D is the
probability of "fake"; the discriminator maximises it and the generator minimises its first term: the original
saturating GAN loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient
from jax.nn import relu, softplus
from jaxtyping import Float

from vpae_jax.flow import draws
from vpae_jax.flow.schedule import add_noise
from vpae_jax.flow.times import VALUES_720P, TimeDistribution
from vpae_jax.methods.base import FeatureExtractor, Heads
from vpae_jax.methods.common import (
    Step,
    Term,
    check_at_least,
    check_choice,
    every_kth_step,
    example_mean,
    example_sum,
    f32,
    named_keys,
    term_of,
)
from vpae_jax.types import Condition, Features, Latents, Metrics, PerExample, PRNGKey, Times, UserError

Logits = Float[Array, "b k"]
Judge = Callable[[Latents, Times], Logits]
AdversarialKind = Literal["hinge", "pcm_hinge", "ns_logistic", "rpgan", "literal"]


@dataclass(frozen=True)
class AdversarialLoss:
    """A pair of losses of (real logit, fake logit), both minimised.

    Attributes:
      discriminator: the discriminator's loss.
      generator: the generator's loss.
      relative: whether only differences of logits matter, so that the generator's loss needs the real logit.
    """

    discriminator: Callable[[Logits, Logits], Logits]
    generator: Callable[[Logits, Logits], Logits]
    relative: bool = False


def _hinge(real: Logits, fake: Logits) -> Logits:
    return relu(1 - real) + relu(1 + fake)


def _logistic(real: Logits, fake: Logits) -> Logits:
    return softplus(-real) + softplus(fake)


LOSSES: Mapping[str, AdversarialLoss] = {
    "hinge": AdversarialLoss(_hinge, lambda real, fake: -fake),
    "pcm_hinge": AdversarialLoss(_hinge, lambda real, fake: relu(1 - fake)),
    "ns_logistic": AdversarialLoss(_logistic, lambda real, fake: softplus(-fake)),
    "rpgan": AdversarialLoss(
        lambda real, fake: softplus(fake - real), lambda real, fake: softplus(real - fake), relative=True
    ),
    "literal": AdversarialLoss(_logistic, lambda real, fake: -softplus(fake)),
}


@dataclass(frozen=True)
class ConstantFeatures:
    """A backbone whose hidden states are constants: only heads are trained on them.

    Attributes:
      backbone: the network whose hidden states are read.
    """

    backbone: FeatureExtractor

    def features(self, x: Latents, t: Times, condition: Condition, taps: tuple[int, ...]) -> Features:
        return stop_gradient(self.backbone.features(x, t, condition, taps))


def judge(backbone: FeatureExtractor, heads: Heads, condition: Condition) -> Judge:
    """The discriminator as a function of (clip, timestep), in float32."""
    return lambda x, t: f32(heads(backbone.features(x, t, condition, heads.taps)))


class Judged(NamedTuple):
    """The input of the discriminator: clips and the timesteps that it is told."""

    fake: Latents
    fake_t: Times
    real: Latents
    real_t: Times


DISC_TIMES = TimeDistribution(low=0.9, high=0.999, stated_for=VALUES_720P)


@dataclass(frozen=True)
class DiscriminatorNoise:
    """How clips are noised before the discriminator sees them.

    The gradient of a logit reaches the clip through d x_t / d x0 = 1 - t, so high timesteps leave little of it, and
    t = 1 none at all (V-PAE v1).

    Attributes:
      kind: "shared": one t for a real and a generated clip, independent noise. "independent": a t for each as well
        (ASD). "fig_literal": as in figure 2, `t` for generated clips and any timestep in (0, 1] for real ones, so that
        the noise level alone tells them apart; only for reproduction. "clean": no noise, and the backbone is told a
        random timestep (APT).
      t: distribution of t.
      real: "clean" leaves real clips without noise (Eq. 3 read literally).
    """

    kind: Literal["shared", "independent", "fig_literal", "clean"] = "shared"
    t: TimeDistribution = DISC_TIMES
    real: Literal["noised", "clean"] = "noised"

    def __post_init__(self) -> None:
        choices = {"kind": ("shared", "independent", "fig_literal", "clean"), "real": ("noised", "clean")}
        check_choice("DiscriminatorNoise", choices, self)
        if self.kind == "clean" and self.real == "clean":
            raise UserError("DiscriminatorNoise.real is 'clean', but kind 'clean' noises no clip; leave real='noised'")

    @property
    def hides_clips(self) -> bool:
        """Whether generated clips are always replaced by pure noise."""
        return self.kind != "clean" and self.t.kind == "uniform" and self.t.low == 1

    def __call__(self, fake: Latents, real: Latents, key: PRNGKey) -> Judged:
        """Noises generated clips (differentiably) and real ones."""
        keys = named_keys(key, "t", "real_t", "fake_noise", "real_noise")
        t = real_t = self.t(keys.t, fake.shape)
        if self.kind == "clean":
            return Judged(fake, t, real, t)
        if self.kind == "independent":
            real_t = self.t(keys.real_t, real.shape)
        if self.kind == "fig_literal":
            real_t = TimeDistribution(stated_for=self.t.stated_for)(keys.real_t, real.shape)
        if self.real == "noised":
            real = add_noise(real, draws.normal(keys.real_noise, real.shape, real.dtype), real_t)
        return Judged(add_noise(fake, draws.normal(keys.fake_noise, fake.shape, fake.dtype), t), t, real, real_t)


@dataclass(frozen=True)
class DifferencePenalty:
    """A gradient penalty by finite differences: V-PAE's STR1 (Eq. 4), APT's approximate R1, AAPT's R1 + R2.

        mean (D(x + delta, t) - D(x, t))^2 / ||delta||^2,     delta = delta_s + delta_t = sigma_s eps_s + sigma_t eps_t

    For a linear D(x) = w x + b and independent noise the expectation is |w|^2 under "mean" and |w|^2 / d under "sum",
    for any sigma. Under "mean" the denominator is sigma_s^2 + sigma_t^2 = 0.0101 on average, so weight 1 acts as weight
    99 on the plain squared difference, close to APT's 100.

    Attributes:
      weight: 0 switches the penalty off and saves the backbone's extra evaluation.
      on: which clips are perturbed (after noising): generated ones (V-PAE), real ones (APT), or both (AAPT, AAD-1).
      sigma_s, sigma_t: standard deviations of the spatial and of the temporal perturbation.
      spatial: eps_s is drawn for every value ("iid"), or once for all frames ("shared").
      temporal: eps_t is drawn per frame and channel ("channel") or per frame ("frame"), and broadcast over rows and
        columns, or for every value ("iid").
      norm: the denominator: mean or sum of delta^2 over the clip, or 1 ("fixed", APT).
      apart: 0 perturbs a clip by both noises at once. Above 0, each noise has an evaluation of its own, and the spatial
        one has this standard deviation if sigma_s is smaller: with a = max(apart, sigma_s) / sigma_s, the squared
        difference is (D(x + a delta_s) - D(x))^2 / a^2 + (D(x + delta_t) - D(x))^2, whose expectation is the same for a
        linear D. In bfloat16 a change by sigma_s = 0.01 is mostly rounding error, and one by 0.1 is not
        (`docs/methods/discriminators.md`, "Precision of the penalty"). With both sigmas above 0 it costs one more
        evaluation of the backbone.
      every: the penalty is computed on every `every`-th step only, with its weight multiplied by `every` (StyleGAN2's
        lazy regularisation, 1912.04958, appendix B). The gradient is the same on average, but comes in large steps,
        which Adam shortens by up to the square root of `every`. `docs/methods/less_work.md` has the cost.
    """

    weight: float = 1.0
    on: Literal["fake", "real", "both"] = "fake"
    sigma_s: float = 0.01
    sigma_t: float = 0.1
    spatial: Literal["iid", "shared"] = "iid"
    temporal: Literal["channel", "frame", "iid"] = "channel"
    norm: Literal["mean", "sum", "fixed"] = "mean"
    apart: float = 0.0
    every: int = 1

    def __post_init__(self) -> None:
        choices = {
            "on": ("fake", "real", "both"),
            "spatial": ("iid", "shared"),
            "temporal": ("channel", "frame", "iid"),
            "norm": ("mean", "sum", "fixed"),
        }
        check_choice("DifferencePenalty", choices, self)
        check_at_least("DifferencePenalty", 0, weight=self.weight, sigma_s=self.sigma_s, sigma_t=self.sigma_t)
        check_at_least("DifferencePenalty", 0, apart=self.apart)
        check_at_least("DifferencePenalty", 1, every=self.every)
        if self.weight > 0 and self.sigma_s == 0 and self.sigma_t == 0:
            raise UserError("DifferencePenalty.sigma_s and sigma_t are both 0; set one, or weight=0")

    def perturbation(self, like: Latents, key: PRNGKey) -> Latents:
        """Draws delta, in the shape of `like`."""
        spatial, temporal = self.halves(like, key)
        return jnp.broadcast_to(spatial + temporal, like.shape)

    def halves(self, like: Latents, key: PRNGKey) -> tuple[Float[Array, "b _ h w c"], Float[Array, "b f _ _ _"]]:
        """Draws delta_s and delta_t, which broadcast to the shape of `like`."""
        keys = named_keys(key, "spatial", "temporal")
        b, f, h, w, c = like.shape
        spatial = {"iid": (b, f, h, w, c), "shared": (b, 1, h, w, c)}[self.spatial]
        temporal = {"channel": (b, f, 1, 1, c), "frame": (b, f, 1, 1, 1), "iid": (b, f, h, w, c)}[self.temporal]
        noise = self.sigma_s * draws.normal(keys.spatial, spatial, like.dtype)
        return noise, self.sigma_t * draws.normal(keys.temporal, temporal, like.dtype)

    def ratio(self, change: Logits, delta: Float[Array, "b *shape"]) -> PerExample:
        """change^2, averaged over a clip's logits, divided by the chosen norm of delta."""
        squared = example_mean(change**2)
        if self.norm == "fixed":
            return squared
        return squared / (example_mean if self.norm == "mean" else example_sum)(delta**2)

    def __call__(self, judge: Judge, shown: Judged, real_logit: Logits, fake_logit: Logits, key: PRNGKey) -> PerExample:
        """The unweighted penalty of each clip; the logits of `shown` are given, so each side costs one evaluation."""
        keys = named_keys(key, "fake", "real")
        total = jnp.zeros(len(fake_logit))
        if self.on in ("fake", "both"):
            total += self._of_clips(judge, shown.fake, shown.fake_t, fake_logit, keys.fake)
        if self.on in ("real", "both"):
            total += self._of_clips(judge, shown.real, shown.real_t, real_logit, keys.real)
        return total

    def _of_clips(self, judge: Judge, x: Latents, t: Times, logit: Logits, key: PRNGKey) -> PerExample:
        delta = self.perturbation(x, key)
        if not self.apart:
            return self.ratio(judge(x + delta, t) - logit, delta)
        spatial, temporal = self.halves(x, key)
        total = jnp.zeros(len(x))
        if self.sigma_s:
            gain = max(1.0, self.apart / self.sigma_s)
            total += self.ratio((judge(x + gain * spatial, t) - logit) / gain, delta)
        if self.sigma_t:
            total += self.ratio(judge(x + temporal, t) - logit, delta)
        return total


NO_PENALTY = DifferencePenalty(weight=0.0)


def discriminator_loss(
    judge: Judge, shown: Judged, kind: AdversarialKind, penalty: DifferencePenalty, key: PRNGKey, step: Step
) -> tuple[PerExample, Metrics]:
    """The discriminator's loss of each pair of clips.

    Args:
      judge: the discriminator, differentiated in those of its weights that are being trained.
      shown: noised clips, constants.
      kind: the adversarial loss.
      penalty: the gradient penalty.
      key: for the penalty's perturbations.
      step: completed steps.

    Returns:
      The loss, and as metrics the logits, their gap, the accuracy (of the sign, or of the order for a relative loss)
      and the penalty (0 on a step without it).
    """
    real, fake = judge(shown.real, shown.real_t), judge(shown.fake, shown.fake_t)
    return loss_of_logits(judge, shown, real, fake, kind, penalty, key, step)


def loss_of_logits(
    judge: Judge,
    shown: Judged,
    real: Logits,
    fake: Logits,
    kind: AdversarialKind,
    penalty: DifferencePenalty,
    key: PRNGKey,
    step: Step,
) -> tuple[PerExample, Metrics]:
    """`discriminator_loss`, given the logits of `shown`, for example from a forward pass with several uses."""
    adversarial = LOSSES[kind]
    loss = example_mean(adversarial.discriminator(real, fake))
    metrics = {
        "real_logit": real.mean(),
        "fake_logit": fake.mean(),
        "logit_gap": (real - fake).mean(),
        "accuracy": accuracy(real, fake, adversarial.relative),
        "adversarial": loss.mean(),
    }
    if penalty.weight:
        value = every_kth_step(penalty.every, step, lambda: penalty(judge, shown, real, fake, key))
        loss = loss + penalty.weight * penalty.every * value
        metrics["penalty"] = value.mean()
    return loss, metrics


def generator_loss(judge: Judge, shown: Judged, kind: AdversarialKind) -> tuple[PerExample, Logits]:
    """The generator's adversarial loss of each clip, differentiable in the generated clips of `shown`, and the logits.

    A relative loss also evaluates the real clips.
    """
    loss = LOSSES[kind]
    fake = judge(shown.fake, shown.fake_t)
    real = judge(shown.real, shown.real_t) if loss.relative else jnp.zeros_like(fake)
    return example_mean(loss.generator(real, fake)), fake


def adversarial_term(
    judge: Judge, noise: DiscriminatorNoise, kind: AdversarialKind, x0: Latents, data: Latents, key: PRNGKey
) -> tuple[Term, Metrics, Times]:
    """The generator's unweighted adversarial term of each clip.

    Args:
      judge: the discriminator, none of whose weights is being trained.
      noise: how clips are noised for it.
      kind: the adversarial loss.
      x0: generated clips, constants.
      data: real clips.
      key: for the noise.

    Returns:
      The term, the logits as a metric, and the timesteps told to the discriminator for the generated clips.
    """

    def loss(x: Latents) -> tuple[PerExample, tuple[Logits, Times]]:
        shown = noise(x, data, key)
        value, logit = generator_loss(judge, shown, kind)
        return value, (logit, shown.fake_t)

    term, (logit, t) = term_of(loss, x0)
    return term, {"fake_logit": logit}, t


def accuracy(real: Logits, fake: Logits, relative: bool) -> Float[Array, ""]:
    """Fraction of logits with the right sign or, for a relative loss, of pairs in the right order. Ties count half."""
    if relative:
        return 0.5 + 0.5 * jnp.sign(real - fake).mean()
    return 0.5 + 0.25 * (jnp.sign(real) - jnp.sign(fake)).mean()
