"""APT, diffusion adversarial post-training (2501.08316), on a rectified flow; with other settings AAD-1 and AAPT.

A one-step generator and a discriminator of its own size are trained against each other on real clips, without a
teacher. x0 = eps - v(eps, 1) is the generator's clip, r a real one, D heads on the hidden states of a transformer that
starts from the diffusion model's weights, not from the generator's. All of D is trained, by one loss:

    (1)  L_D = softplus(-D(r, t)) + softplus(D(x0, t)) + lambda (D(r + sigma n, t) - D(r, t))^2
    (2)  L_G = softplus(-D(x0, t))

The last part of (1) approximates R1, the squared gradient at real clips; without it L_D falls to 0 and the generator
collapses. D sees clips without noise. t, the same for both clips, is only told to its transformer: with t = 0, which
would be true, training collapses, so t is drawn from all timesteps, most of them noisy.

                   APT, the default                     AAD-1 (2606.03972)               AAPT (2506.09350)
    G starts from  consistency distillation (`LCM`),    distribution matching (`DMD2`)   consistency distillation
                   squared, guidance 7.5
    noise.kind     "clean", both told t                 "shared": both noised to t       as APT
    noise.t        U(0, 1), shift 12 (images: 1)        U(0, 1)                          U(0, 1)
    adversarial    "ns_logistic"                        "ns_logistic"                    "rpgan"
    penalty        on real, 100, sigma .1 (images .01)  on both, 20, .05                 on both, 1000, .1
    ema            .995                                 .98                              unstated here

For AAD-1 and AAPT these are only the bidirectional parts: their generators are causal. The penalty's square is not
divided (norm="fixed"). The shift is stated for 720p, the size of APT's videos. APT trains on images first; here it is
trained on videos only.

The optimizer, RMSProp with a decay of 0.9 and without weight decay or clipping, is set in `configs/apt.py`. Its updates
do not depend on the scale of the loss, so the generator's only term has no weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from vpae_jax.flow.sampler import ONE_STEP
from vpae_jax.flow.times import VALUES_720P, TimeDistribution
from vpae_jax.methods.adversarial import AdversarialKind, DifferencePenalty, DiscriminatorNoise
from vpae_jax.methods.base import Context, Nets, Role, Student
from vpae_jax.methods.common import inject, named_keys
from vpae_jax.methods.judged import JudgedDistillation
from vpae_jax.types import Batch, Metrics, PerExample

CLEAN = DiscriminatorNoise("clean", TimeDistribution(shift=12.0, stated_for=VALUES_720P))
R1 = DifferencePenalty(weight=100.0, on="real", sigma_s=0.1, sigma_t=0.0, norm="fixed")


@dataclass(frozen=True)
class APT(JudgedDistillation):
    """A one-step generator against a discriminator whose backbone is trained, too.

    Attributes:
      noise: how clips are noised for the discriminator, and which timesteps it is told.
      penalty: the last part of Eq. 1.
      init: where the generator starts; the discriminator's backbone always starts from the model directory.
    """

    adversarial: AdversarialKind = "ns_logistic"
    noise: DiscriminatorNoise = CLEAN
    penalty: DifferencePenalty = R1
    init: Literal["pretrained", "previous"] = "previous"

    @property
    def roles(self) -> Mapping[str, Role]:
        roles = {
            "generator": self.generator_role,
            "heads": Role("fresh", True, part="heads"),
            "backbone": Role("pretrained", True),
        }
        return roles if self.generator == "full" else roles | {"teacher": Role("pretrained")}

    @property
    def student(self) -> Student:
        return self.sampled_by(ONE_STEP)

    def generator_loss(self, nets: Nets, batch: Batch, context: Context) -> tuple[PerExample, Metrics]:
        """Eq. 2; Eq. 1 is `discriminator_loss`.

        Metrics in addition to `common.drift`: the loss, the logits, and the per-clip L2 norm of the gradient with
        respect to x0.
        """
        keys = named_keys(context.clips, "images", "generate", "noise")
        make = partial(self.generate, nets, context=context, key=keys.generate)
        batch, x0 = self.with_clips(batch, context, keys.images, make)
        term, metrics, _ = self.judged_term(nets, batch, context, x0, keys.noise)
        return inject(x0, term), {**metrics, "adv_grad": term.grad_norm}
