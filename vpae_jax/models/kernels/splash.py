"""Splash attention, JAX's Pallas kernel for TPUs, with a full mask.

Sequences are padded to whole tiles; padded keys are in another segment than all queries. The kernel knows no bias for
keys, so a bias is written into more channels: one for queries, the bias for keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    FullMask,
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
    n, m, heads = q.shape[1], k.shape[1], q.shape[2]
    # The kernel does not scale logits.
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    if bias is not None:
        q, k = _with_bias(q, k, bias)
    tile_q, tile_k = _tile(n), _tile(m)
    q, k, v = _padded(q, tile_q), _padded(k, tile_k), _padded(v, tile_k)
    rows, columns = q.shape[2], k.shape[2]
    kernel = make_splash_mha(
        MultiHeadMask([FullMask((rows, columns))] * heads),
        block_sizes=_block_sizes(tile_q, tile_k),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
    segments = None
    if visible is not None or columns > m:
        last = m if visible is None else visible
        segments = SegmentIds(jnp.zeros(rows, jnp.int32), (jnp.arange(columns) >= last).astype(jnp.int32))

    def one_clip(q: Array, k: Array, v: Array) -> Array:
        out = kernel(q, k, v, segment_ids=segments)
        assert isinstance(out, Array)  # not a pair: residuals are not asked for
        return out

    return jnp.swapaxes(jax.vmap(one_clip)(q, k, v)[:, :, :n], 1, 2)


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
