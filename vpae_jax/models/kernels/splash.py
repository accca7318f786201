"""Splash attention, JAX's Pallas kernel for TPUs: with a full mask, and with that of a clip in chunks.

Sequences are padded to whole tiles; padded keys are in a different segment from all queries. The kernel has no bias for
keys, so a bias is written into additional channels: ones for the queries, the bias for the keys. For chunks, the kernel
skips the tiles that are entirely masked, and computes the mask within the others.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import FullMask, Mask, SegmentIds
from jaxtyping import Array, Float

from vpae_jax.models.kernels.chunk_mask import ChunkMask, Seen
from vpae_jax.models.kernels.passes import Passes, Wide, WideKeys
from vpae_jax.models.kernels.reference import Bias, Count, Keys, LogSumExp, Queries
from vpae_jax.models.kernels.splash_kernel import LANES, Splash, whole_tiles

# The logit of a masked key: finite, since it is multiplied; its weight is exactly zero.
HIDDEN = -1e30


def attention(
    q: Queries,
    k: Keys,
    v: Keys,
    bias: Bias | None = None,
    visible: Count | None = None,
    interpret: bool = False,
) -> Queries:
    """As `reference.attention`.

    Args:
      q: queries; head_dim is a multiple of 128.
      k: keys.
      v: values.
      bias: logit added for each key; a constant, which gets no gradient.
      visible: keys from this index on are masked.
      interpret: runs the kernel without a TPU, slowly; for tests.
    """
    q = _scaled(q)
    if bias is not None:
        q, k = _with_bias(q, k, bias)
    return _passes(_full(q, k), interpret).attend(q, k, v, _hidden_from(k, visible))


def by_chunks(
    q: Queries,
    k: Queries,
    v: Queries,
    past: tuple[Queries, Queries] | None,
    stops: tuple[int, ...],
    interpret: bool = False,
) -> Queries:
    """Attention of a clip in chunks, each of which sees itself and earlier ones.

    Args:
      q: queries; head_dim is a multiple of 128.
      k, v: keys and values of the same tokens.
      past: keys and values by which the chunks see earlier ones; None if these are `k` and `v`.
      stops: index after the last token of each chunk. All chunks but the first have the same size.
      interpret: as in `attention`.
    """
    n = q.shape[1]
    if past is not None:
        k, v = jnp.concatenate([k, past[0]], axis=1), jnp.concatenate([v, past[1]], axis=1)
    first, *others = stops
    size = others[0] - first if others else n
    seen = Seen(first, size, None if past is None else n)
    mask = ChunkMask(whole_tiles(n), whole_tiles(k.shape[1]), stops, seen)
    return _passes(mask, interpret).attend(_scaled(q), k, v)


def forward(q: Queries, k: Keys, v: Keys, visible: Count | None, interpret: bool = False) -> tuple[Queries, LogSumExp]:
    """The forward pass for some of the keys; `passes.Passes`.

    Args:
      visible: keys from this index on, which may be 0, are masked.
    """
    return _passes(_full(q, k), interpret).forward(_scaled(q), k, v, _hidden_from(k, visible))


def backward(
    q: Queries,
    k: Keys,
    v: Keys,
    visible: Count | None,
    out: Queries,
    lse: LogSumExp,
    d_out: Queries,
    interpret: bool = False,
) -> tuple[Queries, Keys, Keys]:
    """The backward pass for some of the keys; `passes.Passes`."""
    scaled, scale = jax.vjp(_scaled, q)
    passes = _passes(_full(q, k), interpret)
    dq, dk, dv = passes.backward(scaled, k, v, _hidden_from(k, visible), out, lse, d_out)
    return *scale(dq), dk, dv


def _passes(mask: Mask, interpret: bool) -> Passes:
    """The passes of the kernels for a mask, which pad, put heads first, and mask keys. Logits are not scaled."""
    splash, (rows, columns) = Splash(mask, interpret), mask.shape

    def given(q: Wide, k: WideKeys, v: Keys, visible: Any) -> tuple[Array, Array, Array, SegmentIds | None]:
        segments = None
        if visible is not None:
            hidden = jnp.arange(columns) >= visible
            segments = SegmentIds(jnp.zeros(rows, jnp.int32), hidden.astype(jnp.int32))
        return _padded(q, rows), _padded(k, columns), _padded(v, columns), segments

    def forward(q: Wide, k: WideKeys, v: Keys, visible: Any) -> tuple[Queries, LogSumExp]:
        out, lse = splash.forward(*given(q, k, v, visible))
        return _tokens_first(out, q), lse[:, :, : q.shape[1]]

    def backward(
        q: Wide, k: WideKeys, v: Keys, visible: Any, out: Queries, lse: LogSumExp, d_out: Queries
    ) -> tuple[Wide, WideKeys, Keys]:
        lse = jnp.pad(lse, ((0, 0), (0, 0), (0, rows - q.shape[1])))
        dq, dk, dv = splash.backward(*given(q, k, v, visible), _padded(out, rows), lse, _padded(d_out, rows))
        return _tokens_first(dq, q), _tokens_first(dk, k), _tokens_first(dv, v)

    return Passes(forward, backward)


def _hidden_from(k: WideKeys, visible: Count | None) -> Count | None:
    """Index from which on keys are masked, by `visible` or as padding; None if none are masked."""
    m = k.shape[1]
    return jnp.asarray(m, jnp.int32) if visible is None and whole_tiles(m) > m else visible


def _full(q: Wide, k: WideKeys) -> FullMask:
    return FullMask((whole_tiles(q.shape[1]), whole_tiles(k.shape[1])))


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


def _padded(x: Float[Array, "b n heads d"], length: int) -> Float[Array, "b heads padded d"]:
    """Heads first, padded with zeros to a number of tokens."""
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, length - x.shape[1]), (0, 0)))


def _tokens_first(
    x: Float[Array, "b heads padded d"], like: Float[Array, "b n heads any"]
) -> Float[Array, "b n heads d"]:
    """Tokens first, without the padding that `like` does not have."""
    return jnp.swapaxes(x[:, :, : like.shape[1]], 1, 2)
