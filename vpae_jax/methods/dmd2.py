"""DMD2: improved distribution matching distillation (2405.14867), on a rectified flow.

x0 is the generator's clip, generated in one evaluation or a few (`distillation.FewStepDistillation` has the backward
simulation of section 4.5), x_t' = (1 - t') x0 + t' eps' the same clip noised, r a real clip, D = heads on the features
of the fake score:

    (1)  grad_x0 L_DMD = (x0_fake(x_t', t') - x0_real(x_t', t')) / mean |x0 - x0_real|     `scores.DistributionMatching`
    (2)  L_G           = L_DMD + w_G softplus(-D(x_t'', t''))                              section 4.3
    (3)  L_fake        = ||v_fake(x_t', t') - (eps' - x0)||^2 + w_D (softplus(D(x_t', t')) + softplus(-D(r_t', t')))

x0_real is guided, x0_fake never. (3) is one loss for the fake score and the heads, minimised N times per update of the
generator (two time-scale update rule, section 4.2). Velocity and features of the generated clip come from one pass.
With features of the frozen teacher, the second half of (3) trains only the heads.

Where sources differ (DMD2's own code; Wan's ports: Self-Forcing-Plus, FastGen, One-Forcing, CausVid), the default and
the alternatives:

    steps              4 with re-noising, at 1, .75, .5, .25 shifted by 5 (Self-Forcing-Plus) | 1 | FastGen: 2
    inputs             "simulated" (DMD2, Self-Forcing) | "noised_real" (FastGen, CausVid)
    t'                 U(.02, .98) raw, shift 5, clipped (Self-Forcing-Plus) | unshifted (DMD2) | (.001, .999) (FastGen)
    guidance           w = 5 (FastGen's Wan; Self-Forcing-Plus: 7 for I2V-14B, 6 for T2V-14B) | 8 (SDXL)
    fake score         "full" (DMD2) | "lora" (a Wan port, rank 128);  fake_loss = velocity | x0 (FastGen)
    N                  5
    w_G, w_D           .03, .03 (One-Forcing; FastGen: .03, 1) | .005, .01 (SDXL) | 0, 0 (Self-Forcing: no heads)
    D's features       "fake_score" (DMD2) | "teacher" (FastGen)
    D's noise          (3) has one t' for both clips and both halves (FastGen); One-Forcing draws another one for both
                       clips, DMD2 one for each clip
    real_noise         "own" (DMD2) | "shared": both clips have the same noise (FastGen, One-Forcing)
    D's penalty        none | FastGen's optional one on real clips, weight 100 to 1000, sigma .1 (APT's)
    ida                none | .97 (SenseFlow)

DMD2 tells its one-step SDXL student the timestep 399 of 1000 instead of the last, and starts it from a regression on
pairs of noise and clip. Here the student is told 1, as in the Wan ports; `kd.KnowledgeDistillation` is the regression.
DMD2-v, the video form that TMD (2601.09881) compares with, is this method with heads of kind "conv3d", a regression
before its one-step student, and shifts of 5 for t' and 10 for the student: `configs/dmd2v.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from jax.lax import stop_gradient

from vpae_jax.flow import draws
from vpae_jax.flow.schedule import add_noise
from vpae_jax.methods.adversarial import (
    LOSSES,
    AdversarialKind,
    ConstantFeatures,
    DifferencePenalty,
    DiscriminatorNoise,
    Judged,
    adversarial_term,
    judge,
    loss_of_logits,
)
from vpae_jax.methods.base import Context, Nets, Role, Update
from vpae_jax.methods.common import (
    Ratio,
    Term,
    check_at_least,
    check_choice,
    drift,
    f32,
    inject,
    named_keys,
    real_clips,
)
from vpae_jax.methods.distillation import FakeScoreDistillation, FewStepDistillation
from vpae_jax.methods.scores import velocity_error
from vpae_jax.types import Batch, Latents, Metrics, PerExample, PRNGKey, UserError

# FastGen's, which is off there as well.
PENALTY = DifferencePenalty(weight=0.0, on="real", sigma_s=0.1, sigma_t=0.0, norm="fixed")


@dataclass(frozen=True)
class DMD2(FewStepDistillation, FakeScoreDistillation):
    """Distribution matching with a discriminator on the fake score.

    Attributes:
      fake: how the fake score is trained: a full copy of the teacher, or low-rank adapters on it.
      ida: fraction of its own weights that a full fake score keeps when it is moved towards the generator, after each
        update of the latter (SenseFlow: 0.97); 0 switches this off.
      adversarial: the pair of adversarial losses.
      adversarial_weight: w_G of Eq. 2.
      disc_weight: w_D of Eq. 3. Both are 0 for distribution matching alone, without heads.
      disc_backbone: the network whose features the heads read. "fake_score" is trained by both halves of Eq. 3.
      real_noise: whether a real clip has noise of its own in Eq. 3, or that of the generated one.
      penalty: gradient penalty of the discriminator; its weight is relative to the adversarial loss, and w_D multiplies
        both.
      ema: decay of the generator's average (Self-Forcing's).
    """

    fake: Literal["full", "lora"] = "full"
    ida: float = 0.0
    adversarial: AdversarialKind = "ns_logistic"
    adversarial_weight: float = 0.03
    disc_weight: float = 0.03
    disc_backbone: Literal["fake_score", "teacher"] = "fake_score"
    real_noise: Literal["own", "shared"] = "own"
    penalty: DifferencePenalty = PENALTY
    ema: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "fake": ("full", "lora"),
            "adversarial": tuple(LOSSES),
            "disc_backbone": ("fake_score", "teacher"),
            "real_noise": ("own", "shared"),
        }
        check_choice("DMD2", choices, self)
        check_at_least("DMD2", 0, adversarial_weight=self.adversarial_weight, disc_weight=self.disc_weight)
        if (self.adversarial_weight > 0) != (self.disc_weight > 0):
            raise UserError(
                f"DMD2.adversarial_weight is {self.adversarial_weight} and disc_weight {self.disc_weight}: a "
                "discriminator needs both weights; set both above 0, or both to 0"
            )
        _ = self.updates  # raises if `ida` is invalid, or the networks differ in shape

    @property
    def judged(self) -> bool:
        """Whether there is a discriminator."""
        return self.disc_weight > 0

    @property
    def without_clips(self) -> Mapping[str, Any]:
        return {**self.from_noise, "adversarial_weight": 0.0, "disc_weight": 0.0}

    @property
    def roles(self) -> Mapping[str, Role]:
        roles = {
            "generator": self.generator_role,
            "teacher": Role("pretrained"),
            "fake_score": self.fake_score_role(self.fake),
        }
        return roles | ({"heads": Role("fresh", True, part="heads")} if self.judged else {})

    @property
    def updates(self) -> tuple[Update, ...]:
        followed = ("fake_score", "heads") if self.judged else ("fake_score",)
        return self.ordered_updates(
            Update(followed, self.fake_score_loss, repeats=self.fake_updates),
            Update(("generator",), self.generator_loss, followers=self.aligned(self.fake, self.ida)),
        )

    def generator_loss(self, nets: Nets, batch: Batch, context: Context) -> tuple[PerExample, Metrics]:
        """Eq. 2.

        Metrics in addition to `common.drift`: the gap of the scores, the logit, the per-clip L2 norms of both weighted
        gradients with respect to x0, and the ratio of these norms.
        """
        keys = named_keys(context.clips, "images", "generate", "matching", "noise")
        make = partial(self.generate, nets, context=context, key=keys.generate)
        batch, x0 = self.with_clips(batch, context, keys.images, make)
        constant, condition = stop_gradient(x0), batch.condition
        scores = nets["teacher"], nets["fake_score"]
        matching, metrics = self.matching(constant, *scores, condition, batch.unconditional, keys.matching)
        metrics = {**metrics, **drift(constant, batch.latents)}
        judged, more = self.judged_term(nets, batch, context, constant, keys.noise)
        if judged is None:
            return inject(x0, matching), metrics
        metrics |= more
        metrics["adv_dmd_ratio"] = Ratio(judged.grad_norm.sum(), matching.grad_norm.sum())
        return inject(x0, matching, judged), metrics

    def judged_term(
        self, nets: Nets, batch: Batch, context: Context, x0: Latents, key: PRNGKey
    ) -> tuple[Term | None, Metrics]:
        """The generator's weighted adversarial term, with clips as constants, and metrics; None without a
        discriminator."""
        if not self.judged:
            return None, {}
        discriminator = judge(nets[self.disc_backbone], nets["heads"], batch.condition)
        noise, data = DiscriminatorNoise(t=self.fake_t), real_clips(batch)
        term, metrics, _ = adversarial_term(discriminator, noise, self.adversarial, x0, data, key)
        weighted = term.scaled(self.adversarial_weight)
        return weighted, {"adversarial": term.value, "adv_grad": weighted.grad_norm, **metrics}

    def fake_score_loss(self, nets: Nets, batch: Batch, context: Context) -> tuple[PerExample, Metrics]:
        """Eq. 3."""
        keys = named_keys(context.clips, "images", "generate", "t", "noise", "real_noise", "penalty")
        make = partial(self.constant, nets, context=context, key=keys.generate)
        batch, x0 = self.with_clips(batch, context, keys.images, make)
        condition, fake = batch.condition, nets["fake_score"]
        t, noise = self.fake_t(keys.t, x0.shape), draws.normal(keys.noise, x0.shape, x0.dtype)
        x = add_noise(x0, noise, t)
        if not self.judged:
            return velocity_error(fake(x, t, condition), x0, noise, t, self.fake_loss), {}
        heads, backbone = nets["heads"], nets[self.disc_backbone]
        if self.disc_backbone == "fake_score":
            v, features = fake.velocity_and_features(x, t, condition, heads.taps)
        else:
            backbone = ConstantFeatures(backbone)
            v, features = fake(x, t, condition), backbone.features(x, t, condition, heads.taps)
        own = self.real_noise == "own"
        real_noise = draws.normal(keys.real_noise, x0.shape, x0.dtype) if own else noise
        shown = Judged(x, t, add_noise(real_clips(batch), real_noise, t), t)
        discriminator = judge(backbone, heads, condition)
        logits = discriminator(shown.real, t), f32(heads(features))
        followed = velocity_error(v, x0, noise, t, self.fake_loss)
        told_apart, metrics = loss_of_logits(
            discriminator, shown, *logits, self.adversarial, self.penalty, keys.penalty, context.step
        )
        return followed + self.disc_weight * told_apart, {"diffusion": followed, **metrics}
