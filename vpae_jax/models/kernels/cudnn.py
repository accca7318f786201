"""cuDNN's fused attention, for NVIDIA GPUs, through `jax.nn`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vpae_jax.models.kernels.reference import Bias, Keys, Queries
from vpae_jax.models.kernels.remat import RESIDUALS

# A hidden key's logit: cuDNN adds a bias in the inputs' dtype, and this is finite in float16 too.
HIDDEN = -6e4


def attention(q: Queries, k: Keys, v: Keys, bias: Bias | None = None) -> Queries:
    """As `reference.attention`, for bfloat16 and float16.

    A bias is rounded to the inputs' dtype (relative error at most 2^-9 or 2^-12), and gets no gradient.
    """
    if bias is not None:
        bias = jnp.maximum(jax.lax.stop_gradient(bias), HIDDEN).astype(q.dtype)
        # cuDNN repeats a bias over heads, not over queries.
        bias = jnp.broadcast_to(bias[:, None, None, :], (bias.shape[0], 1, q.shape[1], k.shape[1]))
    out = jax.nn.dot_product_attention(q, k, v, bias, implementation="cudnn")
    return checkpoint_name(out, RESIDUALS)
