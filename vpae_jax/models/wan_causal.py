"""The Wan transformer as a causal model: a clip in chunks of latent frames, each of which sees itself and those before.

The weights are those of `wan_dit.WanTransformer`; only the attention pattern differs. There are three ways to evaluate
it:

    model(x, t)               all chunks at once, with a timestep for each frame; a chunk sees the earlier ones as they
                              are in x (diffusion forcing, 2407.01392)
    model.recall(x, t, past)  all chunks at once; a chunk sees the earlier ones in a memory, for example of clean frames
                              (teacher forcing) or of the model's own (Self-Forcing, 2506.08009)
    model.step(x, t, past)    one chunk after those in the memory, with fixed shapes: a roll-out

    model.remember(x, t)      the memory of a whole clip in one evaluation; `memorize` adds a step's keys to a memory

A memory holds keys before their rotary embedding, which is applied when they are read, for the position at which they
then stand. So a moving window, and a sink before it, keep the distances with which the model was trained, and positions
never exceed the memory. Instead of using a mask, each chunk's queries attend to the slices of keys that they see, so
that any attention kernel works, and nothing masked is computed. On TPUs, where a kernel takes minutes to compile, all
chunks share one kernel with a tiled mask, unless there is a window. `step` masks the unused part of the memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vpae_jax.flow.chunks import Chunks
from vpae_jax.models import kernels
from vpae_jax.models.kernels import splash
from vpae_jax.models.parallel import CausalAttention, Pair, Queries, Tables
from vpae_jax.models.rotary import rope_table, rotate
from vpae_jax.models.wan_blocks import Context
from vpae_jax.models.wan_dit import WanTransformer
from vpae_jax.types import Condition, FrameTimes, Latents, Memory, Times, Tokens, UserError

# Keys, before their rotary embedding, and values of a chunk in all layers.
Pairs = tuple[Float[Array, "layers b n heads head_dim"], Float[Array, "layers b n heads head_dim"]]


@dataclass(frozen=True)
class CausalWan:
    """A Wan transformer on chunks of latent frames, in order.

    Attributes:
      model: the transformer; its patches must be one latent frame deep, as Wan's are.
      chunks: how a clip is divided.

    Raises:
      UserError: the transformer's patches are deeper.
    """

    model: WanTransformer
    chunks: Chunks

    def __post_init__(self) -> None:
        depth = self.model.config.patch_size[0]
        if depth != 1:
            raise UserError(
                f"the transformer's patches are {depth} latent frames deep; a causal model needs patches of 1"
            )

    def __call__(self, x: Latents, t: FrameTimes, condition: Condition) -> Latents:
        """Velocity of `x`, with a timestep for each frame, in the dtype of `x`.

        Raises:
          UserError: as `WanTransformer`; or the clip is not a whole number of chunks, or the mesh cannot exchange its
            tokens for heads.
        """
        return self._whole(x, t, condition, None)

    def recall(self, x: Latents, t: FrameTimes, condition: Condition, past: Memory) -> Latents:
        """Velocity of `x`; each chunk sees itself, and earlier frames in a memory of the whole clip.

        Raises:
          UserError: as `__call__`.
        """
        return self._whole(x, t, condition, past)

    def remember(self, x: Latents, t: FrameTimes, condition: Condition) -> Memory:
        """The memory of all frames of `x`; each frame sees the earlier ones as they are in `x`.

        Raises:
          UserError: as `__call__`.
        """
        hidden, _, context = self._enter(x, t, condition)
        attend = _Whole(self.chunks.spans(x.shape[1]), self.chunks, context.tokens // x.shape[1])
        _, pair = self._run(hidden, context._replace(causal=attend, keep=True), None)
        return self._placed(Memory(*pair, frames=jnp.int32(x.shape[1])))

    def empty(self, x: Latents) -> Memory:
        """An empty memory for clips of the size of `x`."""
        config, (rows, columns) = self.model.config, self._grid(x)
        tokens = self.chunks.slots(x.shape[1]) * rows * columns
        shape = (config.num_layers, len(x), tokens, config.num_attention_heads, config.attention_head_dim)
        zeros = jnp.zeros(shape, self.model.dtype)
        return self._placed(Memory(zeros, zeros, frames=jnp.int32(0)))

    def step(self, x: Latents, t: Times, condition: Condition, past: Memory) -> tuple[Latents, Pairs]:
        """Velocity of one chunk after the frames of a memory, and the chunk's keys and values (`memorize`).

        Args:
          x: one chunk's latents.
          t: one time a clip.
          condition: whose `frames`, if there are any, are the chunk's.
          past: of the frames before it, with places left for the chunk's own.
        """
        hidden, embedding, context = self._enter(x, t, condition)
        rows, columns = self._grid(x)
        slots = past.keys.shape[2] // (rows * columns)
        cos, sin = rope_table((slots, rows, columns), self.model.config.attention_head_dim)
        context = context._replace(causal=_Step(past.frames * rows * columns), keep=True, cos=cos, sin=sin)
        hidden, pair = self._run(hidden, context, past)
        return self.model.leave(hidden, embedding, x), pair

    def memorize(self, past: Memory, pair: Pairs, frames: int) -> Memory:
        """The memory with a chunk's keys and values appended. Frames before the window that are not in the sink are
        dropped.

        Args:
          past: a memory.
          pair: of the layers, from `step`.
          frames: latent frames of the chunk.
        """
        tokens = pair[0].shape[2] // frames
        at = (0, 0, past.frames * tokens, 0, 0)
        both = [
            jax.lax.dynamic_update_slice(old, new, at) for old, new in zip((past.keys, past.values), pair, strict=True)
        ]
        count = past.frames + frames
        if self.chunks.window:
            slots = jnp.arange(both[0].shape[2] // tokens)
            over = jnp.maximum(count - self.chunks.sink - self.chunks.window, 0)
            kept = jnp.where(slots < self.chunks.sink, slots, jnp.minimum(slots + over, slots[-1]))
            both = [_frames(x, kept, tokens) for x in both]
            count = count - over
        return self._placed(Memory(both[0], both[1], frames=count))

    def _whole(self, x: Latents, t: FrameTimes, condition: Condition, past: Memory | None) -> Latents:
        hidden, embedding, context = self._enter(x, t, condition)
        attend = _Whole(self.chunks.spans(x.shape[1]), self.chunks, context.tokens // x.shape[1])
        hidden, _ = self._run(hidden, context._replace(causal=attend), past)
        return self.model.leave(hidden, embedding, x, context.frame)

    def _enter(
        self, x: Latents, t: Times | FrameTimes, condition: Condition
    ) -> tuple[Tokens, Float[Array, "b *f d"], Context]:
        hidden, embedding, context = self.model.enter(x, t, condition, aligned=False)
        self.model.layout.check_causal(context.tokens)
        if t.ndim == 1:
            return hidden, embedding, context
        return hidden, embedding, context._replace(frame=jnp.arange(context.tokens) // (context.tokens // x.shape[1]))

    def _run(self, hidden: Tokens, context: Context, past: Memory | None) -> tuple[Tokens, Any]:
        layers = self.model.layers(0, self.model.config.num_layers, True)
        pairs = None if past is None else (past.keys, past.values)
        return jax.lax.scan(self.model.block(context, True), hidden, (layers, pairs))

    def _grid(self, x: Latents) -> tuple[int, int]:
        """Number of token rows and columns per frame."""
        _, height, width = self.model.config.patch_size
        return x.shape[2] // height, x.shape[3] // width

    def _placed(self, memory: Memory) -> Memory:
        place = self.model.layout.place_memory
        return Memory(place(memory.keys), place(memory.values), memory.frames)


@dataclass(frozen=True)
class _Whole(CausalAttention):
    """Attention of all chunks at once, each to the keys that it sees.

    Attributes:
      spans: the chunks' frames.
      chunks: how a clip is divided, and what a chunk sees.
      frame: number of tokens per latent frame.
    """

    spans: tuple[tuple[int, int], ...]
    chunks: Chunks
    frame: int

    def __call__(
        self, q: Queries, k: Queries, v: Queries, past: Pair | None, tables: Tables, platform: str | None
    ) -> Queries:
        earlier, cos, sin = past or (k, v), *tables
        q, own = rotate(q, cos, sin), rotate(k, cos, sin)
        turned = own if past is None else rotate(earlier[0], cos, sin)
        kernel = kernels.choose(platform or jax.default_backend(), q.shape, own.shape, q.dtype)
        if kernel == "splash" and not self.chunks.window:
            stops = tuple(stop * self.frame for _, stop in self.spans)
            return splash.by_chunks(q, own, v, None if past is None else (turned, earlier[1]), stops)
        results = []
        for start, stop in self.spans:
            keys, values = [], []
            for first, last, later in self.chunks.remembered(start):
                run, place = self._rows(first, last), self._rows(first + later, last + later)
                moved = rotate(earlier[0][:, run], cos[place], sin[place]) if later else turned[:, run]
                keys.append(moved)
                values.append(earlier[1][:, run])
            mine = self._rows(start, stop)
            keys, values = _joined([*keys, own[:, mine]]), _joined([*values, v[:, mine]])
            results.append(kernels.attention(q[:, mine], keys, values, platform=platform))
        return _joined(results)

    def _rows(self, first: int, last: int) -> slice:
        return slice(first * self.frame, last * self.frame)


@dataclass(frozen=True)
class _Step(CausalAttention):
    """Attention of one chunk after a memory of fixed shape.

    Attributes:
      used: number of the memory's tokens that are in use.
    """

    used: Int[Array, ""]

    def __call__(
        self, q: Queries, k: Queries, v: Queries, past: Pair | None, tables: Tables, platform: str | None
    ) -> Queries:
        assert past is not None
        at, size = (0, self.used, 0, 0), q.shape[1]
        keys, values = (jax.lax.dynamic_update_slice(old, new, at) for old, new in zip(past, (k, v), strict=True))
        q = rotate(q, *(jax.lax.dynamic_slice_in_dim(table, self.used, size) for table in tables))
        return kernels.attention(q, rotate(keys, *tables), values, platform=platform, visible=self.used + size)


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _frames(
    x: Float[Array, "layers b m heads head_dim"], kept: Int[Array, "slots"], tokens: int
) -> Float[Array, "layers b m heads head_dim"]:
    """Selects frames of keys or values by index."""
    layers, b, m, *rest = x.shape
    return jnp.take(x.reshape(layers, b, m // tokens, tokens, *rest), kept, axis=2).reshape(x.shape)
