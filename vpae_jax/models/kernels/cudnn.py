"""cuDNN's fused attention, for NVIDIA GPUs, through `jax.nn`, and its two passes for rings.

The attention's result and log-sum-exp have no checkpoint name: `remat.save_attention` recognises them by their
primitive.

`jax.nn` returns the log-sum-exp only in the inputs' 16 bits, and has no backward pass that takes one. So the two passes
are called through `jax._src`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as stablehlo
from jaxtyping import Array, Float

from vpae_jax.models.kernels.reference import Bias, Count, Keys, LogSumExp, Queries

# The logit of a masked key: cuDNN adds a bias in the inputs' dtype, and this is finite in float16 as well.
HIDDEN = -6e4


def attention(q: Queries, k: Keys, v: Keys, bias: Bias | None = None, visible: Count | None = None) -> Queries:
    """As `reference.attention`, for bfloat16 and float16.

    A bias is rounded to the inputs' dtype (relative error at most 2^-9 or 2^-12), and gets no gradient.

    Args:
      visible: keys from this index on are masked; not together with a bias.
    """
    (b, n), m = q.shape[:2], k.shape[1]
    # For a backward pass, JAX accepts only even numbers of tokens with cuDNN.
    q, k, v = (_even(x) for x in (q, k, v))
    lengths = None
    if bias is not None:
        bias = jnp.pad(jax.lax.stop_gradient(bias), ((0, 0), (0, m % 2)), constant_values=HIDDEN)
        bias = jnp.maximum(bias, HIDDEN).astype(q.dtype)
        # cuDNN repeats it over heads, but not over queries.
        bias = jnp.broadcast_to(bias[:, None, None, :], (bias.shape[0], 1, q.shape[1], k.shape[1]))
    elif visible is not None or m % 2:
        lengths = jnp.full(b, m if visible is None else visible, jnp.int32)
    out = jax.nn.dot_product_attention(q, k, v, bias, key_value_seq_lengths=lengths, implementation="cudnn")
    return out[:, :n]


def forward(q: Queries, k: Keys, v: Keys, visible: Count | None) -> tuple[Queries, LogSumExp]:
    """The forward pass for some of the keys; `passes.Passes`.

    Args:
      visible: keys from this index on, which may be 0, are masked.
    """
    n = q.shape[1]
    arrays, settings = _given(q, k, v, visible)
    out, lse = stablehlo._dot_product_attention_fwd_p_wrapper.bind(*arrays, **settings, is_training=True)
    lse = lse[:, :, :n]
    return out[:, :n], lse if visible is None else jnp.where(visible > 0, lse, -jnp.inf)


def backward(
    q: Queries, k: Keys, v: Keys, visible: Count | None, out: Queries, lse: LogSumExp, d_out: Queries
) -> tuple[Queries, Keys, Keys]:
    """The backward pass for some of the keys; `passes.Passes`."""
    n, m = q.shape[1], k.shape[1]
    arrays, settings = _given(q, k, v, visible)
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, n % 2)))
    dq, dk, dv = stablehlo._dot_product_attention_bwd_p_wrapper.bind(*arrays, lse, _even(out), _even(d_out), **settings)
    if visible is not None:
        dq, dk, dv = (jnp.where(visible > 0, x, 0) for x in (dq, dk, dv))
    return dq[:, :n], dk[:, :m], dv[:, :m]


def _given(q: Queries, k: Keys, v: Keys, visible: Count | None) -> tuple[tuple[Array, ...], dict[str, Any]]:
    """Operands and parameters that JAX's primitives of both passes share."""
    b, m = k.shape[:2]
    if visible is None and m % 2:
        visible = jnp.asarray(m, jnp.int32)
    q, k, v = (_even(x) for x in (q, k, v))
    unused = jnp.zeros(0, q.dtype)
    # At least one: cuDNN does not define the result for a clip without keys.
    counts = [] if visible is None else [jnp.full(b, q.shape[1], jnp.int32), jnp.full(b, visible, jnp.int32).clip(1)]
    settings = {
        "scale": q.shape[-1] ** -0.5,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # a bias, and its gradient
        "mask_type": stablehlo.MaskType.PADDING if counts else stablehlo.MaskType.NO_MASK,
        "layout": stablehlo.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    return (q, k, v, unused, *(counts or [unused, unused]), *[unused] * 4), settings


def _even(x: Float[Array, "b n heads head_dim"]) -> Float[Array, "b even heads head_dim"]:
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
