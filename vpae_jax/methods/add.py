"""ADD, adversarial diffusion distillation (2311.17042), in its latent form (LADD, 2403.12015), on a rectified flow.

r is a real clip, x_s = (1 - s) r + s eps the same noised to one of the student's times, x0 = x_s - s v(x_s, s) the
student's clip. Both clips are noised again, x_t = (1 - t) x0 + t eps', r_t = (1 - t) r + t eps'', and shown to D, heads
on the hidden states of the frozen teacher:

    (1)  L_D = relu(1 - D(r_t, t)) + relu(1 + D(x_t, t)) + gamma (D(r_t + sigma n, t) - D(r_t, t))^2
    (2)  L_G = -D(x_t, t) + lambda c(t') ||x0 - x0_teacher(sg(x_t'), t')||^2,    c(t') = 1 - t'

LADD has no distance to the teacher: its real clips are the teacher's, made with guidance (`python -m vpae_jax.encode
--teacher=...`). ADD's own discriminator looks at pixels (`methods.pixels`): clips are decoded, not noised. The student
is sampled in a few steps, each of which predicts a clip and noises it afresh to the next time.

Where sources differ, the default and the alternatives:

    s             1, .75, .5, .25, shifted by 5 for Wan (FastGen). For 500 steps the lower two alone; then 1 in 7 of 10
                  draws, the others in 1 each (LADD) | each equally often: pure_noise=.25, early_steps=0 (ADD)
    x_s           "noised_real" | "simulated": the student's own earlier steps, as it is sampled (DMD2)
    t             logit-normal (1, 1) on the raw axis, shifted by 5 for 720p, one for both clips. LADD's, for images, is
                  not shifted; in clips of few values the mean has to fall, as this one's does | uniform (FastGen)
    L_D, L_G      "hinge" | "ns_logistic" (FastGen)
    D's backbone  "frozen_teacher" (LADD) | "image_encoder": decoded frames (ADD, by DINOv2; here by CLIP), with
                  noise.kind = "clean"
    heads         after every block, of 1x1 convolutions (LADD: of 2-D ones) | FastGen: three blocks
    gamma, sigma  .1, .1 (FastGen, whose code sets D(r + sigma n, t), not noised, against D(r_t, t)) | ADD: R1 on the
                  heads' inputs, 1e-5
    lambda        2.5 (ADD) | 0 (LADD, on the teacher's clips). ADD sums the square, csds.reduction="sum": millions of
                  values, beside which no logit is heard; here it is their mean
    c, t', guidance of the teacher    1 - t' (ADD) | "one"; V-PAE's U(.02, .98), shift 5, and 1: unstated
    updates of D for one of G         1 (FastGen); unstated

Every logit is judged alone, and the losses are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from vpae_jax.flow.times import VALUES_720P, TimeDistribution
from vpae_jax.methods import pixels
from vpae_jax.methods.adversarial import DifferencePenalty, DiscriminatorNoise
from vpae_jax.methods.base import Context, Nets, Role, View
from vpae_jax.methods.common import check_at_least, check_choice, check_fraction, named_keys
from vpae_jax.methods.distillation import FewStepDistillation, Step
from vpae_jax.methods.judged import JudgedDistillation, with_distance
from vpae_jax.methods.scores import ScoreDistillation
from vpae_jax.types import Batch, Metrics, PerExample

RENOISED = DiscriminatorNoise(t=TimeDistribution("logit_normal", mean=1.0, shift=5.0, stated_for=VALUES_720P))
R1 = DifferencePenalty(weight=0.1, on="real", sigma_s=0.1, sigma_t=0.0, norm="fixed")
TEACHER = ScoreDistillation(weight=2.5, time_weight="one_minus_t")


@dataclass(frozen=True)
class ADD(FewStepDistillation, JudgedDistillation):
    """Adversarial distillation with a frozen backbone of the discriminator.

    Attributes:
      backbone: what the heads read: the teacher's hidden states, or those of an image encoder of decoded frames.
      inputs: what the generator denoises in training, at one of the student's times; one step starts from pure noise.
      pure_noise: how likely the first of these times is, pure noise; the others share the rest.
      early_steps: steps of the training at whose times only the cleaner half is met, rounded up, each equally often.
      adversarial_weight: of the generator's adversarial term.
      csds: the distance to the teacher; its weight is lambda.
    """

    backbone: Literal["frozen_teacher", "image_encoder"] = "frozen_teacher"
    inputs: Literal["simulated", "noised_real"] = "noised_real"
    pure_noise: float = 0.7
    early_steps: int = 500
    adversarial_weight: float = 1.0
    noise: DiscriminatorNoise = RENOISED
    penalty: DifferencePenalty = R1
    csds: ScoreDistillation = TEACHER

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("ADD", {"backbone": ("frozen_teacher", "image_encoder")}, self)
        check_fraction("ADD", pure_noise=self.pure_noise)
        check_at_least("ADD", 0, early_steps=self.early_steps, adversarial_weight=self.adversarial_weight)
        if self.sees_pixels:
            pixels.check_distance("ADD", self.csds)

    @property
    def roles(self) -> Mapping[str, Role]:
        roles = {
            "generator": self.generator_role,
            "teacher": Role("pretrained"),
            "heads": Role("fresh", True, part="heads"),
        }
        return {**roles, **(pixels.ROLES if self.backbone == "image_encoder" else {})}

    @property
    def views(self) -> Mapping[str, View]:
        return {**super().views, **({} if self.sees_pixels else {"backbone": View("teacher")})}

    def chances(self, step: Step) -> Float[Array, "steps"]:
        """How likely each of the student's times is at a step of the training, the noisiest first."""
        if self.steps == 1:
            return jnp.ones(1)
        others, cleaner = self.steps - 1, -(-self.steps // 2)
        late = [self.pure_noise] + [(1 - self.pure_noise) / others] * others
        early = [0.0] * (self.steps - cleaner) + [1 / cleaner] * cleaner
        return jnp.where(step < self.early_steps, *np.array([early, late], np.float32))

    def generator_loss(self, nets: Nets, batch: Batch, context: Context) -> tuple[PerExample, Metrics]:
        """Eq. 2.

        Metrics besides `common.drift`: both terms' values, the logits and, for a clip, the L2 norms of their weighted
        gradients with respect to x0 and the ratio of these.
        """
        keys = named_keys(context.clips, "images", "generate", "noise", "csds")
        make = partial(self.generate, nets, context=context, key=keys.generate)
        batch, x0 = self.with_clips(batch, context, keys.images, make)
        term, metrics, disc_t = self.judged_term(nets, batch, context, x0, keys.noise)
        judged = term.scaled(self.adversarial_weight)
        loss, more = with_distance(x0, judged, self.csds, nets, batch, disc_t, keys.csds, context.step)
        return loss, {**metrics, **more}
