"""Attention that materialises all logits: the reference for the other kernels, and the fastest for small problems."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Queries = Float[Array, "b n heads head_dim"]
Keys = Float[Array, "b m heads head_dim"]
Bias = Float[Array, "#b m"]
LogSumExp = Float[Array, "b heads n"]
# Keys from this index on are masked.
Count = Int[Array, ""]


def attention(q: Queries, k: Keys, v: Keys, bias: Bias | None = None) -> Queries:
    """softmax(q k^T / sqrt(head_dim) + bias) v, with the softmax in float32 and products in the inputs' dtype.

    Args:
      q: queries.
      k: keys.
      v: values.
      bias: float32 logit added for each key, the same for all queries and heads: the logarithm of the key's
        multiplicity, so that -inf masks a key. At least one key must be visible.
    """
    scale = q.shape[-1] ** -0.5
    # Batched matrix products over [b, heads]: on CPU several times faster than einsum over the unmoved axes.
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * jnp.asarray(scale, q.dtype), k, v))
    logits = jnp.matmul(q, jnp.swapaxes(k, -1, -2), preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias[:, None, None, :]
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.swapaxes(jnp.matmul(weights, v), 1, 2)
