"""V-PAE: Phased One-Step Adversarial Equilibrium for Video Diffusion Models (2508.21019v2).

Phase one, stability priming. x_t is a noised real clip, x0 = x_t - t mu(x_t, t) the generator's clip, and x_t' the
generator's clip after noising it again:

    Eq. 1   grad D_KL = E[-(s_real(x_t') - s_fake(x_t')) d mu / d theta]          `scores.DistributionMatching`
    Eq. 2   L_fake    = E ||nu - mu_fake(x_t', t')||^2,  nu = eps' - x0           `scores.fake_score_loss`

Phase two, unified adversarial equilibrium. x0 = eps - mu(eps, 1); D = heads on the hidden states of the generator's own
average, which is never differentiated:

    Eq. 3   L_UAE                                                                `adversarial.LOSSES`
    Eq. 4   L_STR1    = E (D(x_t + delta) - D(x_t))^2 / ||delta||^2              `adversarial.DifferencePenalty`
    Eq. 5   L_C-SDS   = E ||x0 - x0_real(sg(x_t'), t')||^2                       `scores.ScoreDistillation`
    Eq. 6   L_G       = L_UAE-G + lambda L_C-SDS,   lambda = 10
    Eq. 7   L_D       = L_UAE-D + L_STR1

Order of a step. Phase one: the fake score `fake_updates` times, each on new clips, then the generator. Phase two: the
heads `disc_updates` times (together with the backbone, for "full_copy"), then the generator, then its average.

Where the text is open, the default and the alternatives (with reasons in `docs/methods/vpae.md`):

    Eq. 1's "d mu / d theta"       on x0 (with a velocity network the literal text has the wrong sign)
    Eq. 1's weight                 matching.weighting = x0_norm | none | t2;  matching.floor
    x_t of phase one               input = noised_real (figure 2) | pure_noise | anneal (version 1's abstract)
    t in [.9T, T]                  t: U(.9, 1) on the sigma axis | on the raw axis, t.shift=5
    t' in (0, T]                   matching.t, fake_t: U(.02, .98) raw, shift 5, clipped | unshifted | (.001, .999)
    guidance of s_real             matching.guidance = 5 | 1 | 3.5 to 7
    Eq. 2's nu                     fake_loss = velocity | x0
    how the fake score trains      fake = lora (rank, scale) | full, which ida may also move towards the generator
    how the generator trains       generator = full | lora (rank, scale)
    fake score updates per step    fake_updates = 5;  count = generator | all (are 500 steps the generator's, or all?)
    Eq. 3's form                   adversarial = hinge | ns_logistic | rpgan | pcm_hinge | literal
    Eq. 3's backbone               backbone = ema | online_sg | online_trainable | full_copy | frozen_teacher |
                                   image_encoder (ADD's choice: decoded frames)
    the discriminator's noise      noise.kind = shared | fig_literal | clean;  noise.t, noise.real
    Eq. 4's sample                 penalty.on = fake | real | both
    Eq. 4's noise and norm         penalty.spatial, penalty.temporal, penalty.norm = mean | sum | fixed
    Eq. 5's t', guidance, norm     csds.times = own | discriminator, csds.t, .guidance, .reduction, .time_weight
    Eq. 5's region                 csds.frames
    lambda                         csds.weight = 10
    type of the heads              config.networks.heads.kind = ca_mm | ca | conv | conv3d
    updates and warm-up of D       disc_updates, disc_warmup

Ranges of t are stated for 720p and translated to the size of the batch's clips, in which the same noise hides more
(`TimeDistribution.stated_for`). At [0.9, 0.999] the adversarial gradient reaches x0 through a factor 1 - t of at most
0.1 and drowns next to lambda = 10: watch `adv_csds_ratio`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
from jax.lax import stop_gradient

from vpae_jax.flow import draws
from vpae_jax.flow.sampler import ONE_STEP
from vpae_jax.flow.schedule import add_noise
from vpae_jax.flow.times import VALUES_720P, TimeDistribution
from vpae_jax.methods import pixels
from vpae_jax.methods.adversarial import generator_loss, judge
from vpae_jax.methods.base import EMA, Context, Nets, Role, Student, Update, View
from vpae_jax.methods.common import (
    check_at_least,
    check_choice,
    check_fraction,
    drift,
    inject,
    named_keys,
    predict_x0,
    real_clips,
)
from vpae_jax.methods.distillation import FakeScoreDistillation
from vpae_jax.methods.judged import JudgedDistillation, with_distance
from vpae_jax.methods.scores import ScoreDistillation, fake_score_loss
from vpae_jax.types import Batch, Latents, Metrics, PerExample, PRNGKey, UserError

PRIMING_TIMES = TimeDistribution(low=0.9, stated_for=VALUES_720P)
CSDS = ScoreDistillation()


@dataclass(frozen=True)
class PhaseOne(FakeScoreDistillation):
    """Stability priming.

    Attributes:
      input: what the generator denoises: a noised real clip, pure noise at t = 1, or a noised real clip whose range of
        t starts at `anneal_from` and reaches `t` after `anneal_steps` steps (high to low signal-to-noise ratio).
      t: distribution of the generator's timestep; must be of kind "uniform" for "anneal".
      anneal_from: lower end of t at step 0, on the axis on which `t` is stated.
      anneal_steps: steps until the lower end is that of `t`.
      fake: how the fake score is trained: low-rank adapters on the teacher, or a full copy.
      ida: fraction of its own weights that a full fake score keeps when it is moved towards the generator, after each
        update of the latter (SenseFlow: 0.97); 0 switches this off.
      count: what a step is: a "generator" update after `fake_updates` of the fake score, or with "all" one update of
        the fake score, with a generator update after every `fake_updates`-th.
    """

    input: Literal["noised_real", "pure_noise", "anneal"] = "noised_real"
    t: TimeDistribution = PRIMING_TIMES
    anneal_from: float = 0.5
    anneal_steps: int = 500
    fake: Literal["lora", "full"] = "lora"
    ida: float = 0.0
    count: Literal["generator", "all"] = "generator"

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "input": ("noised_real", "pure_noise", "anneal"),
            "fake": ("lora", "full"),
            "count": ("generator", "all"),
        }
        check_choice("PhaseOne", choices, self)
        check_fraction("PhaseOne", anneal_from=self.anneal_from)
        check_at_least("PhaseOne", 1, anneal_steps=self.anneal_steps)
        _ = self.updates  # raises if `ida` is invalid, or the networks differ in shape
        if self.clips == "generator" and self.count == "all":
            raise UserError(
                "PhaseOne.clips is 'generator', but with count='all' most steps have no update of the generator; set "
                "count='generator', or clips='own'"
            )
        if self.input == "anneal" and self.t.kind != "uniform":
            raise UserError(f"PhaseOne.t is {self.t.kind!r}, which has no lower end to anneal; set t.kind='uniform'")

    @property
    def without_clips(self) -> Mapping[str, Any]:
        return {"input": "pure_noise"}

    @property
    def roles(self) -> Mapping[str, Role]:
        return {
            "generator": self.generator_role,
            "teacher": Role("pretrained"),
            "fake_score": self.fake_score_role(self.fake),
        }

    @property
    def updates(self) -> tuple[Update, ...]:
        fake_score = Update(("fake_score",), self.fake_score_loss)
        generator = Update(("generator",), self.generator_loss, followers=self.aligned(self.fake, self.ida))
        if self.count == "all":
            last = self.fake_updates - 1
            return fake_score, replace(generator, every=self.fake_updates, starts=last, delay="fake_updates")
        return self.ordered_updates(replace(fake_score, repeats=self.fake_updates), generator)

    @property
    def student(self) -> Student:
        return self.sampled_by(ONE_STEP)

    def generate(self, nets: Nets, batch: Batch, context: Context, key: PRNGKey) -> Latents:
        """Generates clips in one evaluation, float32."""
        generator = nets["generator"]
        keys = named_keys(key, "t", "noise")
        noise = draws.normal(keys.noise, batch.shape, jnp.float32)
        if self.input == "pure_noise":
            return predict_x0(generator, noise, jnp.ones(len(noise)), batch.condition)
        if self.input == "anneal":
            progress = jnp.clip(context.step / self.anneal_steps, 0.0, 1.0).astype(jnp.float32)
            t = self.t(keys.t, batch.shape, self.anneal_from + progress * (self.t.low - self.anneal_from))
        else:
            t = self.t(keys.t, batch.shape)
        return predict_x0(generator, add_noise(real_clips(batch), noise, t), t, batch.condition)

    def generator_loss(self, nets: Nets, batch: Batch, context: Context) -> tuple[PerExample, Metrics]:
        """Eq. 1."""
        keys = named_keys(context.clips, "images", "generate", "matching")
        make = partial(self.generate, nets, context=context, key=keys.generate)
        batch, x0 = self.with_clips(batch, context, keys.images, make)
        term, metrics = self.matching(
            x0, nets["teacher"], nets["fake_score"], batch.condition, batch.unconditional, keys.matching
        )
        return inject(x0, term), {**metrics, **drift(stop_gradient(x0), batch.latents)}

    def fake_score_loss(self, nets: Nets, batch: Batch, context: Context) -> tuple[PerExample, Metrics]:
        """Eq. 2."""
        keys = named_keys(context.clips, "images", "generate", "loss")
        make = partial(self.generate, nets, context=context, key=keys.generate)
        batch, x0 = self.with_clips(batch, context, keys.images, make)
        return fake_score_loss(nets["fake_score"], x0, batch.condition, self.fake_t, keys.loss, self.fake_loss), {}


BackboneKind = Literal["ema", "online_sg", "online_trainable", "full_copy", "frozen_teacher", "image_encoder"]
# The network whose hidden states the heads read; a full copy is a role of its own, and an image encoder reads pixels.
BACKBONES: Mapping[str, View | None] = {
    "ema": View("generator", EMA),
    "online_sg": View("generator", constant=True),
    "online_trainable": View("generator"),
    "full_copy": None,
    "frozen_teacher": View("teacher"),
    "image_encoder": None,
}


@dataclass(frozen=True)
class PhaseTwo(JudgedDistillation):
    """Unified adversarial equilibrium.

    Attributes:
      adversarial: Eq. 3's form.
      adversarial_weight: of the generator's adversarial term.
      backbone: the network whose hidden states the heads read. "ema": the generator's average. "online_sg": the
        generator's current weights, as constants. "online_trainable": the same, but the generator is also trained as
        the backbone, and can lower its loss by blinding the discriminator. "full_copy": a second copy of the
        teacher, trained with the heads by their loss (Table 3 "Trained"; one more set of weights and moments).
        "frozen_teacher": Table 3's "Frozen". "image_encoder": none of these; frames are decoded and read by a frozen
        image encoder (`methods.pixels`).
      noise: how clips are noised for the discriminator.
      penalty: Eq. 4; its weight, 1, is that of Eq. 7.
      csds: Eq. 5; its weight is lambda.
      init: where the generator starts; "pretrained" is the ablation without phase one.
    """

    adversarial_weight: float = 1.0
    backbone: BackboneKind = "ema"
    csds: ScoreDistillation = CSDS
    init: Literal["pretrained", "previous"] = "previous"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("PhaseTwo", {"backbone": tuple(BACKBONES)}, self)
        check_at_least("PhaseTwo", 0, adversarial_weight=self.adversarial_weight)
        if self.backbone == "ema" and not self.ema:
            raise UserError("PhaseTwo.backbone is 'ema', but ema is 0, which keeps no average; set a decay below 1")
        if self.sees_pixels:
            pixels.check_distance("PhaseTwo", self.csds)
        if self.backbone == "online_trainable":
            warnings.warn(
                "PhaseTwo.backbone is 'online_trainable': the generator can lower its loss by blinding its own "
                "discriminator",
                stacklevel=3,
            )

    @property
    def roles(self) -> Mapping[str, Role]:
        roles = {
            "generator": self.generator_role,
            "teacher": Role("pretrained"),
            "heads": Role("fresh", True, part="heads"),
        }
        more = {"full_copy": {"backbone": Role("pretrained", True)}, "image_encoder": pixels.ROLES}
        return {**roles, **more.get(self.backbone, {})}

    @property
    def views(self) -> Mapping[str, View]:
        judged = BACKBONES[self.backbone]
        return {} if judged is None else {"backbone": judged}

    @property
    def student(self) -> Student:
        return self.sampled_by(ONE_STEP)

    def generator_loss(self, nets: Nets, batch: Batch, context: Context) -> tuple[PerExample, Metrics]:
        """Eq. 6; Eq. 7 is `discriminator_loss`.

        Metrics in addition to `common.drift`: the values of both terms, the per-clip L2 norms of their weighted
        gradients with respect to x0, and the ratio of these norms. "online_trainable" has no separate adversarial
        gradient to report.
        """
        keys = named_keys(context.clips, "images", "generate", "noise", "csds")
        make = partial(self.generate, nets, context=context, key=keys.generate)
        batch, x0 = self.with_clips(batch, context, keys.images, make)
        if self.backbone == "online_trainable":
            shown = self.noise(x0, real_clips(batch), keys.noise)
            judged = judge(nets["backbone"], nets["heads"], batch.condition)
            direct, logit = generator_loss(judged, shown, self.adversarial)
            metrics = {"adversarial": direct, "fake_logit": logit, **drift(stop_gradient(x0), batch.latents)}
            term, disc_t = None, shown.fake_t
        else:
            term, metrics, disc_t = self.judged_term(nets, batch, context, x0, keys.noise)
            direct, term = 0.0, term.scaled(self.adversarial_weight)
        loss, more = with_distance(x0, term, self.csds, nets, batch, disc_t, keys.csds, context.step)
        return self.adversarial_weight * direct + loss, {**metrics, **more}
