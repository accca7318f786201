"""Attention in tiles of queries and keys with an online softmax: memory is linear in the tokens, not quadratic.

FlashAttention-2 (arXiv 2307.08691) in plain jax.numpy, for CPUs and for calls that no accelerator's kernel supports.
Heads are processed in turn. Tiles are large enough that the product of two of them runs at full speed, and small enough
to stay in the cache. Forward and backward are separate functions, because a ring attention calls them once for each
shard.

Logits, weights and sums are always float32; products have the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from vpae_jax.models.kernels.passes import Passes
from vpae_jax.models.kernels.reference import Bias, Keys, LogSumExp, Queries

# Tile size in queries and in keys.
TILE = 512
# The size of all tiles but the last is a multiple of this, the width of a CPU's vectors.
VECTOR = 16
# Name scope of everything that is computed here, by which a plan recognises it.
SCOPE = "tiled_attention"

HeadQueries = Float[Array, "n head_dim"]
HeadKeys = Float[Array, "m head_dim"]
PerQuery = Float[Array, "n"]
HeadBias = Float[Array, "m"]


def attention(q: Queries, k: Keys, v: Keys, bias: Bias | None = None) -> Queries:
    """As `reference.attention`, in memory linear in the tokens; the bias is a constant and gets no gradient."""
    return Passes(forward, backward).attend(q, k, v, bias)


def forward(q: Queries, k: Keys, v: Keys, bias: Bias | None = None) -> tuple[Queries, LogSumExp]:
    """Attention to all keys, or to some of them.

    Args:
      q: queries.
      k: keys.
      v: values.
      bias: logit added for each key; -inf masks it. All keys may be masked.

    Returns:
      The result, zero if no key is visible, and the log-sum-exp of the logits, in that case -inf.
    """
    out, lse = _each_head(_forward, (q, k, v), (), bias)
    return _tokens_first(out, q), rearrange(lse, "(b heads) n -> b heads n", heads=q.shape[2])


def backward(
    q: Queries, k: Keys, v: Keys, bias: Bias | None, out: Queries, lse: LogSumExp, d_out: Queries
) -> tuple[Queries, Keys, Keys]:
    """Gradients of the attention to all keys, restricted to the given keys.

    Args:
      q: queries.
      k: keys, all or some of them.
      v: values.
      bias: logit added for each given key.
      out: result over all keys.
      lse: log-sum-exp over all keys.
      d_out: gradient with respect to `out`.

    Returns:
      Gradients with respect to q, to be summed over the parts of the keys, and to k and v.
    """
    inner = jnp.einsum("bnhd,bnhd->bhn", out.astype(jnp.float32), d_out.astype(jnp.float32))
    # A query that sees no key has no gradient: +inf makes all of its weights zero.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    dq, dk, dv = _each_head(_backward, (q, k, v, d_out), (lse, inner), bias)
    return _tokens_first(dq, q), _tokens_first(dk, k), _tokens_first(dv, v)


@jax.named_scope(SCOPE)
def _each_head(one: Callable[..., Any], tokens: tuple[Array, ...], rows: tuple[Array, ...], bias: Bias | None) -> Any:
    """Calls `one` for each head of each clip in turn."""
    b, _, heads, _ = tokens[0].shape
    split = [rearrange(x, "b n heads head_dim -> (b heads) n head_dim") for x in tokens]
    split += [rearrange(x, "b heads n -> (b heads) n") for x in rows]
    if bias is not None:
        bias = jnp.broadcast_to(bias[:, None], (b, heads, bias.shape[-1])).reshape(b * heads, -1)
    return jax.lax.map(lambda given: one(*given), (*split, bias))


def _tokens_first(x: Float[Array, "b_heads n head_dim"], like: Queries) -> Queries:
    return rearrange(x, "(b heads) n head_dim -> b n heads head_dim", heads=like.shape[2])


def _forward(q: HeadQueries, k: HeadKeys, v: HeadKeys, bias: HeadBias | None) -> tuple[HeadQueries, PerQuery]:
    """Result and log-sum-exp of one head."""
    scale = q.shape[-1] ** -0.5

    def keys(state, q, k, v, bias):
        total, mass, top = state
        logits = _matmul(q, k.T)
        if bias is not None:
            logits = logits + bias / scale
        # Logits are not scaled, which saves one pass over the tile.
        risen = jnp.maximum(top, logits.max(-1))
        # While no key is visible the maximum is -inf, which must not be subtracted from itself.
        shift = jnp.where(risen == -jnp.inf, 0, risen)
        weights, kept = jnp.exp((logits - shift[:, None]) * scale), jnp.exp((top - shift) * scale)
        total = total * kept[:, None] + _matmul(weights.astype(v.dtype), v)
        return (total, mass * kept + weights.sum(-1), risen), None

    def queries(_, q):
        empty = jnp.zeros(len(q), jnp.float32)
        start = jnp.zeros(q.shape, jnp.float32), empty, empty - jnp.inf
        (total, mass, top), _ = _scan(lambda state, *tile: keys(state, q, *tile), start, k, v, bias)
        out = total / jnp.where(mass == 0, 1, mass)[:, None]
        return None, (out.astype(q.dtype), top * scale + jnp.log(mass))

    return _scan(queries, None, q)[1]


def _backward(
    q: HeadQueries, k: HeadKeys, v: HeadKeys, d_out: HeadQueries, lse: PerQuery, inner: PerQuery, bias: HeadBias | None
) -> tuple[HeadQueries, HeadKeys, HeadKeys]:
    """Gradients of one head."""
    scale = q.shape[-1] ** -0.5

    def queries(state, tile_of_keys, q, d_out, lse, inner, dq):
        (dk, dv), (k, v, bias) = state, tile_of_keys
        # Keys are rows here: of the three products with weights or their gradients, only one transposes a tile of them.
        logits = _matmul(k, q.T) * scale
        if bias is not None:
            logits = logits + bias[:, None]
        weights = jnp.exp(logits - lse)
        d_logits = (weights * (_matmul(v, d_out.T) - inner)).astype(q.dtype)
        dk, dv = dk + _matmul(d_logits, q), dv + _matmul(weights.astype(q.dtype), d_out)
        return (dk, dv), dq + _matmul(d_logits.T, k)

    def keys(dq, *tile_of_keys):
        k, v, _ = tile_of_keys
        start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        (dk, dv), dq = _scan(lambda state, *tile: queries(state, tile_of_keys, *tile), start, q, d_out, lse, inner, dq)
        return dq, ((dk * scale).astype(k.dtype), dv.astype(v.dtype))

    dq, (dk, dv) = _scan(keys, jnp.zeros(q.shape, jnp.float32), k, v, bias)
    return (dq * scale).astype(q.dtype), dk, dv


def _matmul(x: Float[Array, "i j"], y: Float[Array, "j k"]) -> Float[Array, "i k"]:
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _scan(step: Callable[..., Any], state: Any, *arrays: Array | None) -> tuple[Any, Any]:
    """Scans over tiles of the arrays' leading axis; the last tile may be smaller.

    Args:
      step: maps the state and a tile of each array to the next state and a result; results are concatenated.
      state: the first state.
      *arrays: None is passed on to `step`.
    """
    n = next(len(x) for x in arrays if x is not None)
    size = min(n, -(-n // -(-n // TILE) // VECTOR) * VECTOR)
    whole = n // size
    tiles = jax.tree.map(lambda x: x[: whole * size].reshape(whole, size, *x.shape[1:]), arrays)
    state, kept = jax.lax.scan(lambda state, tile: step(state, *tile), state, tiles)
    kept = jax.tree.map(lambda x: x.reshape(whole * size, *x.shape[2:]), kept)
    if whole * size == n:
        return state, kept
    state, last = step(state, *jax.tree.map(lambda x: x[whole * size :], arrays))
    return state, jax.tree.map(lambda *x: jnp.concatenate(x), kept, last)
