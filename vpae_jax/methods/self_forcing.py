"""Self-Forcing (2506.08009): distribution matching of a causal student on its own roll-outs.

The generator makes a clip chunk by chunk, each with a memory of its own earlier chunks (`flow.rollout`), in N
evaluations per chunk at timesteps 1 = t_0 > ... > t_{N-1}, and is trained by DMD2's losses (`dmd2`) on whole clips:

    z_0     = eps_0                                                     of every chunk
    z_{k+1} = (1 - t_{k+1}) x0(sg theta, z_k, t_k | past) + t_{k+1} eps_{k+1}         k < i
    x       = x0(sg theta, z_i, t_i | past)                             remembered: past <- past, x at t = 0
    clip    = x0(theta, z_i, t_i | sg past)                             the only differentiated evaluation

All chunks of all clips of a batch share the exit i, so G^n, the student with n evaluations, has the exit n - 1, and one
network serves n = 1 ... N. No gradient passes from a chunk to an earlier one. The clip is therefore computed in two
parts: a roll-out without gradient, which leaves z_i of all chunks and the memory of the whole clip; then one evaluation
of all chunks at once, each of which sees the memory of those before it. The second part equals the roll-out's own last
evaluations, and has one forward and one backward pass for any N and any number of chunks.

Teacher and fake score see whole clips. Where sources differ, the default and the alternatives:

    steps, shift       4 at 1, .75, .5, .25 shifted by 5 (Self-Forcing)
    exits              "drawn" uniformly (Self-Forcing) | "cycled": 0, 1, ..., N-1 in turn, so that every exit is
                       trained (rCM's causal recipe)
    chunks             3 latent frames (Self-Forcing, chunk-wise) | 1 (frame-wise)
    GAN                none (Self-Forcing) | `adversarial_weight` and `disc_weight` .03: One-Forcing (one t' for a real
                       and a generated clip, noise of their own)

Causal students start from a causal model, which `causal_init` makes from the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Float

from vpae_jax.flow import draws
from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.rollout import Solve, roll_out
from vpae_jax.flow.sampler import Sampler
from vpae_jax.flow.schedule import add_noise, velocity_to_x0
from vpae_jax.flow.solvers import VelocityFn
from vpae_jax.methods.base import Context, Nets, Student, View
from vpae_jax.methods.common import check_choice, f32, named_keys
from vpae_jax.methods.distillation import Step
from vpae_jax.methods.dmd2 import DMD2
from vpae_jax.types import Batch, Latents, Memory, PRNGKey

CHUNKS = Chunks()


@dataclass(frozen=True)
class SelfForcing(DMD2):
    """DMD2 for a causal student on its own roll-outs.

    Attributes:
      init: where the generator starts: from the causal model of the phase before, or from the teacher's own weights.
      chunks: how a clip is divided.
      exits: how the exit i is chosen.
      inputs: only "simulated": a roll-out is the student's own.
    """

    init: Literal["pretrained", "previous"] = "previous"
    chunks: Chunks = CHUNKS
    exits: Literal["drawn", "cycled"] = "drawn"
    adversarial_weight: float = 0.0
    disc_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(type(self).__name__, {"exits": ("drawn", "cycled"), "inputs": ("simulated",)}, self)

    @property
    def views(self) -> Mapping[str, View]:
        return {"simulator": View("generator", constant=True)}

    @property
    def student(self) -> Student:
        return self.sampled_by(replace(Sampler.even(self.steps, self.shift, solver="consistency"), chunks=self.chunks))

    def last(self, context: Context) -> Step:
        return context.step % self.steps if self.exits == "cycled" else super().last(context)

    def generate(self, nets: Nets, batch: Batch, context: Context, key: PRNGKey) -> Latents:
        """Generates clips with G^n, n - 1 = `last`, float32, differentiable only in the last evaluation."""
        last = self.last(context)
        _, entered, past = stop_gradient(self.rolled_out(nets, batch, last, key))
        t = jnp.broadcast_to(self.grid[last], batch.shape[:2])
        v = nets["generator"].causal(self.chunks).recall(entered, t, batch.condition, past)
        return velocity_to_x0(f32(v), entered, t)

    def constant(self, nets: Nets, batch: Batch, context: Context, key: PRNGKey) -> Latents:
        return stop_gradient(self.rolled_out(nets, batch, self.last(context), key)[0])

    @property
    def grid(self) -> Float[jax.Array, "steps"]:
        """The student's timesteps without the final 0."""
        return jnp.asarray(self.student.sampler.times[:-1], jnp.float32)

    def rolled_out(self, nets: Nets, batch: Batch, last: Step, key: PRNGKey) -> tuple[Latents, Latents, Memory]:
        """Rolls out the student with `last` + 1 evaluations per chunk.

        Args:
          key: for per-clip draws.

        Returns:
          The clips, the input of the last evaluation of every chunk, and the memory of all frames.
        """
        network = nets["simulator"].causal(self.chunks)
        keys = named_keys(key, "noise", "chunks")
        noise = draws.normal(keys.noise, batch.shape, jnp.float32)
        x0, entered, past = roll_out(network, noise, batch.condition, keys.chunks, self._until(last))
        if self.chunks.window:  # the memory has dropped frames that earlier chunks saw
            past = network.remember(x0, jnp.zeros(x0.shape[:2]), batch.condition)
        return x0, entered, past

    def _until(self, last: Step) -> Solve:
        """Solves a chunk in `last` + 1 evaluations; its second result is the input of the last one."""
        grid = self.grid

        def solve(velocity: VelocityFn, noise: Latents, key: PRNGKey) -> tuple[Latents, Latents]:
            keys = draws.split(key, self.steps)

            def x0(step: Step, x: Latents) -> Latents:
                t = jnp.broadcast_to(grid[step], x.shape[:1])
                return velocity_to_x0(f32(velocity(x, t)), x, t)

            def earlier(step: Step, x: Latents) -> Latents:
                fresh = draws.normal(keys[step], x.shape, jnp.float32)
                return add_noise(x0(step, x), fresh, jnp.broadcast_to(grid[step + 1], x.shape[:1]))

            entered = jax.lax.fori_loop(0, last, earlier, noise) if self.steps > 1 else noise
            return x0(last, entered), entered

        return solve
