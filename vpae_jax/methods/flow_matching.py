"""Flow matching: training or fine-tuning of a teacher, in full or with low-rank adapters.

    x_t = (1 - t) x0 + t eps,      loss = mean ||v(x_t, t, c) - (eps - x0)||^2

Lipman et al., "Flow Matching for Generative Modeling" (2210.02747); Liu et al., "Flow Straight and Fast" (2209.03003).
The shifted distribution of t is that of Wan 2.1's schedule. Prompts and images are dropped at random, so that one
network works with and without guidance, and with and without a first frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vpae_jax.flow import draws
from vpae_jax.flow.sampler import Sampler
from vpae_jax.flow.schedule import add_noise
from vpae_jax.flow.times import TimeDistribution
from vpae_jax.methods.base import Context, Nets, Role, Student, Update
from vpae_jax.methods.common import (
    check_choice,
    check_fraction,
    drop_conditions,
    example_mean,
    f32,
    named_keys,
    real_clips,
)
from vpae_jax.methods.generator import GeneratorTraining
from vpae_jax.types import Batch, Metrics, PerExample, UserError

# Uniform on Wan's raw axis, shifted as Wan 2.1 does for 480p.
TEACHER_TIMES = TimeDistribution(shift=3.0)


@dataclass(frozen=True)
class FlowMatching(GeneratorTraining):
    """Trains a velocity network on clips.

    Attributes:
      t: distribution of t.
      text_dropout: probability that a prompt is replaced by the negative prompt.
      image_dropout: probability that image and first frame are withheld (1 trains text-to-video only).
      ema: decay of the averaged weights; 0 keeps no average.
      steps, shift, guidance: how the network is sampled, in Euler steps.
      init: where the network starts; adapters need the network of a model directory or of a phase before.
    """

    t: TimeDistribution = TEACHER_TIMES
    text_dropout: float = 0.1
    image_dropout: float = 0.5
    ema: float = 0.999
    init: Literal["pretrained", "fresh", "previous"] = "fresh"
    steps: int = 50
    shift: float = 3.0
    guidance: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("FlowMatching", {"init": ("pretrained", "fresh", "previous")}, self)
        check_fraction("FlowMatching", text_dropout=self.text_dropout)
        if self.generator == "lora" and self.init == "fresh":
            raise UserError(
                "FlowMatching.generator is 'lora', but init is 'fresh', and adapters need a trained network; "
                "set init='pretrained'"
            )
        _ = self.student  # raises for an invalid sampler

    @property
    def roles(self) -> Mapping[str, Role]:
        roles = {"generator": self.generator_role}
        return roles if self.generator == "full" else roles | {"teacher": Role("pretrained")}

    @property
    def updates(self) -> tuple[Update, ...]:
        return (Update(("generator",), self.loss),)

    @property
    def student(self) -> Student:
        return self.sampled_by(Sampler.even(self.steps, self.shift, self.guidance))

    def loss(self, nets: Nets, batch: Batch, context: Context) -> tuple[PerExample, Metrics]:
        """Mean squared velocity error of each clip."""
        keys = named_keys(context.clips, "t", "noise", "dropout")
        x0 = real_clips(batch)
        t = self.t(keys.t, x0.shape)
        eps = draws.normal(keys.noise, x0.shape, x0.dtype)
        condition = drop_conditions(batch, keys.dropout, self.text_dropout, self.image_dropout)
        v = f32(nets["generator"](add_noise(x0, eps, t), t, condition))
        loss = example_mean((v - (eps - x0)) ** 2)
        # (x0 error) = t^2 (velocity error), which is comparable between noise levels.
        return loss, {"x0_error": (t**2 * loss).mean()}
