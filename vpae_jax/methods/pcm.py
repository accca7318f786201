"""PCM: phased consistency model (2405.18407), on a rectified flow.

The grid t_1 < ... < t_N = 1 (t_0 = 0) is divided into M phases. With s(m) = floor(m N / M), phase m has the points
s(m) + 1 ... s(m + 1) and ends at e = t_{s(m)}. The student jumps from all points of a path within a phase to its end:

    (1)  x^_{n-1}  = x_n + (t_{n-1} - t_n) (v_u + w (v_c - v_u))(x_n, t_n)              the frozen teacher
    (2)  Phi(x, t) = x + (e - t) v_theta(x, t)
    (3)  fake      = Phi_theta(x_n, t_n),    real = sg Phi_theta(x^_{n-1}, t_{n-1})      n uniform in 1 ... N
    (4)  L_G       = mean d(fake - real) + lambda mean relu(1 - D(fake_a, a))            d: pseudo-Huber
    (5)  L_D       = mean relu(1 - D(real_a, a)) + relu(1 + D(fake_a, a))

Both are at timestep e. For the discriminator, heads on the frozen teacher's hidden states, both are noised further, to
one timestep a of the same phase, uniform in t_{s(m)} ... t_{s(m+1)-1}, each with noise of its own:

    (6)  x_a = r x + sqrt(a^2 - r^2 e^2) eps,   r = (1 - a) / (1 - e)                 "exact" (`flow.schedule` Eq. 10)
    (7)  x_a = r x + (a - e) / (1 - e) eps                                            "code"

The authors' SD3 code has (7), which adds too little noise unless e = 0: from e = 0.6 to a = 0.8 the variance of the
noise becomes 0.34, but the path has 0.64, and this is what the teacher is told.

The student is sampled in Euler steps from the end of each phase to the next, 1 ... 0. One phase is one step.

Where text, code (G-U-N/Phased-Consistency-Model, SD3, deterministic) and Wan differ, the default and the alternatives:

    grid          N = 100 (code), shift 5, Wan's for 720p | 3 (SD3's own; Wan's for 480p)
    lowest end    0, where sampling ends | the code's .001 raw, "either use sigma0 or 0"
    phases        4, for 4 steps | 2 | 1.  N need not be a multiple of M: the student is sampled where phases end, while
                  the code counts its sampling timesteps from above, and its phases from below
    guidance      w = 4 (the code's 3 in the other convention)
    renoising     "exact" | "code"
    generator     "lora" of rank 32 at scale .25 (the code's rank, and PEFT's alpha of 8): the learning rate of 5e-6 is
                  stated for it, and teacher, student and discriminator share one transformer in memory | "full"
    alternation   a step trains the heads and then the generator, each on a batch of its own. The code trains one of the
                  two per step, so its 20,000 steps are 10,000 here
    averages      none (the code keeps none) | ema
    without D     adversarial_weight = 0: consistency only, the code's other program
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jax.lax import stop_gradient

from vpae_jax.flow import draws
from vpae_jax.flow.sampler import Sampler
from vpae_jax.flow.schedule import expand, renoise
from vpae_jax.flow.times import Phased, TimeDistribution
from vpae_jax.methods.adversarial import (
    LOSSES,
    NO_PENALTY,
    AdversarialKind,
    ConstantFeatures,
    Judged,
    discriminator_loss,
    generator_loss,
    judge,
)
from vpae_jax.methods.base import Context, Nets, Role, Student, Update, View
from vpae_jax.methods.common import check_at_least, check_choice, named_keys, term_of
from vpae_jax.methods.consistency import check_huber, consistency_loss, jumps
from vpae_jax.methods.distillation import Distillation
from vpae_jax.types import Batch, Latents, Metrics, PerExample, PRNGKey, Times, UserError

GRID = TimeDistribution(kind="grid", points=100, shift=5.0)


@dataclass(frozen=True)
class PCM(Distillation):
    """Phased consistency distillation.

    Attributes:
      t: the grid, from 0 to 1; all of its points are equally likely. Its shift must be the one for your clips, since
        the student is sampled at these points for clips of any size.
      phases: number of phases of the grid, and of steps of the student.
      guidance: of the teacher's Euler step, w of `v_u + w (v_c - v_u)`.
      huber: c of the distance.
      adversarial: the form of the adversarial losses; "pcm_hinge" is Eqs. 4 and 5.
      adversarial_weight: lambda of Eq. 4; at 0 there is no discriminator.
      renoise: Eq. 6 or 7.
    """

    t: TimeDistribution = GRID
    phases: int = 4
    guidance: float = 4.0
    huber: float = 0.001
    adversarial: AdversarialKind = "pcm_hinge"
    adversarial_weight: float = 0.1
    renoise: Literal["exact", "code"] = "exact"
    generator: Literal["full", "lora"] = "lora"
    generator_rank: int = 32
    generator_scale: float = 0.25
    ema: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("PCM", {"adversarial": tuple(LOSSES), "renoise": ("exact", "code")}, self)
        check_at_least("PCM", 0, guidance=self.guidance, adversarial_weight=self.adversarial_weight)
        check_huber("PCM", self.huber)
        if self.t.kind != "grid" or (self.t.low, self.t.high, self.t.clip) != (0, 1, (0, 1)):
            raise UserError("PCM.t is not a whole grid; set kind='grid', low=0, high=1 and clip=(0,1)")
        if self.t.stated_for is not None:
            raise UserError(
                f"PCM.t.stated_for is {self.t.stated_for}, but the student is sampled at the same timesteps for clips "
                "of any size; set it to None, and t.shift to that of the clips"
            )
        try:
            self.t.ends(self.phases)
        except UserError as error:
            raise UserError(f"PCM.{error}") from error

    @property
    def roles(self) -> Mapping[str, Role]:
        roles = {"generator": self.generator_role, "teacher": Role("pretrained")}
        return roles | ({"heads": Role("fresh", True, part="heads")} if self.adversarial_weight else {})

    @property
    def views(self) -> Mapping[str, View]:
        return {"target": View("generator", constant=True)}

    @property
    def updates(self) -> tuple[Update, ...]:
        generator = Update(("generator",), self.generator_loss)
        return (Update(("heads",), self.discriminator_loss), generator) if self.adversarial_weight else (generator,)

    @property
    def student(self) -> Student:
        return self.sampled_by(Sampler("euler", self.t.ends(self.phases)))

    def shown(self, fake: Latents, real: Latents, times: Phased, key: PRNGKey) -> Judged:
        """The discriminator's input for two sets of clips at the ends of their phases."""
        keys = named_keys(key, "fake", "real")

        def noised(x: Latents, key: PRNGKey) -> Latents:
            noise = draws.normal(key, x.shape, x.dtype)
            return (renoise if self.renoise == "exact" else renoise_as_code)(x, noise, times.end, times.inside)

        return Judged(noised(fake, keys.fake), times.inside, noised(real, keys.real), times.inside)

    def discriminator_loss(self, nets: Nets, batch: Batch, context: Context) -> tuple[PerExample, Metrics]:
        """Eq. 5."""
        keys = named_keys(context.clips, "images", "t", "noise", "judged", "penalty")
        batch = self.drop_images(batch, keys.images)
        times = self.t.phased(keys.t, batch.shape, self.phases)
        found = jumps(nets, batch, times.t, times.before, times.end, self.guidance, keys.noise)
        shown = self.shown(stop_gradient(found.reached), found.target, times, keys.judged)
        judged = judge(ConstantFeatures(nets["teacher"]), nets["heads"], batch.condition)
        return discriminator_loss(judged, shown, self.adversarial, NO_PENALTY, keys.penalty, context.step)

    def generator_loss(self, nets: Nets, batch: Batch, context: Context) -> tuple[PerExample, Metrics]:
        """Eq. 4.

        Metrics in addition to those of `consistency.Jumps`: the values of both terms, the per-clip L2 norms of their
        weighted gradients with respect to Phi, and the ratio of these norms.
        """
        keys = named_keys(context.clips, "images", "t", "noise", "judged")
        batch = self.drop_images(batch, keys.images)
        times = self.t.phased(keys.t, batch.shape, self.phases)
        found = jumps(nets, batch, times.t, times.before, times.end, self.guidance, keys.noise)
        if not self.adversarial_weight:
            loss, metrics = consistency_loss(found, self.huber)
            return loss, {**found.metrics, **metrics}
        judged = judge(nets["teacher"], nets["heads"], batch.condition)
        term, logit = term_of(
            lambda x: generator_loss(judged, self.shown(x, found.target, times, keys.judged), self.adversarial),
            stop_gradient(found.reached),
        )
        loss, metrics = consistency_loss(found, self.huber, term.scaled(self.adversarial_weight))
        return loss, {**found.metrics, **metrics, "adversarial": term.value, "fake_logit": logit}


def renoise_as_code(x: Latents, noise: Latents, end: Times, t: Times) -> Latents:
    """Eq. 7."""
    end, t = expand(end, x), expand(t, x)
    return ((1 - t) * x + (t - end) * noise) / (1 - end)
