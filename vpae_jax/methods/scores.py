"""Losses between scores: distribution matching, the fake score's own loss, and score distillation.

Generated clips x are noised, x_t' = (1 - t') x + t' eps', and shown to flow networks. With x0_r and x0_f the clean
predictions of the real and of the fake score network, their scores differ by

    s_r - s_f = (1 - t') / t'^2 (x0_r - x0_f)                              (Eq. 5 and 6 of flow.schedule)

and the gradient of KL(fake || real) with respect to x, through x_t', is

    -(1 - t') (s_r - s_f) = (1 - t')^2 / t'^2 (x0_f - x0_r).

Distribution matching (DMD, 2311.18828; DMD2, 2405.14867) replaces the weight by one over the mean of |x - x0_r|, per
clip. All gradients are taken with respect to x, never to a velocity: dx / dv = -t has the opposite sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jax.lax import stop_gradient

from vpae_jax.flow import draws
from vpae_jax.flow.schedule import add_noise, expand
from vpae_jax.flow.times import VALUES_720P, TimeDistribution
from vpae_jax.methods.base import Velocity
from vpae_jax.methods.common import (
    Term,
    check_at_least,
    check_choice,
    example_mean,
    example_sum,
    f32,
    named_keys,
    predict_x0,
)
from vpae_jax.types import Condition, Latents, Metrics, PerExample, PRNGKey, Times

# Self-Forcing's I2V-14B draw of t': uniform on Wan's raw axis, shifted for 720p, clipped.
SCORE_TIMES = TimeDistribution(low=0.02, high=0.98, shift=5.0, clip=(0.02, 0.98), stated_for=VALUES_720P)


@dataclass(frozen=True)
class DistributionMatching:
    """The distribution-matching gradient (V-PAE Eq. 1).

    Attributes:
      weighting: of x0_f - x0_r. "x0_norm": divided by the clip's mean |x - x0_r| (DMD2). "none": unweighted. "t2":
        multiplied by (1 - t')^2 / t'^2, the exact KL gradient, which is the score difference times (1 - t').
      t: distribution of t'.
      guidance: of the real score; the fake score is never guided.
      floor: lower bound of "x0_norm"'s denominator, in units of the latents, whose standard deviation is about 1.
        Without it (DMD2), a single clip that equals the teacher's prediction dominates the gradient of the whole batch.
    """

    weighting: Literal["x0_norm", "none", "t2"] = "x0_norm"
    t: TimeDistribution = SCORE_TIMES
    guidance: float = 5.0
    floor: float = 0.01

    def __post_init__(self) -> None:
        check_choice("DistributionMatching", {"weighting": ("x0_norm", "none", "t2")}, self)
        check_at_least("DistributionMatching", 0, floor=self.floor)

    def __call__(
        self,
        x0: Latents,
        real: Velocity,
        fake: Velocity,
        condition: Condition,
        unconditional: Condition,
        key: PRNGKey,
    ) -> tuple[Term, Metrics]:
        """The term L = 1/2 mean ||x - sg(x - g)||^2 of each clip: its value is 1/2 mean g^2, its gradient g / N.

        Args:
          x0: generated clips, treated as constants.
          real, fake: the two score networks.
          condition, unconditional: with the prompt and with the negative prompt.
          key: random key.
        """
        x, t = self.noised(x0, key)
        x0_real = predict_x0(real, x, t, condition, unconditional, self.guidance)
        return self.term(x0, x0_real, predict_x0(fake, x, t, condition), t)

    def noised(self, x0: Latents, key: PRNGKey) -> tuple[Latents, Times]:
        """x_t' and t' at which generated clips are shown to the score networks."""
        keys = named_keys(key, "t", "noise")
        t = self.t(keys.t, x0.shape)
        return add_noise(stop_gradient(x0), draws.normal(keys.noise, x0.shape, x0.dtype), t), t

    def term(self, x0: Latents, x0_real: Latents, x0_fake: Latents, t: Times) -> tuple[Term, Metrics]:
        """The term, given the clean predictions; see `__call__`."""
        x0, gap = stop_gradient(x0), x0_fake - x0_real
        normaliser = example_mean(jnp.abs(x0 - x0_real))
        if self.weighting == "x0_norm":
            g = gap / expand(jnp.maximum(normaliser, self.floor), gap)
        elif self.weighting == "t2":
            g = ((1 - expand(t, gap)) / expand(t, gap)) ** 2 * gap
        else:
            g = gap
        # As in DMD2; a clip that equals its own prediction has no direction, so infinities also become 0.
        g = stop_gradient(jnp.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0))
        term = Term(0.5 * example_mean(g**2), g / g[0].size)
        metrics = {
            "dmd_grad": term.grad_norm,
            "dmd_normaliser": normaliser.mean(),
            "dmd_gap": example_mean(jnp.abs(gap)).mean(),
        }
        return term, metrics


def fake_score_loss(
    fake: Velocity,
    x0: Latents,
    condition: Condition,
    t: TimeDistribution,
    key: PRNGKey,
    space: Literal["velocity", "x0"] = "velocity",
) -> PerExample:
    """The diffusion loss by which the fake score follows the generator (V-PAE Eq. 2, with nu = eps' - x).

    Args:
      fake: the fake score network, the only network that is differentiated.
      x0: generated clips.
      condition: the clips' conditions; prompts are not dropped, since the fake score is never guided.
      t: distribution of t'.
      key: random key.
      space: "velocity", or "x0" for the unweighted error of x0, which is the velocity's times t'^2.

    Returns:
      Mean squared error of each clip.
    """
    keys = named_keys(key, "t", "noise")
    x0 = stop_gradient(x0)
    times = t(keys.t, x0.shape)
    noise = draws.normal(keys.noise, x0.shape, x0.dtype)
    v = fake(add_noise(x0, noise, times), times, condition)
    return velocity_error(v, x0, noise, times, space)


def velocity_error(
    v: Latents, x0: Latents, noise: Latents, t: Times, space: Literal["velocity", "x0"] = "velocity"
) -> PerExample:
    """Mean squared error of a predicted velocity, or of the x0 that it implies, for each clip."""
    loss = example_mean((f32(v) - (noise - x0)) ** 2)
    return loss if space == "velocity" else t**2 * loss


@dataclass(frozen=True)
class ScoreDistillation:
    """Distance to the teacher's prediction from the noised clip: V-PAE's conditional SDS (Eq. 5), ADD's distillation.

    Eq. 5 pairs x_t with t'; here the clip is noised to the same t' that the teacher is told.

    Attributes:
      weight: lambda; 0 switches the term off and saves the teacher's evaluation.
      times: "own": t' is drawn (figure 2(c)'s t' in (0, T]); "discriminator": it is the timestep at which the
        discriminator sees the clip (Eq. 5 read literally).
      t: distribution of t' for "own"; by default that of phase one.
      guidance: of the teacher; 1 saves one evaluation.
      reduction: of the squared error over a clip's values. "sum" multiplies the weight by their number.
      time_weight: "one", or "one_minus_t" (ADD's c(t)).
      frames: restricts the loss to that many first latent frames; 0 uses the whole clip.
      every: the term is computed on every `every`-th step, with its weight multiplied by `every`; the teacher is not
        evaluated on the others. This changes the objective of each step: most steps follow the discriminator alone, and
        Adam shortens the large steps of the others. `docs/methods/less_work.md` has the cost.
    """

    weight: float = 10.0
    times: Literal["own", "discriminator"] = "own"
    t: TimeDistribution = SCORE_TIMES
    guidance: float = 1.0
    reduction: Literal["mean", "sum"] = "mean"
    time_weight: Literal["one", "one_minus_t"] = "one"
    frames: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        choices = {
            "times": ("own", "discriminator"),
            "reduction": ("mean", "sum"),
            "time_weight": ("one", "one_minus_t"),
        }
        check_choice("ScoreDistillation", choices, self)
        check_at_least("ScoreDistillation", 0, weight=self.weight, frames=self.frames)
        check_at_least("ScoreDistillation", 1, every=self.every)

    def __call__(
        self,
        x0: Latents,
        teacher: Velocity,
        condition: Condition,
        unconditional: Condition,
        key: PRNGKey,
        disc_t: PerExample,
    ) -> Term:
        """The unweighted term of each clip; its gradient, 2 (x - x0_r) / N, is not propagated through the teacher.

        Args:
          x0: generated clips, treated as constants.
          teacher: the frozen multi-step network.
          condition, unconditional: with the prompt and with the negative prompt.
          key: random key.
          disc_t: the discriminator's timesteps.
        """
        keys = named_keys(key, "t", "noise")
        x0 = stop_gradient(x0)
        t = self.t(keys.t, x0.shape) if self.times == "own" else disc_t
        x = add_noise(x0, draws.normal(keys.noise, x0.shape, x0.dtype), t)
        error = x0 - predict_x0(teacher, x, t, condition, unconditional, self.guidance)
        if self.frames:
            kept = jnp.arange(error.shape[1]) < self.frames
            error = jnp.where(kept[:, None, None, None], error, 0.0)
        scale = jnp.ones_like(t) if self.time_weight == "one" else 1 - t
        if self.reduction == "mean":
            frames = min(self.frames, error.shape[1]) if self.frames else error.shape[1]
            scale = scale / (frames * error[0, 0].size)
        return Term(scale * example_sum(error**2), expand(2 * scale, error) * error)
