"""cuDNN's fused attention, for NVIDIA GPUs, through `jax.nn`.

Its result and log-sum-exp have no name: `remat.save_attention` knows them by their primitive.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vpae_jax.models.kernels.reference import Bias, Keys, Queries

# A hidden key's logit: cuDNN adds a bias in the inputs' dtype, and this is finite in float16 too.
HIDDEN = -6e4


def attention(q: Queries, k: Keys, v: Keys, bias: Bias | None = None, visible: Int[Array, ""] | None = None) -> Queries:
    """As `reference.attention`, for bfloat16 and float16.

    A bias is rounded to the inputs' dtype (relative error at most 2^-9 or 2^-12), and gets no gradient.

    Args:
      visible: keys from this number on are hidden; not together with a bias.
    """
    (b, n), m = q.shape[:2], k.shape[1]
    # For a backward pass, JAX lets cuDNN have even numbers of tokens only.
    q, k, v = (_even(x) for x in (q, k, v))
    lengths = None
    if bias is not None:
        bias = jnp.pad(jax.lax.stop_gradient(bias), ((0, 0), (0, m % 2)), constant_values=HIDDEN)
        bias = jnp.maximum(bias, HIDDEN).astype(q.dtype)
        # It is repeated over heads, but not over queries.
        bias = jnp.broadcast_to(bias[:, None, None, :], (bias.shape[0], 1, q.shape[1], k.shape[1]))
    elif visible is not None or m % 2:
        lengths = jnp.full(b, m if visible is None else visible, jnp.int32)
    out = jax.nn.dot_product_attention(q, k, v, bias, key_value_seq_lengths=lengths, implementation="cudnn")
    return out[:, :n]


def _even(x: Float[Array, "b n heads head_dim"]) -> Float[Array, "b even heads head_dim"]:
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
