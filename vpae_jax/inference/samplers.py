"""The compiled programs behind a pipeline: encode, sample, decode.

Weights are arguments of every program, never constants: one executable serves all weights of an architecture (teacher,
student, average), and is cached between calls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8

from vpae_jax.flow import solvers
from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.guidance import guided
from vpae_jax.flow.rollout import Guided, Recurrent, Solve, roll_out
from vpae_jax.flow.sampler import Sampler, Solver
from vpae_jax.flow.solvers import VelocityFn
from vpae_jax.models.wan_causal import CausalWan
from vpae_jax.models.wan_vae import WanVAE
from vpae_jax.models.wan_vae_grey import Grey, encode_first, encode_grey
from vpae_jax.types import MASK_CHANNELS, Condition, Latents, Params, PRNGKey, UserError, Video

Pixels = UInt8[Array, "b t height width 3"]


@dataclass(frozen=True)
class Denoiser:
    """The network to sample, or two experts for different ranges of timesteps (as in Wan 2.2).

    Attributes:
      graph, weights: a `methods.base.Velocity`, split; with two experts, the one for timesteps from `boundary` upwards.
      low: the other expert, split; None if one network covers all timesteps.
      boundary: timestep at and above which the first expert is evaluated.
    """

    graph: nnx.GraphDef
    weights: Params
    low: tuple[nnx.GraphDef, Params] | None = None
    boundary: float = 0.0


def apply(model: nnx.Module, *inputs: Any) -> Any:
    """`model(*inputs)`, compiled."""
    return _apply(*nnx.split(model), *inputs)


def encode_first_frame(vae: nnx.Module, first: Video, frames: int) -> tuple[Latents, Grey]:
    """The first condition frames of a clip: 4 mask channels (1 on the first latent frame), then latents of `first` (one
    frame) followed by grey frames, `frames` latent frames in total; and the state of the encoder."""
    return _encode_first_frame(*nnx.split(vae), first, frames)


def decode(vae: nnx.Module, latents: Latents) -> tuple[Pixels, Bool[Array, ""]]:
    """Decodes normalised latents to pixels, and returns whether both are finite."""
    return decoding(*nnx.split(vae), latents)


def check_finite(finite: Bool[Array, ""]) -> None:
    """Raises `UserError` if a video is not finite."""
    if not finite:
        raise UserError(
            "the video is not finite (NaN or infinity): the weights are damaged, or values overflow; sample in "
            "float32, or fetch the model again"
        )


def sample(
    denoiser: Denoiser,
    sampler: Sampler,
    noise: Latents,
    condition: Condition,
    unconditional: Condition | None,
    key: PRNGKey,
    given: Float[Array, "b first h w c"] | None = None,
) -> Latents:
    """Clean latents from noise; the whole loop is one program.

    Args:
      denoiser: the networks.
      sampler: solver, timesteps, guidance.
      noise: standard normal.
      condition: one per clip.
      unconditional: what guidance moves away from; None for no guidance.
      key: for solvers that draw fresh noise; one for each clip, or one for all.
      given: the first chunk, if a causal network continues it.
    """
    guidance = jnp.float32(sampler.guidance)
    if sampler.chunks is not None:
        plan = replace(sampler, guidance=1.0)  # one program for all guidance values
        return _roll_out(denoiser.graph, plan, denoiser.weights, noise, condition, unconditional, guidance, key, given)
    plan = (sampler.solver, sampler.times, denoiser.boundary)
    low_graph, low_weights = (None, None) if denoiser.low is None else denoiser.low
    weights = (denoiser.weights, low_weights)
    return _sample((denoiser.graph, low_graph), plan, weights, noise, condition, unconditional, guidance, key)


@partial(jax.jit, static_argnums=0)
def _apply(graph: nnx.GraphDef, weights: nnx.State, *inputs: Any) -> Any:
    return nnx.merge(graph, weights)(*inputs)


@partial(jax.jit, static_argnums=(0, 3))
def _encode_first_frame(graph: nnx.GraphDef, weights: nnx.State, first: Video, frames: int) -> tuple[Latents, Grey]:
    vae: WanVAE = nnx.merge(graph, weights)
    latents, past = encode_first(vae, first)
    mask = jnp.ones((*latents.shape[:-1], MASK_CHANNELS))
    grey, past = grey_frames(vae, past, frames - 1, latents.shape[2])
    return jnp.concatenate([jnp.concatenate([mask, latents], axis=-1), grey], axis=1), past


def grey_frames(vae: WanVAE, past: Grey, frames: int, rows: int) -> tuple[Latents, Grey]:
    """The next condition frames of a clip, which are grey: `frames` latent frames of `rows` rows; and the state of the
    encoder."""
    latents, past = encode_grey(vae, past, frames, rows)
    return jnp.concatenate([jnp.zeros((*latents.shape[:-1], MASK_CHANNELS)), latents], axis=-1), past


@partial(jax.jit, static_argnums=0)
def decoding(graph: nnx.GraphDef, weights: nnx.State, latents: Latents) -> tuple[Pixels, Bool[Array, ""]]:
    """`decode` for a split autoencoder, compiled."""
    return in_8_bits(latents, nnx.merge(graph, weights).decode(latents))


def in_8_bits(latents: Latents, pixels: Video) -> tuple[Pixels, Bool[Array, ""]]:
    """Converts pixels in [-1, 1] to uint8, and returns whether they and their latents are finite."""
    finite = jnp.isfinite(latents).all() & jnp.isfinite(pixels).all()
    return jnp.round((pixels + 1) * 127.5).astype(jnp.uint8), finite


@partial(jax.jit, static_argnums=(0, 1))
def _sample(
    graphs: tuple[nnx.GraphDef, nnx.GraphDef | None],
    plan: tuple[Solver, tuple[float, ...], float],
    weights: tuple[Params, Params | None],
    noise: Latents,
    condition: Condition,
    unconditional: Condition | None,
    guidance: Float[Array, ""],
    key: PRNGKey,
) -> Latents:
    solver, times, boundary = plan
    high = nnx.merge(graphs[0], weights[0])
    low = high if graphs[1] is None else nnx.merge(graphs[1], weights[1])

    def evaluate(x: Latents, t: Float[Array, "b"], given: Condition) -> Latents:
        if low is high:
            return high(x, t, given)
        return jax.lax.cond(t[0] >= boundary, lambda: high(x, t, given), lambda: low(x, t, given))

    def velocity(x: Latents, t: Float[Array, "b"]) -> Latents:
        v = evaluate(x, t, condition)
        if unconditional is None:
            return v
        return guided(evaluate(x, t, unconditional), v, guidance)

    return _solve(solver, times, velocity, noise, key)


@partial(jax.jit, static_argnums=(0, 1))
def _roll_out(
    graph: nnx.GraphDef,
    sampler: Sampler,
    weights: Params,
    noise: Latents,
    condition: Condition,
    unconditional: Condition | None,
    guidance: Float[Array, ""],
    key: PRNGKey,
    given: Float[Array, "b first h w c"] | None,
) -> Latents:
    network = causal_network(graph, sampler.chunks or Chunks(), weights, unconditional, guidance)
    first = solve_chunk(sampler, sampler.first) if sampler.first else None
    return roll_out(network, noise, condition, key, solve_chunk(sampler, sampler.times), first, given)[0]


def causal_network(
    graph: nnx.GraphDef,
    chunks: Chunks,
    weights: Params,
    unconditional: Condition | None,
    guidance: Float[Array, ""],
) -> Recurrent:
    """The network to roll out: a causal transformer, with guidance if `unconditional` is given."""
    network = CausalWan(nnx.merge(graph, weights), chunks)
    return network if unconditional is None else Guided(network, unconditional, guidance)


def solve_chunk(sampler: Sampler, times: tuple[float, ...]) -> Solve:
    """The solver of a chunk, with network evaluations at these timesteps."""

    def solve(velocity: VelocityFn, noise: Latents, key: PRNGKey) -> tuple[Latents, None]:
        return _solve(sampler.solver, times, velocity, noise, key), None

    return solve


def _solve(solver: Solver, times: tuple[float, ...], velocity: VelocityFn, noise: Latents, key: PRNGKey) -> Latents:
    if solver == "unipc":
        levels = np.asarray(times)
        return solvers.unipc(velocity, noise, levels, solvers.unipc_times(levels))
    if solver == "consistency":
        return solvers.consistency(velocity, noise, np.asarray(times, np.float32), key)
    return solvers.euler(velocity, noise, np.asarray(times, np.float32))
