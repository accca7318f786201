"""LCM: latent consistency distillation (2310.04378), on a rectified flow.

The student should predict the same clip from a point x_t on the path of a clip and from the point before it, one Euler
step of the guided teacher away. With the grid t_1 < ... < t_N = 1 (t_0 = 0), x_n = (1 - t_n) x0 + t_n eps and
f(x, t) = x - t v(x, t):

    (1)  x^_{n-1} = x_n + (t_{n-1} - t_n) (v_u + w (v_c - v_u))(x_n, t_n)             the frozen teacher
    (2)  L        = mean d(f_theta(x_n, t_n) - sg f_theta'(x^_{n-1}, t_{n-1}))        n uniform in 1 ... N
    (3)  d(z)     = sqrt(z^2 + c^2) - c     or  z^2                                    pseudo-Huber, or squared

On a rectified flow f(x, 0) = x holds automatically, so no c_skip and c_out are needed. theta' is theta, or an average
of it. The student is sampled in a few steps, each of which predicts a clip and re-noises it to the next timestep.

Where sources differ, the default and the alternatives:

    grid          N = 50, shift 5 for 720p (DCM's and FastVideo's: 50, shift 17; rCM: 48, shift 5; AAPT: 32, shift 24)
    guidance      w = 5 fixed (DCM: 6; APT's initialisation: 7.5; AAPT: 1). An input in the original, fixed for video
    distance      "huber" with c = .001 (DCM, PCM) | "squared" (rCM, APT, AAPT)
    theta'        "student" (rCM, AAPT, DCM's default) | "average" with decay .95 (LCM)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp

from vpae_jax.flow.times import VALUES_720P, TimeDistribution
from vpae_jax.methods.base import Average, Context, Nets, Role, Student, Update, View
from vpae_jax.methods.common import check_at_least, check_choice, check_fraction, example_mean, named_keys
from vpae_jax.methods.consistency import check_huber, jumps, pseudo_huber
from vpae_jax.methods.distillation import Distillation
from vpae_jax.types import Batch, Latents, Metrics, PerExample, UserError

GRID = TimeDistribution(kind="grid", points=50, shift=5.0, stated_for=VALUES_720P)


@dataclass(frozen=True)
class LCM(Distillation):
    """Consistency distillation.

    Attributes:
      t: the grid; all of its points are equally likely.
      guidance: of the teacher's Euler step, w of `v_u + w (v_c - v_u)`.
      distance: Eq. 3.
      huber: c of Eq. 3.
      target: network whose prediction is the target: the student itself, as a constant, or an average of it.
      target_decay: of that average.
      steps, shift: evaluations of the sampled student, at timesteps that are evenly spaced on the raw axis of this
        shift.
    """

    t: TimeDistribution = GRID
    guidance: float = 5.0
    distance: Literal["huber", "squared"] = "huber"
    huber: float = 0.001
    target: Literal["student", "average"] = "student"
    target_decay: float = 0.95
    steps: int = 4
    shift: float = 5.0
    ema: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("LCM", {"distance": ("huber", "squared"), "target": ("student", "average")}, self)
        check_fraction("LCM", target_decay=self.target_decay)
        check_at_least("LCM", 0, guidance=self.guidance)
        check_huber("LCM", self.huber)
        if self.t.kind not in ("grid", "list"):
            raise UserError(
                f"LCM.t is of kind {self.t.kind!r}, expected 'grid' or 'list', which have discrete timesteps"
            )
        _ = self.student  # raises for an invalid sampler

    @property
    def roles(self) -> Mapping[str, Role]:
        generator = self.generator_role
        if self.target == "average":
            target = {"target": Average(self.target_decay)}
            generator = replace(generator, averages={**generator.averages, **target})
        return {"generator": generator, "teacher": Role("pretrained")}

    @property
    def views(self) -> Mapping[str, View]:
        if self.target == "average":
            return {"target": View("generator", "target")}
        return {"target": View("generator", constant=True)}

    @property
    def updates(self) -> tuple[Update, ...]:
        return (Update(("generator",), self.loss),)

    @property
    def student(self) -> Student:
        return self.sampled_in(self.steps, self.shift)

    def loss(self, nets: Nets, batch: Batch, context: Context) -> tuple[PerExample, Metrics]:
        """Eq. 2."""
        keys = named_keys(context.clips, "images", "t", "noise")
        batch = self.drop_images(batch, keys.images)
        t, before = self.t.pair(keys.t, batch.shape)
        end = jnp.zeros_like(t)
        found = jumps(nets, batch, t, before, end, self.guidance, keys.noise)
        return example_mean(self._distance(found.reached - found.target)), found.metrics

    def _distance(self, z: Latents) -> Latents:
        """Eq. 3."""
        return z**2 if self.distance == "squared" else pseudo_huber(z, self.huber)
