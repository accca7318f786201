"""Inputs of the Wan 2.1 transformer: patches of latents, and embeddings of timestep, text and image.

Equal to Diffusers' `WanTimeTextImageEmbedding` and patch embedding; parameter names follow its tensor names.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from vpae_jax.models.lora import Linear
from vpae_jax.models.norms import LayerNorm
from vpae_jax.models.wan_blocks import FeedForward, Options, WanTransformerConfig
from vpae_jax.types import FrameTimes, Latents, Times, Tokens, UserError


class PatchEmbedding(nnx.Module):
    """A 3-D convolution whose stride is its kernel, as one matrix product; kernel `[pf, ph, pw, c, d]`."""

    def __init__(self, config: WanTransformerConfig, kernel: Float[Array, "patch d"], options: Options):
        shape = (*config.patch_size, config.in_channels, config.width)
        self.kernel = nnx.Param(kernel.reshape(shape))
        self.bias = nnx.Param(jnp.zeros((config.width,), options.param_dtype))
        self.dtype = options.dtype

    def __call__(self, x: Latents) -> Tokens:
        kernel = self.kernel[...].astype(self.dtype)
        pf, ph, pw, _, _ = kernel.shape
        pattern = "b (f pf) (h ph) (w pw) c -> b (f h w) (pf ph pw c)"
        patches = rearrange(x.astype(self.dtype), pattern, pf=pf, ph=ph, pw=pw)
        return patches @ rearrange(kernel, "pf ph pw c d -> (pf ph pw c) d") + self.bias[...].astype(self.dtype)


class TimestepEmbedding(nnx.Module):
    """Linear, activation, Linear: the timestep embedder (SiLU) and the text embedder (GELU)."""

    def __init__(self, d_in: int, d: int, options: Options, activation: Literal["silu", "gelu"]):
        init = nnx.initializers.normal(0.02)
        self.linear_1 = Linear(d_in, d, kernel_init=init, **options._asdict())
        self.linear_2 = Linear(d, d, kernel_init=init, **options._asdict())
        self.activation = activation

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d"]:
        act = jax.nn.silu if self.activation == "silu" else jax.nn.gelu
        return self.linear_2(act(self.linear_1(x)))


class ImageEmbedding(nnx.Module):
    """Image-encoder states to image tokens: norm, feed-forward with exact GELU, norm."""

    def __init__(self, config: WanTransformerConfig, options: Options):
        e, d, n = config.image_dim or 0, config.width, config.pos_embed_seq_len
        self.pos_embed = nnx.Param(jnp.zeros((1, n, e), options.param_dtype)) if n is not None else None
        self.norm1 = LayerNorm(e, eps=1e-5, param_dtype=options.param_dtype)
        self.ff = FeedForward(e, e, d, options, approximate=False)
        self.norm2 = LayerNorm(d, eps=1e-5, param_dtype=options.param_dtype)
        self.dtype = options.dtype

    def __call__(self, x: Float[Array, "b n_image e"]) -> Float[Array, "b n_image d"]:
        x = x.astype(self.dtype)
        if self.pos_embed is not None:
            n = self.pos_embed[...].shape[1]
            if x.shape[1] != n:
                raise UserError(f"condition.image has {x.shape[1]} tokens, expected {n} (pos_embed_seq_len)")
            x = x + self.pos_embed[...].astype(self.dtype)
        return self.norm2(self.ff(self.norm1(x))).astype(self.dtype)


class ConditionEmbedder(nnx.Module):
    """Maps timestep, text and image states to the transformer's width (Diffusers' WanTimeTextImageEmbedding)."""

    def __init__(self, config: WanTransformerConfig, options: Options):
        d = config.width
        wide = options._replace(dtype=jnp.float32)
        self.time_embedder = TimestepEmbedding(config.freq_dim, d, wide, "silu")
        self.time_proj = Linear(d, 6 * d, **wide._asdict())
        self.text_embedder = TimestepEmbedding(config.text_dim, d, options, "gelu")
        self.image_embedder = ImageEmbedding(config, options) if config.image_dim is not None else None
        self.freq_dim = config.freq_dim

    def time(self, t: Times | FrameTimes) -> tuple[Float[Array, "b *f d"], Float[Array, "b *f 6 d"]]:
        """Maps timesteps in [0, 1], of clips or of their frames, to the embedding and the blocks' six modulation rows.

        Computed in float32 throughout.
        """
        half = self.freq_dim // 2
        frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
        angles = (1000 * t.astype(jnp.float32))[..., None] * frequencies
        embedding = self.time_embedder(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1))
        return embedding, rearrange(self.time_proj(jax.nn.silu(embedding)), "... (six d) -> ... six d", six=6)
