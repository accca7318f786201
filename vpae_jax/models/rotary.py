"""Rotary position embedding."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Heads = Float[Array, "b n heads head_dim"]


def rope_table(
    grid: tuple[int, int, int], head_dim: int, theta: float = 10000.0
) -> tuple[Float[Array, "n half"], Float[Array, "n half"]]:
    """Cosines and sines of the 3-D rotary embedding, one row per token in (frame, row, column) order.

    Of a head's channels, 2 * (head_dim // 6) rotate with the row, the same number with the column, and the rest with
    the frame (Wan 2.1; Diffusers' WanRotaryPosEmbed). Angles are float64, the tables float32. A program stores the
    tables of each axis and combines them at run time: combined, they would be 20 MB of constants for each network
    evaluation at 720p.

    Args:
      grid: tokens along frame, height and width.
      head_dim: channels of one head, even.
    """
    side = 2 * (head_dim // 6)
    cosines, sines = [], []
    for axis, channels in enumerate((head_dim - 2 * side, side, side)):
        frequencies = theta ** -(np.arange(0, channels, 2, dtype=np.float64) / channels)
        angle = np.arange(grid[axis], dtype=np.float64)[:, None] * frequencies
        shape = [1, 1, 1, channels // 2]
        shape[axis] = grid[axis]
        for parts, function in ((cosines, np.cos), (sines, np.sin)):
            table = jnp.asarray(function(angle).reshape(shape), jnp.float32)
            parts.append(jnp.broadcast_to(table, (*grid, channels // 2)))
    cos, sin = (jnp.concatenate(parts, axis=-1).reshape(-1, head_dim // 2) for parts in (cosines, sines))
    return cos, sin


def rotate(x: Heads, cos: Float[Array, "n half"], sin: Float[Array, "n half"]) -> Heads:
    """Rotates each pair of channels (2i, 2i + 1) of each head by its token's angle; computed in float32."""
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
