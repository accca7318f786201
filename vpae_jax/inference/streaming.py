"""Streams a clip chunk by chunk, each while the next one is being generated.

For each chunk in turn:

    1. make       noise, the chunk's condition, memory -> latents
    2. decode     latents, the autoencoder's cache -> frames
    3. remember   latents, memory -> memory

The host waits for a chunk's frames only after the next chunk's programs have been dispatched to the device, which runs
them in this order: so the device never idles, and frames are available before their chunk is remembered. The state
carried from chunk to chunk, the memory and two caches, has a fixed size, and the inputs (noise, condition frames) are
made a chunk at a time.

The results equal those of `samplers.sample` and `samplers.decode` on the whole clip.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8, UInt32

from vpae_jax.flow import draws
from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.rollout import make_chunk, remember
from vpae_jax.flow.sampler import Sampler
from vpae_jax.inference import samplers
from vpae_jax.inference.samplers import MASK_CHANNELS, Denoiser, Pixels
from vpae_jax.models.tiny_decoder import TinyDecoder
from vpae_jax.models.wan_vae import Cache, WanVAE
from vpae_jax.models.wan_vae_grey import Grey
from vpae_jax.types import Condition, Latents, Memory, Params, PRNGKey, UserError

Arguments = ParamSpec("Arguments")
# Consecutive frames of a video.
Piece = UInt8[np.ndarray, "_ height width 3"]


def frames_held(chunks: Chunks | None, frames: int) -> int:
    """Number of latent frames that the memory holds for a clip of `frames`; `sys.maxsize` stands for an endless clip.

    Raises:
      UserError: the model is not causal, the clip is not a whole number of chunks, or it would need unlimited memory.
    """
    if chunks is None:
        raise UserError(
            "this model generates all frames of a video at once, and cannot stream; load a causal model, or generate "
            "the whole video"
        )
    if frames < sys.maxsize:
        chunks.spans(frames)
    elif not chunks.window:
        raise UserError(
            "an endless video was requested, but this model sees all earlier frames, which needs unlimited memory; "
            "give a number of frames"
        )
    return chunks.slots(frames)


@dataclass(frozen=True)
class Stream:
    """One clip to be streamed.

    Attributes:
      vae: encodes its condition frames.
      decoder: decodes it.
      denoiser: a causal network.
      sampler: with `chunks`.
      takes_image: whether the network reads condition frames.
      condition: of the clip, without its `frames`.
      unconditional: what guidance moves away from; None for no guidance.
      first: the first frame that the network reads, in [-1, 1]; None if none is given.
      given: latents of the first chunk, which the network continues; None if it generates them.
      shape: [1, f, h, w, c] of the clip's latents; f is `sys.maxsize` for an endless clip.
      seed: determines the noise.
    """

    vae: WanVAE
    decoder: WanVAE | TinyDecoder
    denoiser: Denoiser
    sampler: Sampler
    takes_image: bool
    condition: Condition
    unconditional: Condition | None
    first: Float[Array, "1 1 height width 3"] | None
    given: Latents | None
    shape: tuple[int, int, int, int, int]
    seed: int

    def frames(self) -> Iterator[Piece]:
        """Generates the clip, and yields each chunk's frames.

        Raises:
          UserError: frames that are not finite.
        """
        chunks = self.sampler.chunks
        assert chunks is not None
        b, latent_frames, h, w, c = self.shape
        vae, decoder = nnx.split(self.vae), nnx.split(self.decoder)
        graph, weights = self.denoiser.graph, self.denoiser.weights
        guided = (self.unconditional, jnp.float32(self.sampler.guidance))
        noise_key, key = draws.keys_of_seed(self.seed)
        memory = _empty(graph, chunks, (b, chunks.slots(latent_frames), h, w, c), weights, *guided)
        grey, cache = None, None
        waiting: deque[tuple[Pixels, Bool[Array, ""]]] = deque()
        for number, (start, stop) in enumerate(chunks.walk(latent_frames)):
            shape = (b, stop - start, h, w, c)
            given, grey = self._condition(vae, shape, grey)
            own = replace(self.condition, frames=given)
            if self.given is not None and not number:
                latents = self.given
            else:
                noise = draws.noise_of_frames(noise_key, shape, start)
                times = self.sampler.first if not number and self.sampler.first else self.sampler.times
                plan = replace(self.sampler, times=times, first=(), guidance=1.0)  # one program for any guidance
                key_of_chunk = (key[None], jnp.uint32(number))
                latents = _make(graph, plan, weights, *guided, noise, own, key_of_chunk, memory)
            frames, finite, cache = _decode(*decoder, latents, cache)
            frames.copy_to_host_async()
            if stop < latent_frames:
                memory = _remember(graph, chunks, weights, *guided, latents, own, memory)
            waiting.append((frames, finite))
            if len(waiting) > 1:
                yield _fetched(*waiting.popleft())
        yield _fetched(*waiting.popleft())

    def _condition(
        self, vae: tuple[nnx.GraphDef, Any], shape: tuple[int, ...], grey: Grey | None
    ) -> tuple[Latents | None, Grey | None]:
        """A chunk's condition frames, and the state of the encoder."""
        if not self.takes_image:
            return None, None
        if self.first is None:
            return jnp.zeros((*shape[:-1], MASK_CHANNELS + shape[-1])), None
        if grey is None:
            return samplers.encode_first_frame(self.vae, self.first, shape[1])
        return _encode_grey(*vae, grey, *shape[1:3])


def in_pieces(
    prepare: Callable[Concatenate[Any, Arguments], Callable[[], Latents]],
) -> Callable[Concatenate[Any, Arguments], Iterator[Piece]]:
    """A pipeline's method that samples the video that `prepare` prepares, and yields its frames as `decoded` does."""

    @wraps(prepare)
    def pieces(self: Any, *args: Arguments.args, **options: Arguments.kwargs) -> Iterator[Piece]:
        yield from decoded(self.decoder, prepare(self, *args, **options)())

    return pieces


def joined(
    pieces: Callable[Concatenate[Any, Arguments], Iterator[Piece]],
) -> Callable[Concatenate[Any, Arguments], Piece]:
    """Turns a method that yields pieces of a video into one that returns all frames at once."""

    @wraps(pieces)
    def whole(self: Any, *args: Arguments.args, **options: Arguments.kwargs) -> Piece:
        return np.concatenate([*pieces(self, *args, **options)])

    return whole


def decoded(decoder: WanVAE | TinyDecoder, latents: Latents) -> Iterator[Piece]:
    """Decodes one clip, and yields the frames of one latent frame at a time: they are copied to the host and used there
    while the device decodes the next ones. The device holds the frames of two latent frames, however long the clip.

    Raises as `Stream.frames`.
    """
    own, cache = nnx.split(decoder), None
    waiting: deque[tuple[Pixels, Bool[Array, ""]]] = deque()
    for number in range(latents.shape[1]):
        frames, finite, cache = _decode_one(*own, latents, jnp.uint32(number), cache)
        frames.copy_to_host_async()
        waiting.append((frames, finite))
        if len(waiting) > 1:
            yield _fetched(*waiting.popleft())
    yield _fetched(*waiting.popleft())


def _fetched(frames: Pixels, finite: Bool[Array, ""]) -> Piece:
    """Copies frames to the host as they are: slicing on the device would queue behind the next chunk's programs."""
    samplers.check_finite(finite)
    return np.asarray(frames)[0]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(
    graph: nnx.GraphDef,
    chunks: Chunks,
    shape: tuple[int, ...],
    weights: Params,
    unconditional: Condition | None,
    guidance: Float[Array, ""],
) -> Memory:
    return samplers.causal_network(graph, chunks, weights, unconditional, guidance).empty(jnp.zeros(shape))


@partial(jax.jit, static_argnums=(0, 1))
def _make(
    graph: nnx.GraphDef,
    sampler: Sampler,
    weights: Params,
    unconditional: Condition | None,
    guidance: Float[Array, ""],
    noise: Latents,
    condition: Condition,
    key: tuple[PRNGKey, UInt32[Array, ""]],
    past: Memory,
) -> Latents:
    """Generates a chunk; `key` is the clip's key and the chunk's number."""
    network = samplers.causal_network(graph, sampler.chunks or Chunks(), weights, unconditional, guidance)
    own = draws.numbered(key[0], key[1][None])[0]
    return make_chunk(network, noise, condition, own, past, samplers.solve_chunk(sampler, sampler.times))[0]


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=7)
def _remember(
    graph: nnx.GraphDef,
    chunks: Chunks,
    weights: Params,
    unconditional: Condition | None,
    guidance: Float[Array, ""],
    chunk: Latents,
    condition: Condition,
    past: Memory,
) -> Memory:
    return remember(samplers.causal_network(graph, chunks, weights, unconditional, guidance), chunk, condition, past)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _decode(
    graph: nnx.GraphDef, weights: Params, latents: Latents, cache: Cache | None
) -> tuple[Pixels, Bool[Array, ""], Cache]:
    pixels, left = nnx.merge(graph, weights).decode_next(latents, cache)
    frames, finite = samplers.in_8_bits(latents, pixels)
    return frames, finite, left


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def _decode_one(
    graph: nnx.GraphDef, weights: Params, latents: Latents, number: UInt32[Array, ""], cache: Cache | None
) -> tuple[Pixels, Bool[Array, ""], Cache]:
    one = jax.lax.dynamic_slice_in_dim(latents, number, 1, axis=1)
    pixels, left = nnx.merge(graph, weights).decode_next(one, cache)
    return *samplers.in_8_bits(one, pixels), left


@partial(jax.jit, static_argnums=(0, 3, 4), donate_argnums=2)
def _encode_grey(graph: nnx.GraphDef, weights: Params, past: Grey, frames: int, rows: int) -> tuple[Latents, Grey]:
    return samplers.grey_frames(nnx.merge(graph, weights), past, frames, rows)
