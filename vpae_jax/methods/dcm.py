"""DCM: dual-expert consistency model (2506.03123), on a rectified flow.

On the grid t_1 < ... < t_N = 1 (t_0 = 0), a *semantic expert* learns the noisy part, layout and motion, and a *detail
expert* learns the rest. Each jumps from all points of a path within its range to the end of the range, with split s:

    semantic   n in s + 1 ... N    e = t_s            detail   n in 1 ... s    e = 0

    (1)  x^_{n-1}  = x_n + (t_{n-1} - t_n) (v_u + w (v_c - v_u))(x_n, t_n)                  the frozen teacher
    (2)  Phi(x, t) = x + (e - t) v_theta(x, t)
    (3)  y, y*     = Phi_theta(x_n, t_n),  sg Phi_theta(x^_{n-1}, t_{n-1})
    (4)  semantic  L   = mean d(y - y*) + L_TC                                               d: pseudo-Huber
    (5)  detail    L_G = mean d(y - y*) + alpha mean relu(1 - D(y_a, a)) + beta L_FM
    (6)            L_D = mean relu(1 - D(y*_a, a)) + relu(1 + D(y_a, a))
    (7)  L_TC = mean ((y_{f+k} - y_f) - (y*_{f+k} - y*_f))^2                                 k latent frames apart
    (8)  L_FM = mean over taps of mean (r(h(y_a, a)) - r(h(y*_a, a)))^2

D has heads on hidden states h of the frozen teacher, and r is the teacher's last layer, which turns hidden states after
any block into a velocity. D sees y and y* noised to one timestep a, uniform in t_0 ... t_{s-1}, with the same noise.

The semantic expert is trained first, in full. The detail expert is low-rank adapters on it, and the semantic expert is
frozen from then on. The student consists of both, sampled in Euler steps: from 1 to t_s by the semantic expert, from
t_s to 0 by the detail expert.

Where the paper, its code (Vchitect/DCM, Wan) and other sources leave a choice, the default and the alternatives:

    grid          N = 50, shift 17, s = 35, so t_s = .97541 (code, for Wan at 480p). The lowest end is 0, where sampling
                  ends | the code's .001 raw, "either use sigma0 or 0"
    boundary      timesteps from t_{s+1} = .97764 on belong to the semantic expert, according to the ranges in which the
                  two are trained. The code's adapters act below .982 in training and below .979 in sampling, and are
                  trained up to .9754
    sampling      2 evaluations each, at timesteps evenly spaced on the raw axis within a range, so that jumps end where
                  they were trained to end (for 4 evaluations unstated) | times = (1, .992, .982, .949, .905, .81, 0),
                  the code's, whose third step leads past t_s
    guidance      w = 6 (the code's 5 in the other convention)
    alpha, beta   .5 and 1 (the code's .1 times 5 and 10)
    k             3
    adapters      rank 128, scale 2, on attention, the embedders of timestep and text, and the last layer. The code has
                  them on attention, and full copies of the others
    alternation   a step trains the detail expert and then the heads, each on a batch of its own (the code: the same)
    averages      none | ema (the code: of .95, switched off, as the target)
    full          generator = "full": the detail expert is a second network that starts from the semantic one
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import stop_gradient
from jaxtyping import Float

from vpae_jax.flow import draws
from vpae_jax.flow.sampler import Sampler
from vpae_jax.flow.schedule import add_noise, shift
from vpae_jax.flow.times import TimeDistribution
from vpae_jax.methods.adversarial import (
    LOSSES,
    NO_PENALTY,
    AdversarialKind,
    ConstantFeatures,
    Judged,
    Logits,
    discriminator_loss,
    judge,
)
from vpae_jax.methods.base import EMA, Adapters, Context, Nets, Role, Student, Update, View, averages
from vpae_jax.methods.common import check_at_least, check_choice, example_mean, f32, named_keys, term_of
from vpae_jax.methods.consistency import check_huber, consistency_loss, jumps
from vpae_jax.methods.distillation import Distillation
from vpae_jax.types import Batch, Latents, Metrics, PerExample, UserError

# The layers that the code adapts or copies: attention, the embedders of timestep and text, and the last layer.
ADAPTED = r"^blocks/(attn1|attn2)/|^condition_embedder/(time_embedder|time_proj|text_embedder)|^proj_out$"


@dataclass(frozen=True)
class DualExpert(Distillation):
    """Settings that must be the same in the trainings of both experts.

    Attributes:
      points, shift: of the grid; the student is sampled at its points, whatever the size of its clips.
      split: number of points that belong to the detail expert; the others belong to the semantic expert.
      guidance: of the teacher's Euler step, w of `v_u + w (v_c - v_u)`.
      huber: c of the distance.
      semantic_steps, detail_steps: evaluations of each expert when the student is sampled.
      times: timesteps that replace the evenly spaced ones: from 1 to 0, at least one of them in each expert's range;
        empty for evenly spaced ones.
    """

    points: int = 50
    shift: float = 17.0
    split: int = 35
    guidance: float = 6.0
    huber: float = 0.001
    semantic_steps: int = 2
    detail_steps: int = 2
    times: tuple[float, ...] = ()
    ema: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        check_at_least(owner, 1, semantic_steps=self.semantic_steps, detail_steps=self.detail_steps)
        check_at_least(owner, 0, guidance=self.guidance)
        check_huber(owner, self.huber)
        if not 1 <= self.split < self.points:
            raise UserError(f"{owner}.split is {self.split}, expected 1 to points - 1 = {self.points - 1}")
        _ = self.semantic_times, self.sampler  # raise for an invalid grid or sampler
        first, last = self.sampler.times[0], self.sampler.times[-2]
        if not last < self.boundary <= first:
            raise UserError(
                f"{owner}.times are {self.times}, expected some above and some below {self.boundary:.6g}, where one "
                "expert takes over from the other"
            )

    @property
    def semantic_times(self) -> TimeDistribution:
        """Timesteps of the semantic expert's training."""
        return TimeDistribution("grid", low=self.split / self.points, points=self.points, shift=self.shift)

    @property
    def detail_times(self) -> TimeDistribution:
        """Timesteps of the detail expert's training."""
        return TimeDistribution("grid", high=self.split / self.points, points=self.points, shift=self.shift)

    @property
    def boundary(self) -> float:
        """The lowest timestep of the semantic expert."""
        return float(shift((self.split + 1) / self.points, self.shift))

    @property
    def sampler(self) -> Sampler:
        """How the student is sampled."""
        if self.times:
            return Sampler("euler", self.times)
        end = self.split / self.points
        raw = [*np.linspace(1.0, end, self.semantic_steps + 1)[:-1], *np.linspace(end, 0.0, self.detail_steps + 1)]
        return Sampler("euler", tuple(np.asarray(shift(np.array(raw), self.shift)).tolist()))

    @property
    def views(self) -> Mapping[str, View]:
        return {"target": View("generator", constant=True)}


@dataclass(frozen=True)
class DCMSemantic(DualExpert):
    """The semantic expert.

    Attributes:
      coherence_weight: of L_TC.
      coherence_frames: k of Eq. 7; clips of at most that many latent frames have no such term.
    """

    coherence_weight: float = 1.0
    coherence_frames: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("DCMSemantic", 0, coherence_weight=self.coherence_weight)
        check_at_least("DCMSemantic", 1, coherence_frames=self.coherence_frames)
        if self.generator != "full":
            raise UserError(
                f"DCMSemantic.generator is {self.generator!r}, but the detail expert's adapters need a whole network; "
                "set generator='full'"
            )

    @property
    def roles(self) -> Mapping[str, Role]:
        return {"generator": self.generator_role, "teacher": Role("pretrained")}

    @property
    def updates(self) -> tuple[Update, ...]:
        return (Update(("generator",), self.loss),)

    @property
    def student(self) -> Student:
        """The semantic expert at all timesteps, since the detail expert starts from it."""
        return self.sampled_by(self.sampler)

    def loss(self, nets: Nets, batch: Batch, context: Context) -> tuple[PerExample, Metrics]:
        """Eq. 4."""
        keys = named_keys(context.clips, "images", "t", "noise")
        batch = self.drop_images(batch, keys.images)
        times = self.semantic_times.phased(keys.t, batch.shape)
        found = jumps(nets, batch, times.t, times.before, times.end, self.guidance, keys.noise)
        loss, metrics = consistency_loss(found, self.huber)
        coherence = temporal_coherence(found.reached - found.target, self.coherence_frames)
        metrics = {**found.metrics, **metrics, "coherence": stop_gradient(coherence)}
        return loss + self.coherence_weight * coherence, metrics


def temporal_coherence(error: Latents, frames: int) -> PerExample:
    """Eq. 7 for y - y*: the mean squared difference of errors `frames` apart; 0 for clips that are too short."""
    if error.shape[1] <= frames:
        return jnp.zeros(len(error))
    return example_mean((error[:, frames:] - error[:, :-frames]) ** 2)


@dataclass(frozen=True)
class DCMDetail(DualExpert):
    """The detail expert.

    Attributes:
      adversarial: the form of the adversarial losses; "pcm_hinge" is Eqs. 5 and 6.
      adversarial_weight: alpha of Eq. 5.
      matching_weight: beta of Eq. 5.
      init: where the semantic expert comes from: the phase before, or the model directory.
      generator: which weights are trained: low-rank adapters on the semantic expert, or all of a network that starts
        from it.
    """

    adversarial: AdversarialKind = "pcm_hinge"
    adversarial_weight: float = 0.5
    matching_weight: float = 1.0
    init: Literal["pretrained", "previous"] = "previous"
    generator: Literal["full", "lora"] = "lora"
    generator_rank: int = 128
    generator_scale: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = {name: getattr(self, name) for name in ("adversarial_weight", "matching_weight")}
        check_choice("DCMDetail", {"adversarial": tuple(LOSSES)}, self)
        check_at_least("DCMDetail", 0, **weights)

    @property
    def generator_role(self) -> Role:
        """The detail expert, which is the semantic expert at first."""
        kept = averages(self.ema, self.more_emas)
        if self.generator == "full":
            return Role(self.init, trains=True, averages=kept)
        alpha = self.generator_rank * self.generator_scale
        return Role("fresh", True, adapters=Adapters("semantic", self.generator_rank, alpha, ADAPTED), averages=kept)

    @property
    def roles(self) -> Mapping[str, Role]:
        return {
            "generator": self.generator_role,
            "semantic": Role("pretrained" if self.init == "pretrained" else "previous:generator"),
            "teacher": Role("pretrained"),
            "heads": Role("fresh", True, part="heads"),
        }

    @property
    def updates(self) -> tuple[Update, ...]:
        return Update(("generator",), self.generator_loss), Update(("heads",), self.discriminator_loss)

    @property
    def student(self) -> Student:
        average = EMA if self.ema else None
        return Student("semantic", self.sampler, average, low="generator", boundary=self.boundary)

    def discriminator_loss(self, nets: Nets, batch: Batch, context: Context) -> tuple[PerExample, Metrics]:
        """Eq. 6."""
        keys = named_keys(context.clips, "images", "t", "noise", "judged", "penalty")
        batch = self.drop_images(batch, keys.images)
        times = self.detail_times.phased(keys.t, batch.shape)
        found = jumps(nets, batch, times.t, times.before, times.end, self.guidance, keys.noise)
        noise = draws.normal(keys.judged, found.target.shape, found.target.dtype)
        fake, real = (add_noise(x, noise, times.inside) for x in (stop_gradient(found.reached), found.target))
        judged = judge(ConstantFeatures(nets["teacher"]), nets["heads"], batch.condition)
        shown = Judged(fake, times.inside, real, times.inside)
        return discriminator_loss(judged, shown, self.adversarial, NO_PENALTY, keys.penalty, context.step)

    def generator_loss(self, nets: Nets, batch: Batch, context: Context) -> tuple[PerExample, Metrics]:
        """Eq. 5.

        Metrics in addition to those of `consistency.Jumps`: the values of all terms, the per-clip L2 norms of the
        gradients with respect to Phi of the consistency term and of the sum of the other two, and the ratio of these
        norms.
        """
        keys = named_keys(context.clips, "images", "t", "noise", "judged")
        batch = self.drop_images(batch, keys.images)
        times = self.detail_times.phased(keys.t, batch.shape)
        found = jumps(nets, batch, times.t, times.before, times.end, self.guidance, keys.noise)
        noise = draws.normal(keys.judged, found.target.shape, found.target.dtype)
        teacher, heads, t = nets["teacher"], nets["heads"], times.inside

        def seen(clip: Latents) -> tuple[Logits, Float[Array, "taps b f h w c"]]:
            """The discriminator's logits of a clip, and the velocities r(h) at each tap."""
            x = add_noise(clip, noise, t)
            features = teacher.features(x, t, batch.condition, heads.taps)
            return f32(heads(features)), f32(jnp.stack(teacher.readings(features, x, t)))

        real_logit, real = stop_gradient(seen(found.target))

        def loss(clip: Latents) -> tuple[PerExample, Metrics]:
            logit, fake = seen(clip)
            adversarial = example_mean(LOSSES[self.adversarial].generator(real_logit, logit))
            matching = example_mean(jnp.moveaxis((fake - real) ** 2, 1, 0))
            value = self.adversarial_weight * adversarial + self.matching_weight * matching
            return value, {"adversarial": adversarial, "matching": matching, "fake_logit": logit}

        term, reported = term_of(loss, stop_gradient(found.reached))
        value, metrics = consistency_loss(found, self.huber, term)
        return value, {**found.metrics, **metrics, **reported}
