"""Attention kernels, and the choice between them.

    reference   materialises all logits; small problems
    tiled       plain jax.numpy in tiles, memory linear in the tokens; any platform
    splash      TPU
    cudnn       NVIDIA GPU, 16 bits

Under `jax.checkpoint(..., policy=save_attention)` the backward passes of all kernels except the reference do not rerun
their forward passes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vpae_jax.models.kernels import cudnn, reference, splash, splash_kernel, tiled
from vpae_jax.models.kernels.passes import Passes
from vpae_jax.models.kernels.reference import Bias, Count, Keys, LogSumExp, Queries
from vpae_jax.models.kernels.remat import RESIDUALS, save_attention

__all__ = ["RESIDUALS", "Passes", "attention", "choose", "passes", "save_attention"]

# Number of logits, over clips and heads, up to which materialising them is faster than tiles; 4 MiB in float32.
SMALL_LOGITS = 2**20

_KERNELS = {
    "reference": reference.attention,
    "tiled": tiled.attention,
    "splash": splash.attention,
    "cudnn": cudnn.attention,
}

# Kernels that mask keys by their number, which is cheaper than a bias.
_COUNTING = {"splash": splash.attention, "cudnn": cudnn.attention}


def attention(
    q: Queries,
    k: Keys,
    v: Keys,
    bias: Bias | None = None,
    platform: str | None = None,
    visible: Count | None = None,
) -> Queries:
    """softmax(q k^T / sqrt(head_dim) + bias) v, with the softmax in float32, by the kernel that `choose` selects.

    Arrays are those of one device: inside `jax.shard_map`, or unsharded.

    Args:
      q: queries.
      k: keys.
      v: values.
      bias: float32 logit added for each key, the same for all queries and heads: the logarithm of the key's
        multiplicity, so that -inf masks a key. At least one key must be visible. It gets no gradient.
      platform: that the program is compiled for; None is that of the default backend.
      visible: keys from this index on, which is at least 1, are masked; not together with a bias.
    """
    name = choose(platform or jax.default_backend(), q.shape, k.shape, q.dtype)
    if visible is not None and name in _COUNTING:
        return _COUNTING[name](q, k, v, visible=visible)
    if visible is not None:
        bias = _bias(k, visible)
    return _KERNELS[name](q, k, v, None if bias is None else jax.lax.stop_gradient(bias))


def choose(platform: str, q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype: DTypeLike) -> str:
    """Returns the name of the kernel for a call.

    Args:
      platform: "cpu", "tpu", "gpu" or "cuda".
      q_shape: [b, n, heads, head_dim].
      k_shape: [b, m, heads, head_dim].
      dtype: of q, k and v.
    """
    b, n, heads, head_dim = q_shape
    if b * heads * n * k_shape[1] <= SMALL_LOGITS:
        return "reference"
    if platform == "tpu" and head_dim % splash_kernel.LANES == 0:
        return "splash"
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    # cuDNN: head_dim a multiple of 8, at most 128 on all GPUs that have the kernel.
    if platform in ("gpu", "cuda") and half and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    return "tiled"


def passes(platform: str | None, q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype: DTypeLike) -> Passes:
    """The forward and backward pass of the kernel for a call, for attention to one device's keys after another's.

    Arguments as of `choose`. The mask is an index from which on keys are masked; it may be 0.
    """
    name = choose(platform or jax.default_backend(), q_shape, k_shape, dtype)
    return _PASSES.get(name, _TILED)


def _tiled_forward(q: Queries, k: Keys, v: Keys, visible: Count | None) -> tuple[Queries, LogSumExp]:
    return tiled.forward(q, k, v, _bias(k, visible))


def _tiled_backward(q: Queries, k: Keys, v: Keys, visible: Count | None, *given: Any) -> tuple[Queries, Keys, Keys]:
    return tiled.backward(q, k, v, _bias(k, visible), *given)


def _bias(k: Keys, visible: Count | None) -> Bias | None:
    return None if visible is None else jnp.where(jnp.arange(k.shape[1]) < visible, 0.0, -jnp.inf)[None]


_PASSES = {"splash": Passes(splash.forward, splash.backward), "cudnn": Passes(cudnn.forward, cudnn.backward)}
_TILED = Passes(_tiled_forward, _tiled_backward)
