"""UMT5 text encoder (Chung et al. 2023, "UniMax"; equal to transformers' `UMT5EncoderModel`).

A T5 v1.1 encoder in which every layer has its own relative position bias: pre-norm with RMS norms, no biases in the
projections, gated GELU feed-forward, and attention logits that are not divided by sqrt(d_kv).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from vpae_jax.models.stack import scan_layers, stack_layers
from vpae_jax.types import Mask, TokenIds, UserError


@dataclass(frozen=True)
class UMT5Config:
    """Fields of transformers' `UMT5Config` that shape the encoder; same names, same defaults.

    Raises:
      UserError: `feed_forward_proj` is not "gated-gelu".
    """

    vocab_size: int = 250112
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 1024
    num_layers: int = 8
    num_heads: int = 6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    def __post_init__(self) -> None:
        if self.feed_forward_proj != "gated-gelu":
            raise UserError(f"UMT5: feed_forward_proj is {self.feed_forward_proj!r}, only 'gated-gelu' is supported")


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, "s s"]:
    """Bucket number of (key position - query position), rows are queries.

    Half of the buckets are for keys after the query. In each half, the first half are single positions and the others
    grow logarithmically up to `max_distance`; everything farther shares the last bucket. The logarithm is taken in
    float32, because the bucket edges depend on its rounding.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    far = np.maximum(np.abs(distance), 1).astype(np.float32) / np.float32(exact)
    log_ratio = np.log(far) / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    large = np.minimum(exact + log_ratio.astype(np.int32), half - 1)
    near = np.abs(distance) < exact
    return np.where(distance > 0, half, 0) + np.where(near, np.abs(distance), large)


class Attention(nnx.Module):
    """Pre-norm self-attention with this layer's own relative position bias."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        c, inner = config, config.num_heads * config.d_kv
        self.config = config

        def linear(inputs: int, outputs: int, std: float) -> nnx.Linear:
            init = nnx.initializers.normal(std)
            return nnx.Linear(
                inputs, outputs, use_bias=False, kernel_init=init, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        # The standard deviations are T5's: the query weights include the usual factor 1/sqrt(d_kv) of the logits.
        self.q = linear(c.d_model, inner, (c.d_model * c.d_kv) ** -0.5)
        self.k = linear(c.d_model, inner, c.d_model**-0.5)
        self.v = linear(c.d_model, inner, c.d_model**-0.5)
        self.o = linear(inner, c.d_model, inner**-0.5)
        self.relative_attention_bias = nnx.Embed(
            c.relative_attention_num_buckets,
            c.num_heads,
            embedding_init=nnx.initializers.normal(c.d_model**-0.5),
            dtype=jnp.float32,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.norm = _rms_norm(config, rngs, dtype, param_dtype)

    def __call__(
        self, x: Float[Array, "b s d"], buckets: Int[Array, "s s"], key_mask: Bool[Array, "b 1 1 s"]
    ) -> Float[Array, "b s d"]:
        h = self.norm(x)
        bias = self.relative_attention_bias.embedding[...].astype(jnp.float32).T[:, buckets]
        bias = jnp.where(key_mask, bias, jnp.finfo(jnp.float32).min)
        # Batched matrix products over [b, heads]: on CPU several times faster than einsum over the unmoved axes.
        split, heads = "b s (heads d_kv) -> b heads s d_kv", self.config.num_heads
        q, k, v = (rearrange(project(h), split, heads=heads) for project in (self.q, self.k, self.v))
        logits = jnp.matmul(q, jnp.swapaxes(k, -1, -2), preferred_element_type=jnp.float32) + bias
        out = jnp.matmul(jax.nn.softmax(logits, axis=-1).astype(v.dtype), v)
        return x + self.o(rearrange(out, "b heads s d_kv -> b s (heads d_kv)"))


class FeedForward(nnx.Module):
    """Pre-norm gated GELU feed-forward: wo(gelu(wi_0 x) * wi_1 x), with the tanh form of GELU."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            init = nnx.initializers.normal(inputs**-0.5)
            return nnx.Linear(
                inputs, outputs, use_bias=False, kernel_init=init, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.wi_0 = linear(config.d_model, config.d_ff)
        self.wi_1 = linear(config.d_model, config.d_ff)
        self.wo = linear(config.d_ff, config.d_model)
        self.norm = _rms_norm(config, rngs, dtype, param_dtype)

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        h = self.norm(x)
        return x + self.wo(jax.nn.gelu(self.wi_0(h), approximate=True) * self.wi_1(h))


class Block(nnx.Module):
    """One encoder layer."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        self.attention = Attention(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.feed_forward = FeedForward(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

    def __call__(
        self, x: Float[Array, "b s d"], buckets: Int[Array, "s s"], key_mask: Bool[Array, "b 1 1 s"]
    ) -> Float[Array, "b s d"]:
        return self.feed_forward(self.attention(x, buckets, key_mask))


class UMT5Encoder(nnx.Module):
    """Maps token ids to text states.

    Args:
      config: sizes.
      rngs: a "params" stream for the initial weights.
      dtype: compute dtype; norms, attention logits and softmax are always float32.
      param_dtype: dtype of the weights.
    """

    def __init__(
        self,
        config: UMT5Config,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.config = config
        self.shared = nnx.Embed(
            config.vocab_size,
            config.d_model,
            embedding_init=nnx.initializers.normal(1.0),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.blocks = stack_layers(
            lambda layer_rngs: Block(config, rngs=layer_rngs, dtype=dtype, param_dtype=param_dtype),
            config.num_layers,
            rngs,
        )
        self.final_layer_norm = _rms_norm(config, rngs, dtype, param_dtype)

    def __call__(self, ids: TokenIds, mask: Mask) -> Float[Array, "b s d"]:
        """States after the final norm.

        Args:
          ids: token ids in [0, vocab_size).
          mask: true at the prompt's tokens; no token attends to padding. States at padding are returned without being
            zeroed.
        """
        c = self.config
        buckets = relative_buckets(ids.shape[1], c.relative_attention_num_buckets, c.relative_attention_max_distance)
        buckets, key_mask = jnp.asarray(buckets), mask[:, None, None, :]
        x = scan_layers(self.blocks, self.shared(ids), lambda block, x: block(x, buckets, key_mask))
        return self.final_layer_norm(x)


def _rms_norm(config: UMT5Config, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.d_model, epsilon=config.layer_norm_epsilon, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )
