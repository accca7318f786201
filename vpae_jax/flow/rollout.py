"""Generation of a clip chunk by chunk with a causal model, each chunk with a memory of those before it.

For each chunk in turn:

    1. solve      noise -> the chunk, with any solver, whose network evaluations read the memory
    2. remember   the finished chunk, at t = 0, is appended to the memory

(CausVid 2412.07772, Self-Forcing 2506.08009.) The memory has a fixed shape, so all chunks of one length share one
program and the loop over them is a scan. `next_chunk` is one iteration, and `make_chunk` and `remember` are its halves,
for callers that stream chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vpae_jax.flow import draws
from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.guidance import guided
from vpae_jax.flow.solvers import VelocityFn
from vpae_jax.types import Condition, Latents, Memory, PRNGKey, Times, UserError

# (velocity of the chunk, its noise, a key for each clip) -> the chunk, and optionally further latents of its size that
# the caller needs; None without them.
Solve = Callable[[VelocityFn, Latents, PRNGKey], tuple[Latents, Any]]


@runtime_checkable
class Recurrent(Protocol):
    """A causal velocity network (`models.wan_causal.CausalWan`)."""

    @property
    def chunks(self) -> Chunks: ...

    def empty(self, x: Latents) -> Memory:
        """An empty memory for clips of the size of `x`."""
        ...

    def step(self, x: Latents, t: Times, condition: Condition, past: Memory) -> tuple[Latents, Any]:
        """Velocity of a chunk given the memory, and the keys and values that `memorize` takes."""
        ...

    def memorize(self, past: Memory, pair: Any, frames: int) -> Memory:
        """The memory with a chunk of `frames` appended."""
        ...


@dataclass(frozen=True)
class Guided:
    """A causal network under classifier-free guidance; its memory holds every clip under both prompts.

    Attributes:
      network: evaluated once for both prompts.
      unconditional: the condition that guidance moves away from; its `frames` are replaced by those of the chunk's
        condition.
      guidance: w of `v_u + w (v_c - v_u)`.
    """

    network: Recurrent
    unconditional: Condition
    guidance: float | Float[Array, ""]

    @property
    def chunks(self) -> Chunks:
        return self.network.chunks

    def empty(self, x: Latents) -> Memory:
        return self.network.empty(jnp.concatenate([x, x]))

    def step(self, x: Latents, t: Times, condition: Condition, past: Memory) -> tuple[Latents, Any]:
        other = replace(self.unconditional, frames=condition.frames)
        both = jax.tree.map(lambda *parts: jnp.concatenate(parts), condition, other)
        v, pair = self.network.step(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both, past)
        return guided(v[len(x) :], v[: len(x)], self.guidance), pair

    def memorize(self, past: Memory, pair: Any, frames: int) -> Memory:
        return self.network.memorize(past, pair, frames)


def next_chunk(
    network: Recurrent, noise: Latents, condition: Condition, key: PRNGKey, past: Memory, solve: Solve
) -> tuple[Latents, Any, Memory]:
    """Generates one chunk and appends it to the memory.

    Args:
      network: causal.
      noise: standard normal, of the chunk's size.
      condition: of the chunk.
      key: one for each clip.
      past: of the chunks before it.
      solve: generates the chunk.

    Returns:
      The chunk, the second result of `solve`, and the memory including the chunk.
    """
    x0, more = make_chunk(network, noise, condition, key, past, solve)
    return x0, more, remember(network, x0, condition, past)


def make_chunk(
    network: Recurrent, noise: Latents, condition: Condition, key: PRNGKey, past: Memory, solve: Solve
) -> tuple[Latents, Any]:
    """Generates one chunk, as `next_chunk`, without remembering it."""
    return solve(lambda x, t: network.step(x, t, condition, past)[0], noise, key)


def remember(network: Recurrent, chunk: Latents, condition: Condition, past: Memory) -> Memory:
    """The memory with a finished chunk appended."""
    _, pair = network.step(chunk, jnp.zeros(len(chunk)), condition, past)
    return network.memorize(past, pair, chunk.shape[1])


def roll_out(
    network: Recurrent,
    noise: Latents,
    condition: Condition,
    key: PRNGKey,
    solve: Solve,
    first: Solve | None = None,
    given: Float[Array, "b first h w c"] | None = None,
) -> tuple[Latents, Any, Memory]:
    """Generates a whole clip from noise.

    Args:
      network: causal.
      noise: standard normal.
      condition: of the whole clip.
      key: one for each clip, or one for all.
      solve: generates a chunk.
      first: generates the first chunk, if that differs (First-Frame Enhancement, 2511.01419).
      given: the first chunk itself, which is then remembered instead of generated; the second result of `solve` must be
        None in this case.

    Returns:
      The clip, the second results of `solve` concatenated along frames, and the memory after the last chunk.

    Raises:
      UserError: the clip is not a whole number of chunks, or `given` does not have the frames of the first chunk.
    """
    clips, frames = noise.shape[:2]
    spans = network.chunks.spans(frames)
    keys = draws.numbered(draws.clip_keys(key, clips), jnp.arange(len(spans), dtype=jnp.uint32))
    past, made = network.empty(noise), []
    if given is not None:
        if given.shape[1] != spans[0][1]:
            raise UserError(
                f"{given.shape[1]} latent frames are given, but the first chunk has {spans[0][1]}; set "
                f"chunks.first={given.shape[1]}"
            )
        first = lambda velocity, noise, key: (given.astype(noise.dtype), None)  # noqa: E731
    alone = int(first is not None or len(spans) == 1 or network.chunks.first not in (0, network.chunks.size))
    start = spans[0][1] if alone else 0
    if alone:
        own = cut(condition, 0, start)
        x0, more, past = next_chunk(network, noise[:, :start], own, keys[0], past, first or solve)
        made.append((x0, more))
    if start < frames:

        def turn(past: Memory, given: Any) -> tuple[Memory, Any]:
            noise, frames, key = given
            own = replace(condition, frames=frames)
            x0, more, past = next_chunk(network, noise, own, key, past, solve)
            return past, (x0, more)

        def parts(x: Array) -> Array:
            """[b, frames, ...] -> [chunk, b, frames of it, ...]"""
            return jnp.moveaxis(x[:, start:].reshape(clips, len(spans) - alone, -1, *x.shape[2:]), 1, 0)

        frames = jax.tree.map(parts, condition.frames)
        past, stacked = jax.lax.scan(turn, past, (parts(noise), frames, keys[alone:]))
        made.append(jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(clips, -1, *x.shape[3:]), stacked))
    x0, more = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *made)
    return x0, more, past


def cut(condition: Condition, start: int, stop: int) -> Condition:
    """The condition of the chunk of these latent frames."""
    return condition if condition.frames is None else replace(condition, frames=condition.frames[:, start:stop])
