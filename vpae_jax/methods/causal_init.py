"""Initialisation of causal students: a transformer trained on whole clips learns to process chunks in order.

x0 is a clip, t has a timestep for each of its chunks, x_t is the clip with every chunk noised to its own timestep:

    CausalInit, "teacher_forcing"     mean ||v(x_t, t | clean earlier chunks) - (eps - x0)||^2
    CausalInit, "diffusion_forcing"   mean ||v(x_t, t | noised earlier chunks) - (eps - x0)||^2      2407.01392
    CausalODE                         mean ||x0(z_t, t | noised earlier chunks) - z_0||^2            2412.07772

The first two train on real clips and give a diffusion model, which is sampled in many guided steps; Self-Forcing
(2506.08009) compares both. The third is the regression of CausVid, from which Self-Forcing starts as well, on a
teacher's paths z: guided Euler steps from noise z_1 to z_0. The student learns to predict the end of the path from the
states at its own few timesteps, drawn uniformly for each chunk. This needs no clips. CausVid computes a thousand paths
in advance; here each one is new, which costs `ode_steps` guided evaluations of the teacher per clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import stop_gradient
from jaxtyping import Float, Shaped

from vpae_jax.flow import draws
from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.sampler import Sampler
from vpae_jax.flow.schedule import add_noise, shifted_times, velocity_to_x0
from vpae_jax.flow.times import TimeDistribution
from vpae_jax.methods.base import Context, Nets, Role, Student, Update
from vpae_jax.methods.common import (
    check_at_least,
    check_choice,
    check_fraction,
    drift,
    drop_conditions,
    example_mean,
    f32,
    guided_velocity,
    named_keys,
    real_clips,
)
from vpae_jax.methods.distillation import Distillation
from vpae_jax.methods.flow_matching import TEACHER_TIMES
from vpae_jax.methods.generator import GeneratorTraining
from vpae_jax.types import Batch, Latents, Metrics, PerExample, UserError

CHUNKS = Chunks()


@dataclass(frozen=True)
class CausalInit(GeneratorTraining):
    """Turns a transformer that sees whole clips into a causal diffusion model.

    Attributes:
      kind: how a chunk sees the earlier ones in training.
      chunks: how a clip is divided.
      t: distribution of a chunk's timestep.
      text_dropout: probability that a prompt is replaced by the negative prompt.
      steps, shift, guidance: how the result is sampled, chunk by chunk, in Euler steps.
    """

    init: Literal["pretrained", "previous"] = "pretrained"
    kind: Literal["teacher_forcing", "diffusion_forcing"] = "teacher_forcing"
    chunks: Chunks = CHUNKS
    t: TimeDistribution = TEACHER_TIMES
    text_dropout: float = 0.1
    steps: int = 50
    shift: float = 5.0
    guidance: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("CausalInit", {"kind": ("teacher_forcing", "diffusion_forcing")}, self)
        check_fraction("CausalInit", text_dropout=self.text_dropout)
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
        return self.sampled_by(replace(Sampler.even(self.steps, self.shift, self.guidance), chunks=self.chunks))

    def loss(self, nets: Nets, batch: Batch, context: Context) -> tuple[PerExample, Metrics]:
        """Mean squared velocity error of each clip."""
        keys = named_keys(context.clips, "t", "noise", "dropout")
        x0 = real_clips(batch)
        eps = draws.normal(keys.noise, x0.shape, x0.dtype)
        condition = drop_conditions(batch, keys.dropout, self.text_dropout, self.image_dropout)
        count = len(self.chunks.spans(x0.shape[1]))
        drawn = [self.t(own, x0.shape) for own in draws.split(keys.t, count)]
        t = of_frames(self.chunks, jnp.stack(drawn, axis=1), x0.shape[1])
        x, network = add_noise(x0, eps, t), nets["generator"].causal(self.chunks)
        if self.kind == "teacher_forcing":
            past = network.remember(x0, jnp.zeros_like(t), condition)
            v = f32(network.recall(x, t, condition, past))
        else:
            v = f32(network(x, t, condition))
        error = ((v - (eps - x0)) ** 2).mean((2, 3, 4))
        # (x0 error) = t^2 (velocity error), comparable between noise levels.
        return example_mean(error), {"x0_error": (t**2 * error).mean()}


@dataclass(frozen=True)
class CausalODE(Distillation):
    """Trains a causal student with a few evaluations per chunk by regression on a teacher's paths.

    Attributes:
      chunks: how a clip is divided.
      steps, shift: evaluations of the student, at timesteps that are evenly spaced on the raw axis of this shift.
      ode_steps: Euler steps of the teacher's path; a multiple of `steps`.
      guidance: of the teacher.
    """

    chunks: Chunks = CHUNKS
    steps: int = 4
    shift: float = 5.0
    ode_steps: int = 48
    guidance: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("CausalODE", 1, ode_steps=self.ode_steps)
        _ = self.student  # raises for an invalid sampler
        if self.ode_steps % self.steps:
            raise UserError(
                f"CausalODE.ode_steps is {self.ode_steps}, not a multiple of steps ({self.steps}), but the student's "
                "timesteps have to lie on the teacher's path; change one"
            )

    @property
    def without_clips(self) -> Mapping[str, Any]:
        return {}

    @property
    def roles(self) -> Mapping[str, Role]:
        return {"generator": self.generator_role, "teacher": Role("pretrained")}

    @property
    def updates(self) -> tuple[Update, ...]:
        return (Update(("generator",), self.loss),)

    @property
    def student(self) -> Student:
        return self.sampled_by(replace(Sampler.even(self.steps, self.shift, solver="consistency"), chunks=self.chunks))

    def loss(self, nets: Nets, batch: Batch, context: Context) -> tuple[PerExample, Metrics]:
        """Mean squared error of the predicted end of each clip's path."""
        keys = named_keys(context.clips, "images", "noise", "t")
        batch = self.drop_images(batch, keys.images)
        path, end = self.path(nets, batch, draws.normal(keys.noise, batch.shape, jnp.float32))
        clips, frames = batch.shape[:2]
        drawn = [draws.uniform(own, clips) for own in draws.split(keys.t, len(self.chunks.spans(frames)))]
        places = jnp.minimum((jnp.stack(drawn, axis=1) * self.steps).astype(jnp.int32), self.steps - 1)
        places = of_frames(self.chunks, places, frames)
        z = jnp.take_along_axis(path, places[None, :, :, None, None, None], axis=0)[0]
        t = jnp.asarray(self.student.sampler.times, jnp.float32)[places]
        x0 = velocity_to_x0(f32(nets["generator"].causal(self.chunks)(z, t, batch.condition)), z, t)
        return example_mean((x0 - end) ** 2), drift(stop_gradient(x0), batch.latents)

    def path(self, nets: Nets, batch: Batch, noise: Latents) -> tuple[Float[Array, "steps b f h w c"], Latents]:
        """States of the teacher's path at the student's timesteps, and its end; constants."""
        times = jnp.asarray(shifted_times(self.ode_steps, self.shift))

        def step(z: Latents, pair: Array) -> tuple[Latents, None]:
            t = jnp.broadcast_to(pair[0], z.shape[:1])
            v = guided_velocity(nets["teacher"], z, t, batch.condition, batch.unconditional, self.guidance)
            return z + (pair[1] - pair[0]) * v, None

        def run(z: Latents, part: Array) -> tuple[Latents, Latents]:
            return jax.lax.scan(step, z, part)[0], z

        pairs = jnp.stack([times[:-1], times[1:]], axis=1).reshape(self.steps, -1, 2)
        end, path = jax.lax.scan(run, noise, pairs)
        return stop_gradient(path), stop_gradient(end)


def of_frames(chunks: Chunks, values: Shaped[Array, "b chunks"], frames: int) -> Shaped[Array, "b f"]:
    """Values of chunks, repeated for each of a clip's frames."""
    sizes = np.asarray([stop - start for start, stop in chunks.spans(frames)])
    return jnp.repeat(values, sizes, axis=1, total_repeat_length=frames)
