"""Floating-point operations of the models, from shapes: two per multiply-add of matrix products and convolutions.

These are *model* FLOPs: what the result needs, not what a program executes. Recomputation of activations and of tiles
in attention does not count; a backward pass counts as much as the forward pass for the gradient of the activations, and
as much again for the gradient of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from vpae_jax.models.umt5 import UMT5Config
from vpae_jax.models.wan_dit import WanTransformerConfig
from vpae_jax.planning.flops import count
from vpae_jax.types import Condition


def transformer(
    config: WanTransformerConfig, latents: tuple[int, ...], condition: Condition, tap: int | None = None
) -> float:
    """FLOPs of one forward pass of the Wan transformer, to its velocity or only to the features after a block.

    Args:
      config: sizes.
      latents: shape `[b, f, h, w, c]` of the noisy latents.
      condition: arrays or shapes. The zeros that Wan pads its text with count as one token, since they are all equal.
      tap: the last block that runs, counted from 1; None runs all blocks and the output layer.
    """
    b, *grid, _ = latents
    n_text = min(condition.text.shape[1] + 1, config.text_len)
    n_image = 0 if condition.image is None else condition.image.shape[1]
    n, d = math.prod(grid) // math.prod(config.patch_size), config.width
    self_attention = 4 * n * d * d + 2 * n * n * d
    cross = 2 * n * d * d + sum(2 * m * d * d + 2 * n * m * d for m in (n_text, n_image))
    blocks = (tap or config.num_layers) * (self_attention + cross + 2 * n * d * config.ffn_dim)
    channels = config.in_channels + (config.out_channels if tap is None else 0)
    patch = n * math.prod(config.patch_size) * d * channels
    text = n_text * d * (config.text_dim + d)
    time = d * (config.freq_dim + d + 6 * d)
    image = n_image * (config.image_dim or 0) * ((config.image_dim or 0) + d)
    return 2.0 * b * (blocks + patch + text + time + image)


def text_encoder(config: UMT5Config, tokens: tuple[int, int]) -> float:
    """FLOPs of one forward pass of the UMT5 encoder over token ids of shape `[b, s]`."""
    b, s = tokens
    inner = config.num_heads * config.d_kv
    layer = 4 * s * config.d_model * inner + 2 * s * s * inner + 3 * s * config.d_model * config.d_ff
    return 2.0 * b * config.num_layers * layer


def products(function: Callable[..., Any], *args: Any) -> float:
    """FLOPs of all matrix products and convolutions in a traced function; of several branches, the most expensive.

    Args:
      function: of arrays.
      args: its arguments, or their shapes.

    Raises:
      ValueError: the function has a loop of unknown length.
    """
    work = count(jax.make_jaxpr(function)(*args))
    if work.unknown_loops:
        raise ValueError("a loop of unknown length contains matrix products; count them from shapes")
    return work.flops
