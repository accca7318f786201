"""A small decoder of Wan's latents that replaces the video autoencoder's: TAEHV (`taew2_1` for Wan 2.1).

2-D convolutions on every frame, some of which also see the frame before; no attention, no norms. It needs a
twenty-fifth of the autoencoder's arithmetic, and its clips are slightly softer. Its input is normalised latents, as the
transformer produces them. As in the autoencoder, each latent frame gives 4 frames, except the first, which gives 1.

Source: TAEHV (github.com/madebyollin/taehv, MIT), whose names the files use (`weights.names.DECODER_ROWS`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from flax.nnx.nn.initializers import he_normal, lecun_normal, zeros_init
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from vpae_jax.models.wan_vae import WAN_LATENTS_MEAN, WAN_LATENTS_STD
from vpae_jax.models.wan_vae_blocks import Volume
from vpae_jax.types import Latents, UserError, Video

# Blocks per level.
BLOCKS = 3
# Blocks start close to the identity, and frames close to black: without norms, a first frame of noise would be pulled
# to black by steps that leave no unit alive.
SMALL = nnx.initializers.variance_scaling(0.01, "fan_in", "normal")
# The last frame that each block has seen of the previous piece.
Memory = list[Float[Array, "b 1 _ _ _"]]


@dataclass(frozen=True)
class TinyDecoderConfig:
    """Shape of the decoder.

    Attributes:
      z_dim: latent channels.
      widths: channels of each level, from the latents' resolution on, and of the last convolution's input. Each level
        doubles rows and columns.
      grows: number of frames that each level makes from one; their product is 4.
      raw_latents: whether its input latents are not normalised (LightX2V's `lighttaew2_1`).

    Raises:
      UserError: sizes that do not match each other or Wan's compression of 4 x 8 x 8.
    """

    z_dim: int = 16
    widths: tuple[int, ...] = (256, 128, 64, 64)
    grows: tuple[int, ...] = (1, 2, 2)
    raw_latents: bool = False

    def __post_init__(self) -> None:
        if len(self.widths) != 4 or len(self.grows) != 3 or math.prod(self.grows) != 4:
            raise UserError(
                f"decoder config: widths {list(self.widths)} and grows {list(self.grows)}, expected four widths and "
                "three factors that multiply to 4, as Wan 2.1's latents need"
            )


class Conv(nnx.Module):
    """A 2-D convolution of every frame; kernel `[size, size, cin, cout]`."""

    def __init__(
        self,
        cin: int,
        cout: int,
        size: int = 3,
        *,
        bias: bool = True,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        kernel_init: nnx.Initializer | None = None,
    ):
        self.dtype = dtype
        self.kernel = nnx.Param((kernel_init or he_normal())(rngs.params(), (size, size, cin, cout), param_dtype))
        self.bias = nnx.Param(zeros_init()(rngs.params(), (cout,), param_dtype)) if bias else None

    def __call__(self, x: Volume) -> Volume:
        frames, layout = rearrange(x, "b t h w c -> (b t) h w c"), ("NHWC", "HWIO", "NHWC")
        kernel = self.kernel[...].astype(self.dtype)
        y = jax.lax.conv_general_dilated(frames, kernel, (1, 1), "SAME", dimension_numbers=layout)
        y = rearrange(y, "(b t) h w c -> b t h w c", t=x.shape[1])
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Block(nnx.Module):
    """Three convolutions, the first of which also sees the frame before, plus the input."""

    def __init__(self, width: int, **kw: Any):
        self.conv1 = Conv(2 * width, width, **kw)
        self.conv2 = Conv(width, width, **kw)
        self.conv3 = Conv(width, width, kernel_init=SMALL, **kw)

    def __call__(self, x: Volume, before: Volume) -> tuple[Volume, Volume]:
        """The output, and the last frame of x."""
        past = jnp.concatenate([before, x[:, :-1]], axis=1)
        y = nnx.relu(self.conv1(jnp.concatenate([x, past], axis=-1)))
        y = self.conv3(nnx.relu(self.conv2(y)))
        return nnx.relu(y + x), x[:, -1:]


class Level(nnx.Module):
    """Blocks, then more frames, twice the rows and columns, and another width."""

    def __init__(self, width: int, to: int, grow: int, **kw: Any):
        self.factor = grow
        self.blocks = nnx.List([Block(width, **kw) for _ in range(BLOCKS)])
        self.grow = Conv(width, grow * width, 1, bias=False, kernel_init=lecun_normal(), **kw)
        self.conv = Conv(width, to, bias=False, **kw)

    def __call__(self, x: Volume, memory: Sequence[Volume]) -> tuple[Volume, list[Volume]]:
        seen = []
        for block, before in zip(self.blocks, memory, strict=True):
            x, last = block(x, before)
            seen.append(last)
        # Frames are multiplied before rows and columns are doubled, since a 1x1 convolution commutes with the doubling.
        x = rearrange(self.grow(x), "b t h w (grow c) -> b (t grow) h w c", grow=self.factor)
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)), seen


class TinyDecoder(nnx.Module):
    """Decodes latents `[b, f, h, w, z_dim]` to float32 videos `[b, 1 + 4 (f - 1), 8 h, 8 w, 3]` in [-1, 1].

    Args:
      config: its shape.
      rngs: source of the initial weights.
      dtype: of convolutions.
      param_dtype: of the weights.
    """

    def __init__(
        self,
        config: TinyDecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        kw: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.config, self.dtype = config, dtype
        widths = config.widths
        self.conv_in = Conv(config.z_dim, widths[0], **kw)
        pairs = zip(widths[:-1], widths[1:], config.grows, strict=True)
        self.levels = nnx.List([Level(width, to, grow, **kw) for width, to, grow in pairs])
        self.conv_out = Conv(widths[-1], 3, kernel_init=SMALL, **kw)

    def decode(self, latents: Latents) -> Video:
        """Decodes a whole clip, one latent frame at a time, clipped to [-1, 1].

        Memory does not grow with the number of frames.

        Raises:
          UserError: the latents and the decoder differ in their number of channels.
        """
        first, memory = self.decode_next(latents[:, :1])
        count, each = latents.shape[1] - 1, math.prod(self.config.grows)
        if count == 0:
            return first

        def step(carry: tuple[Memory, Video], index: Int[Array, ""]) -> tuple[tuple[Memory, Video], None]:
            memory, out = carry
            frame = jax.lax.dynamic_slice_in_dim(latents, 1 + index, 1, axis=1)
            video, memory = self.decode_next(frame, memory)
            return (memory, jax.lax.dynamic_update_slice_in_dim(out, video, 1 + index * each, axis=1)), None

        out = jnp.zeros((first.shape[0], 1 + count * each, *first.shape[2:]), first.dtype)
        out = jax.lax.dynamic_update_slice_in_dim(out, first, 0, axis=1)
        return jax.lax.scan(step, (memory, out), jnp.arange(count))[0][1]

    def decode_next(self, latents: Latents, cache: Memory | None = None) -> tuple[Video, Memory]:
        """`decode` for a clip that arrives piece by piece.

        Args:
          latents: the next latent frames, one or more.
          cache: the second result for the piece before; None at the clip's beginning.

        Returns:
          4 frames for each latent frame, except 1 for the clip's first; and the cache for the next piece.

        Raises as `decode`.
        """
        video, memory = self.decode_raw(latents, cache)
        return jnp.clip(video, -1.0, 1.0), memory

    def decode_raw(self, latents: Latents, cache: Memory | None = None) -> tuple[Video, Memory]:
        """`decode_next` without clipping, for training."""
        config = self.config
        if latents.shape[-1] != config.z_dim:
            raise UserError(f"latents have {latents.shape[-1]} channels, but the decoder takes {config.z_dim}")
        x = latents
        if config.raw_latents:
            x = x * jnp.asarray(WAN_LATENTS_STD) + jnp.asarray(WAN_LATENTS_MEAN)
        x = nnx.relu(self.conv_in((3 * jnp.tanh(x / 3)).astype(self.dtype)))
        memory = self._empty(x) if cache is None else cache
        seen: Memory = []
        for number, level in enumerate(self.levels):
            start = number * BLOCKS
            x, last = level(x, memory[start : start + BLOCKS])
            seen += last
        video = self.conv_out(nnx.relu(x)).astype(jnp.float32) * 2 - 1
        # The first latent frame stands for one frame of the video, the last of the four that it is decoded to.
        return (video[:, math.prod(config.grows) - 1 :] if cache is None else video), seen

    def _empty(self, x: Volume) -> Memory:
        """The memory at a clip's beginning: zeros."""
        b, _, h, w, _ = x.shape
        return [
            jnp.zeros((b, 1, h << number, w << number, self.config.widths[number]), self.dtype)
            for number in range(len(self.levels))
            for _ in range(BLOCKS)
        ]
