"""The compiled programs behind a pipeline: encode, sample, decode.

Weights are arguments of every program, never constants of it: one executable serves all weights of one architecture
(teacher, student, average), and is kept between calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from vpae_jax.flow import solvers
from vpae_jax.flow.guidance import guided
from vpae_jax.flow.schedule import shifted_times
from vpae_jax.types import MASK_CHANNELS, Condition, Latents, Params, PRNGKey, UserError, Video

Solver = Literal["euler", "consistency", "unipc"]


@dataclass(frozen=True)
class Plan:
    """How latents are sampled; a sampler is compiled for each.

    Attributes:
      solver: "euler", "consistency" (predict x0, noise it afresh) or "unipc" (Wan's own for the teacher).
      steps: network evaluations; twice as many with guidance.
      shift: of the time grid, `flow.schedule` Eq. 8. One step has nothing to shift.

    Raises:
      UserError: an unknown solver, or no step.
    """

    solver: Solver
    steps: int
    shift: float

    def __post_init__(self) -> None:
        if self.solver not in ("euler", "consistency", "unipc"):
            raise UserError(f"solver is {self.solver!r}, expected 'euler', 'consistency' or 'unipc'")
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}, expected at least 1")
        if not self.shift > 0:
            raise UserError(f"shift is {self.shift}, expected a positive number")


def apply(model: nnx.Module, *inputs: Any) -> Any:
    """`model(*inputs)`, compiled."""
    return _apply(*nnx.split(model), *inputs)


def encode_first_frame(vae: nnx.Module, first: Video, num_frames: int) -> Latents:
    """4 mask channels (1 on the first latent frame), then latents of `first` (one frame) followed by grey frames."""
    return _encode_first_frame(*nnx.split(vae), first, num_frames)


def decode(vae: nnx.Module, latents: Latents) -> UInt8[Array, "b t height width 3"]:
    """Normalised latents to pixels."""
    return _decode(*nnx.split(vae), latents)


def sample(
    graph: nnx.GraphDef,
    weights: Params,
    plan: Plan,
    noise: Latents,
    condition: Condition,
    unconditional: Condition | None,
    guidance: float,
    key: PRNGKey,
) -> Latents:
    """Clean latents from noise; the whole loop is one program.

    Args:
      graph, weights: a `methods.base.Velocity`, split.
      plan: solver, steps, shift.
      noise: standard normal.
      condition: one a clip.
      unconditional: what guidance moves away from; None for no guidance.
      guidance: w of `v_u + w (v_c - v_u)`.
      key: for solvers that draw fresh noise.
    """
    return _sample(graph, plan, weights, noise, condition, unconditional, jnp.float32(guidance), key)


@partial(jax.jit, static_argnums=0)
def _apply(graph: nnx.GraphDef, weights: nnx.State, *inputs: Any) -> Any:
    return nnx.merge(graph, weights)(*inputs)


@partial(jax.jit, static_argnums=(0, 3))
def _encode_first_frame(graph: nnx.GraphDef, weights: nnx.State, first: Video, num_frames: int) -> Latents:
    b, _, height, width, _ = first.shape
    video = jnp.concatenate([first, jnp.zeros((b, num_frames - 1, height, width, 3), first.dtype)], axis=1)
    latents = nnx.merge(graph, weights).encode(video)
    mask = jnp.zeros((*latents.shape[:-1], MASK_CHANNELS)).at[:, 0].set(1)
    return jnp.concatenate([mask, latents], axis=-1)


@partial(jax.jit, static_argnums=0)
def _decode(graph: nnx.GraphDef, weights: nnx.State, latents: Latents) -> UInt8[Array, "b t height width 3"]:
    return jnp.round((nnx.merge(graph, weights).decode(latents) + 1) * 127.5).astype(jnp.uint8)


@partial(jax.jit, static_argnums=(0, 1))
def _sample(
    graph: nnx.GraphDef,
    plan: Plan,
    weights: Params,
    noise: Latents,
    condition: Condition,
    unconditional: Condition | None,
    guidance: Float[Array, ""],
    key: PRNGKey,
) -> Latents:
    model = nnx.merge(graph, weights)

    def velocity(x: Latents, t: Float[Array, "b"]) -> Latents:
        v = model(x, t, condition)
        if unconditional is None:
            return v
        return guided(model(x, t, unconditional), v, guidance)

    if plan.solver == "unipc":
        return solvers.unipc(velocity, noise, *solvers.unipc_grid(plan.steps, plan.shift))
    times = shifted_times(plan.steps, plan.shift)
    if plan.solver == "consistency":
        return solvers.consistency(velocity, noise, times, key)
    return solvers.euler(velocity, noise, times)
