"""MagicDistillation, weak-to-strong video distillation (W2SVD, 2503.13319), on a rectified flow.

One set of low-rank weights W on the frozen teacher serves both scores: the fake score is teacher + W, and the real one
is teacher + a W with a small a, so that the two stay near each other, whereas plain distribution matching (a = 0) is
unstable. x0 is the generator's clip, generated from a noised real clip c; x_t' = (1 - t') x0 + t' eps':

    (1)  real          = teacher + a W, a = .25;   fake = teacher + W
    (2)  grad_x0 L_DMD = (x0_fake(x_t', t') - x0_real(x_t', t')) / mean |x0 - x0_real|     `scores.DistributionMatching`
    (3)  grad_x0 L_reg = (x0_fake(x_t', t') - c) / mean |x0 - c|                           KL(fake || ground truth)
    (4)  L_G           = L_DMD + w_reg L_reg + w_adv L_adv
    (5)  L_fake        = ||v_fake(x_t', t') - (eps' - x0)||^2,   and the discriminator's loss for its heads

(3) is (2) with the real clip in place of the real score's prediction. The discriminator's heads read the generator's
own hidden states of noised clips, as constants. At a = 0, (2) is DMD with a low-rank fake score; at a = 1 it is 0
except for guidance. The strong scale is 1: any other is `fake_scale` times it.

Stated: a = 0.25 is best; the generator's inputs are noised real clips at the student's timesteps (for one step, pure
noise); 4 steps or 1. The code is not public, and no available source states the rest. The default and its reason:

    fake_rank, fake_scale   128, .5, as V-PAE's phase one
    fake_updates            5, as DMD2
    matching, fake_t        V-PAE's phase one's; guidance of the real score 5
    truth_weight            w_reg = 1; that (3) has the normaliser and the x_t' of (2) is also our reading
    adversarial             "ns_logistic", as DMD2
    adversarial_weight      w_adv = .03, as FastGen's DMD2 for Wan
    noise                   one t for real and generated clips, drawn as t'; independent noise
    heads                   "after the final double block" is HunyuanVideo's 20th of 60, so config.networks.heads.taps
                            is one block at a third of the depth; their kind is the preset's
    the heads' backbone     the generator's current weights, as constants
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from jax.lax import stop_gradient

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
from vpae_jax.methods.base import Context, Nets, Role, Update, View
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
from vpae_jax.methods.distillation import FakeScoreDistillation, FewStepDistillation
from vpae_jax.methods.scores import SCORE_TIMES, fake_score_loss
from vpae_jax.types import Batch, Metrics, PerExample

NOISE = DiscriminatorNoise(t=SCORE_TIMES)
NO_PENALTY = DifferencePenalty(weight=0.0)


@dataclass(frozen=True)
class Magic(FewStepDistillation, FakeScoreDistillation):
    """Weak-to-strong distribution matching. "Unstated" means that no public source of the paper gives a value.

    Attributes:
      weak: a of Eq. 1, in [0, 1].
      truth_weight: w_reg of Eq. 4; unstated.
      adversarial: the pair of adversarial losses; unstated.
      adversarial_weight: w_adv of Eq. 4; unstated. 0 leaves the heads out.
      noise: how clips are noised for the discriminator; unstated.
      inputs: by default as in the paper's figure; simulated inputs have no ground truth of their own.
    """

    weak: float = 0.25
    truth_weight: float = 1.0
    adversarial: AdversarialKind = "ns_logistic"
    adversarial_weight: float = 0.03
    noise: DiscriminatorNoise = NOISE
    inputs: Literal["simulated", "noised_real"] = "noised_real"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("Magic", {"adversarial": tuple(LOSSES)}, self)
        check_fraction("Magic", weak=self.weak)
        check_at_least("Magic", 0, truth_weight=self.truth_weight, adversarial_weight=self.adversarial_weight)

    @property
    def judged(self) -> bool:
        """Whether there is a discriminator."""
        return self.adversarial_weight > 0

    @property
    def without_clips(self) -> Mapping[str, Any]:
        return {**self.from_noise, "truth_weight": 0.0, "adversarial_weight": 0.0}

    @property
    def roles(self) -> Mapping[str, Role]:
        roles = {
            "generator": self.generator_role,
            "teacher": Role("pretrained"),
            "fake_score": self.fake_score_role("lora"),
        }
        return roles | ({"heads": Role("fresh", True, part="heads")} if self.judged else {})

    @property
    def views(self) -> Mapping[str, View]:
        views = {**super().views, "real_score": View("fake_score", scale=self.weak, constant=True)}
        return views | ({"backbone": View("generator", constant=True)} if self.judged else {})

    @property
    def updates(self) -> tuple[Update, ...]:
        followed = ("fake_score", "heads") if self.judged else ("fake_score",)
        return self.ordered_updates(
            Update(followed, self.fake_score_loss, repeats=self.fake_updates),
            Update(("generator",), self.generator_loss),
        )

    def generator_loss(self, nets: Nets, batch: Batch, context: Context) -> tuple[PerExample, Metrics]:
        """Eq. 4.

        Metrics in addition to those of the matching and `common.drift`: the values of the other terms, and the per-clip
        L2 norms of their weighted gradients with respect to x0.
        """
        keys = named_keys(context.clips, "images", "generate", "matching", "noise")
        make = partial(self.generate, nets, context=context, key=keys.generate)
        batch, x0 = self.with_clips(batch, context, keys.images, make)
        constant, condition = stop_gradient(x0), batch.condition
        x, t = self.matching.noised(constant, keys.matching)
        real = predict_x0(nets["real_score"], x, t, condition, batch.unconditional, self.matching.guidance)
        fake = predict_x0(nets["fake_score"], x, t, condition)
        matching, metrics = self.matching.term(constant, real, fake, t)
        terms, metrics = [matching], {**metrics, **drift(constant, batch.latents)}
        if self.truth_weight:
            truth, _ = self.matching.term(constant, real_clips(batch), fake, t)
            terms.append(truth.scaled(self.truth_weight))
            metrics |= {"truth": truth.value, "truth_grad": terms[-1].grad_norm}
        if self.judged:
            discriminator = judge(nets["backbone"], nets["heads"], condition)
            data = real_clips(batch)
            term, more, _ = adversarial_term(discriminator, self.noise, self.adversarial, constant, data, keys.noise)
            terms.append(term.scaled(self.adversarial_weight))
            metrics |= {"adversarial": term.value, "adv_grad": terms[-1].grad_norm, **more}
        return inject(x0, *terms), metrics

    def fake_score_loss(self, nets: Nets, batch: Batch, context: Context) -> tuple[PerExample, Metrics]:
        """Eq. 5. Its two halves share the generated clips, but no weights."""
        keys = named_keys(context.clips, "images", "generate", "loss", "noise", "penalty")
        make = partial(self.constant, nets, context=context, key=keys.generate)
        batch, x0 = self.with_clips(batch, context, keys.images, make)
        followed = fake_score_loss(nets["fake_score"], x0, batch.condition, self.fake_t, keys.loss, self.fake_loss)
        if not self.judged:
            return followed, {}
        shown = self.noise(x0, real_clips(batch), keys.noise)
        discriminator = judge(ConstantFeatures(nets["backbone"]), nets["heads"], batch.condition)
        told_apart, metrics = discriminator_loss(
            discriminator, shown, self.adversarial, NO_PENALTY, keys.penalty, context.step
        )
        return followed + told_apart, {"diffusion": followed, **metrics}
