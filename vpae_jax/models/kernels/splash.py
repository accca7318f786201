"""Splash attention, JAX's Pallas kernel for TPUs: with a full mask, and with that of a clip in chunks.

Sequences are padded to whole tiles; padded keys are in another segment than all queries. The kernel knows no bias for
keys, so a bias is written into more channels: one for queries, the bias for keys. Of chunks, the kernel leaves out the
tiles of which nothing is seen, and computes the mask within the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    FullMask,
    Mask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jaxtyping import Array, Float, Int

from vpae_jax.models.kernels.reference import Bias, Keys, Queries
from vpae_jax.models.kernels.remat import RESIDUALS

# Head dimensions and tiles are multiples of this.
LANES = 128
# Tokens of a tile; of several that pad equally little, the largest. Larger ones exceed the 16 MiB of vector memory that
# a kernel gets by default on a TPU v5e.
TILES = (1024, 768, 512)
# A hidden key's logit: finite, since it is multiplied; its weight is exactly zero.
HIDDEN = -1e30


def attention(
    q: Queries,
    k: Keys,
    v: Keys,
    bias: Bias | None = None,
    visible: Int[Array, ""] | None = None,
    interpret: bool = False,
) -> Queries:
    """As `reference.attention`.

    Args:
      q: queries; head_dim is a multiple of 128.
      k: keys.
      v: values.
      bias: logit added for each key; a constant, which gets no gradient.
      visible: keys from this number on are hidden.
      interpret: runs the kernel without a TPU, slowly; for tests.
    """
    n, m = q.shape[1], k.shape[1]
    q = _scaled(q)
    if bias is not None:
        q, k = _with_bias(q, k, bias)
    rows, columns = _whole_tiles(n), _whole_tiles(m)
    segments = None
    if visible is not None or columns > m:
        last = m if visible is None else visible
        segments = SegmentIds(jnp.zeros(rows, jnp.int32), (jnp.arange(columns) >= last).astype(jnp.int32))
    return _run(q, k, v, FullMask((rows, columns)), segments, interpret)


def by_chunks(
    q: Queries,
    k: Queries,
    v: Queries,
    past: tuple[Queries, Queries] | None,
    stops: tuple[int, ...],
    interpret: bool = False,
) -> Queries:
    """Attention of a clip in chunks, each of which sees itself and what is before it.

    Args:
      q: queries; head_dim is a multiple of 128.
      k, v: of the same tokens.
      past: keys and values of what the chunks see before them; None if that is `k` and `v`.
      stops: the token after the last of each chunk. All but the first are of one size.
      interpret: as `attention`.
    """
    n = q.shape[1]
    if past is not None:
        k, v = jnp.concatenate([k, past[0]], axis=1), jnp.concatenate([v, past[1]], axis=1)
    first, *others = stops
    size = others[0] - first if others else n
    seen = _Seen(first, size, None if past is None else n)
    mask = _Chunks(_whole_tiles(n), _whole_tiles(k.shape[1]), stops, seen)
    return _run(_scaled(q), k, v, mask, None, interpret)


@dataclass(frozen=True)
class _Seen:
    """Which keys a query sees, by numbers alone, so that the kernel computes it.

    Attributes:
      first: tokens of the first chunk.
      size: of each later one.
      past: the number of the first key that stands for what is before a chunk; None if its own keys do.
    """

    first: int
    size: int
    past: int | None

    def __call__(self, stop: Any, key: Any) -> Any:
        """Whether a query is shown a key, of NumPy's or JAX's integers.

        Args:
          stop: the token after the last of the query's chunk.
          key: the key's number.
        """
        if self.past is None:
            return key < stop
        start = stop - self.size  # a shorter first chunk begins before the first key
        if self.first > self.size:
            start = start * (stop != self.first)
        return ((key >= start) & (key < stop)) | ((key >= self.past) & (key < self.past + start))


@dataclass(frozen=True)
class _Chunks(Mask):
    """What the queries of a clip in chunks see, padded.

    The kernel hands `q_sequence` and numbers of keys to `mask_function`.

    Attributes:
      rows, columns: queries and keys.
      stops: as of `by_chunks`.
      mask_function: who sees what.
    """

    rows: int
    columns: int
    stops: tuple[int, ...]
    mask_function: _Seen

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def q_sequence(self) -> np.ndarray:
        """The end of each query's chunk; padding is of the last one."""
        chunk = np.searchsorted(self.stops, np.arange(self.rows), side="right")
        return np.asarray(self.stops, np.int32)[np.minimum(chunk, len(self.stops) - 1)]

    def __getitem__(self, place: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (np.arange(length)[part] for length, part in zip(self.shape, place, strict=True))
        stops, row = np.unique(self.q_sequence[rows], return_inverse=True)  # a tile has few
        return self.mask_function(stops[:, None], columns[None, :])[row]


def _run(
    q: Float[Array, "b n heads d"],
    k: Float[Array, "b m heads d"],
    v: Float[Array, "b m heads head_dim"],
    mask: Mask,
    segments: SegmentIds | None,
    interpret: bool,
) -> Queries:
    """Pads, and runs the kernel, which does not scale logits."""
    n, heads = q.shape[1], q.shape[2]
    tile_q, tile_k = _tile(n), _tile(k.shape[1])
    kernel = make_splash_mha(
        MultiHeadMask([mask] * heads),
        block_sizes=_block_sizes(tile_q, tile_k),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )

    def one_clip(q: Array, k: Array, v: Array) -> Array:
        out = kernel(q, k, v, segment_ids=segments)
        assert isinstance(out, Array)  # not a pair: residuals are not asked for
        return out

    padded = _padded(q, tile_q), _padded(k, tile_k), _padded(v, tile_k)
    return jnp.swapaxes(jax.vmap(one_clip)(*padded)[:, :, :n], 1, 2)


def _scaled(q: Queries) -> Queries:
    return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)


def _with_bias(
    q: Queries, k: Keys, bias: Bias
) -> tuple[Float[Array, "b n heads wider"], Float[Array, "b m heads wider"]]:
    """Adds channels whose products are the bias: as many summands as its 24 bits need in k's dtype, then zeros."""
    rest, summands = jnp.maximum(jax.lax.stop_gradient(bias), HIDDEN), []
    for _ in range(1 if k.dtype == jnp.float32 else 3):
        summands.append(rest.astype(k.dtype))
        rest = rest - summands[-1].astype(jnp.float32)
    column = jnp.stack(summands, -1)[:, :, None, :]
    column = jnp.broadcast_to(column, (*k.shape[:3], len(summands)))
    ones = jnp.ones((*q.shape[:3], len(summands)), q.dtype)
    more = ((0, 0), (0, 0), (0, 0), (0, LANES - len(summands)))
    return jnp.concatenate([q, jnp.pad(ones, more)], -1), jnp.concatenate([k, jnp.pad(column, more)], -1)


def _padded(x: Float[Array, "b n heads head_dim"], tile: int) -> Float[Array, "b heads padded head_dim"]:
    """Heads first, and zeros up to a whole number of tiles."""
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % tile), (0, 0)))


def _tile(n: int) -> int:
    """Tokens of a tile: a short sequence is one, a long one has the tile size that pads least."""
    if n <= TILES[0]:
        return -(-n // LANES) * LANES
    return min(TILES, key=lambda tile: -n % tile)


def _whole_tiles(n: int) -> int:
    """Tokens with their padding."""
    return -(-n // _tile(n)) * _tile(n)


def _block_sizes(tile_q: int, tile_k: int) -> BlockSizes:
    """The same tiles forward and backward; products of half a tile of keys, so that two overlap in the pipeline."""
    half = tile_k // 2 if tile_k % (2 * LANES) == 0 else tile_k
    return BlockSizes(
        block_q=tile_q,
        block_kv=tile_k,
        block_kv_compute=half,
        block_q_dkv=tile_q,
        block_kv_dkv=tile_k,
        block_kv_dkv_compute=half,
        block_q_dq=tile_q,
        block_kv_dq=tile_k,
    )
