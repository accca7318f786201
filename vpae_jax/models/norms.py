"""The norms of Wan's blocks. Statistics (mean, variance) are float32 for any compute dtype.

Their gradients are written by hand: the backward pass keeps only the input, and its sums have forms that XLA's CPU
compiler runs fast. The automatic gradients took about a fifteenth of a block's forward and backward pass.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

custom_vjp: Any = jax.custom_vjp  # its own type hides those of the decorated functions
Vectors = Float[Array, "*batch d"]
Gain = Float[Array, "*spread d"]


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale` over the last axis, computed in float32, returned in the input's dtype."""

    def __init__(self, features: int, *, eps: float, param_dtype: DTypeLike = jnp.float32):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.eps = eps

    def __call__(self, x: Vectors) -> Vectors:
        return rms_norm(x, self.scale[...].astype(jnp.float32), self.eps)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias, computed and returned in float32 (Diffusers' FP32LayerNorm)."""

    def __init__(self, features: int, *, eps: float, param_dtype: DTypeLike = jnp.float32):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))
        self.eps = eps

    def __call__(self, x: Vectors) -> Vectors:
        return layer_norm(x, self.scale[...].astype(jnp.float32), self.bias[...].astype(jnp.float32), self.eps)


@partial(custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Vectors, gain: Float[Array, "d"], eps: float) -> Vectors:
    """`x / rms(x) * gain` over the last axis, in the dtype of x; float32 inside."""
    wide = x.astype(jnp.float32)
    return (wide * _inverse(wide, eps) * gain).astype(x.dtype)


def _rms_gradients(eps: float, kept: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, gain = kept
    wide, grad = x.astype(jnp.float32), grad.astype(jnp.float32)
    inverse = _inverse(wide, eps)
    d_x = inverse * (grad * gain) - wide * (inverse**3 * _mean(grad * wide, gain))
    return d_x.astype(x.dtype), _sum_to(grad * wide * inverse, gain)


rms_norm.defvjp(lambda x, gain, eps: (rms_norm(x, gain, eps), (x, gain)), _rms_gradients)


@partial(custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: Vectors, gain: Gain, bias: Gain, eps: float) -> Vectors:
    """`(x - mean(x)) / std(x) * gain + bias` over the last axis, computed and returned in float32.

    Args:
      x: any dtype.
      gain, bias: float32, [d], or per clip [b, 1, d], or per token [b, n, d].
      eps: added to the variance.
    """
    centred = _centred(x)
    return centred * _inverse(centred, eps) * gain + bias


def _layer_gradients(eps: float, kept: tuple[Array, Array], grad: Array) -> tuple[Array, Array, Array]:
    x, gain = kept
    centred, scaled = _centred(x), grad * gain
    inverse = _inverse(centred, eps)
    d_x = inverse * (scaled - _mean(scaled)) - centred * (inverse**3 * _mean(scaled * centred))
    return d_x.astype(x.dtype), _sum_to(grad * centred * inverse, gain), _sum_to(grad, gain)


layer_norm.defvjp(lambda x, gain, bias, eps: (layer_norm(x, gain, bias, eps), (x, gain)), _layer_gradients)


def _centred(x: Vectors) -> Vectors:
    wide = x.astype(jnp.float32)
    return wide - jnp.mean(wide, axis=-1, keepdims=True)


def _inverse(x: Vectors, eps: float) -> Float[Array, "*batch 1"]:
    """1 / rms(x)."""
    return jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def _mean(x: Vectors, weights: Float[Array, "d"] | None = None) -> Float[Array, "*batch 1"]:
    """Mean over the last axis, as a product with a vector; summing a product of arrays is ten times slower on a CPU."""
    weights = jnp.ones(x.shape[-1]) if weights is None else weights
    return jnp.matmul(x, weights, precision=jax.lax.Precision.HIGHEST)[..., None] / x.shape[-1]


def _sum_to(x: Vectors, like: Gain) -> Gain:
    """Sum over the axes along which `like` was broadcast."""
    axes = tuple(i for i in range(x.ndim - 1) if like.ndim == 1 or like.shape[i] == 1)
    return jnp.sum(x, axis=axes).reshape(like.shape)
