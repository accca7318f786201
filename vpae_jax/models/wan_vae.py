"""The Wan 2.1 video autoencoder: 4x8x8 compression into 16 channels, causal in time.

A clip of 1 + 4k frames becomes 1 + k latent frames; the first frame is encoded on its own. Training works on the whole
clip (`moments`, `decode_raw`). Inference (`encode`, `decode`) processes it in chunks of one latent frame, so that
memory does not grow with the clip's length. `encode_next` and `decode_next` take a clip piece by piece. All give the
same numbers.

Source: Wan 2.1 (arXiv:2503.20314, section 4.1); names follow Diffusers' `AutoencoderKLWan`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Int

from vpae_jax.models.wan_vae_blocks import (
    AttentionBlock,
    CausalConv3d,
    Downsample,
    History,
    MidBlock,
    ResidualBlock,
    RMSNorm,
    UpBlock,
    Volume,
    rematerialised,
)
from vpae_jax.models.wan_vae_rows import Rows, Strip
from vpae_jax.types import Latents, UserError, Video

# What the temporal convolutions keep of a clip's frames so far: the last ones that each has seen.
Cache = list[Volume]
Stage = Callable[[Volume, History], Volume]
# Precision of the encoder's float32 products.
PRECISION = "tensorfloat32"

# fmt: off
WAN_LATENTS_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
WAN_LATENTS_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                   3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on


@dataclass(frozen=True)
class WanVAEConfig:
    """Shape of the autoencoder; fields and defaults of the Diffusers `config.json` (its spelling included).

    Attributes:
      base_dim: channels at full resolution.
      decoder_base_dim: the same for the decoder; None means `base_dim`.
      z_dim: latent channels.
      dim_mult: channels of each level, in units of the base.
      num_res_blocks: residual blocks of each encoder level (a decoder level has one more).
      attn_scales: resolutions, as fractions of the input's, at which the encoder attends.
      temperal_downsample: for each downsampling, whether it halves the frames too.
      dropout: must be 0.
      latents_mean, latents_std: statistics with which `encode` normalises each latent channel.
      is_residual, patch_size: used by Wan 2.2; must be False and None.
      in_channels, out_channels: video channels; must be 3.
      scale_factor_temporal, scale_factor_spatial: compression; must agree with the fields above.

    Raises:
      UserError: a value that is not supported or does not agree with the others.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    latents_mean: tuple[float, ...] = WAN_LATENTS_MEAN
    latents_std: tuple[float, ...] = WAN_LATENTS_STD
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    def __post_init__(self):
        levels, z = len(self.dim_mult), self.z_dim
        expected = {
            "dropout": 0.0,
            "is_residual": False,
            "patch_size": None,
            "in_channels": 3,
            "out_channels": 3,
            "scale_factor_temporal": 2 ** sum(self.temperal_downsample),
            "scale_factor_spatial": 2 ** (levels - 1),
        }
        for name, value in expected.items():
            if getattr(self, name) != value:
                raise UserError(
                    f"VAE config: {name} is {getattr(self, name)!r}, expected {value!r}; only Wan 2.1 autoencoders work"
                )
        lengths = {"temperal_downsample": levels - 1, "latents_mean": z, "latents_std": z}
        for name, length in lengths.items():
            if len(getattr(self, name)) != length:
                raise UserError(f"VAE config: {name} has {len(getattr(self, name))} values, expected {length}")


class Encoder(nnx.Module):
    """Maps a video to unnormalised moments of twice `z_dim` channels."""

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        kw: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        width = config.base_dim
        self.conv_in = CausalConv3d(config.in_channels, width, (3, 3, 3), **kw)
        blocks: list[nnx.Module] = []
        for level, mult in enumerate(config.dim_mult):
            for _ in range(config.num_res_blocks):
                blocks.append(ResidualBlock(width, config.base_dim * mult, **kw))
                width = config.base_dim * mult
                if 0.5**level in config.attn_scales:
                    blocks.append(AttentionBlock(width, **kw))
            if level < len(config.temperal_downsample):
                blocks.append(Downsample(width, config.temperal_downsample[level], **kw))
        self.down_blocks = nnx.List(blocks)
        self.mid_block = MidBlock(width, **kw)
        self.norm_out = RMSNorm(width, **kw)
        self.conv_out = CausalConv3d(width, 2 * config.z_dim, (3, 3, 3), **kw)

    @property
    def stages(self) -> list[Stage]:
        """The parts of the encoder, one per resolution."""
        levels: list[list[nnx.Module]] = [[]]
        for block in self.down_blocks:
            levels[-1].append(block)
            if isinstance(block, Downsample):
                levels.append([])

        def first(x: Volume, history: History) -> Volume:
            return _in_turn(levels[0], self.conv_in(x, history), history)

        def last(x: Volume, history: History) -> Volume:
            x = self.mid_block(_in_turn(levels[-1], x, history), history)
            return self.conv_out(self.norm_out(x, silu=True), history)

        return [first, *(partial(_in_turn, level) for level in levels[1:-1]), last]

    def __call__(self, x: Volume, history: History) -> Volume:
        return _in_turn(self.stages, x, history)


def _in_turn(layers: Sequence[Any], x: Volume, history: History) -> Volume:
    for layer in layers:
        x = layer(x, history)
    return x


class Decoder(nnx.Module):
    """Maps unnormalised latents to a video."""

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        kw: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        base = config.base_dim if config.decoder_base_dim is None else config.decoder_base_dim
        width = base * config.dim_mult[-1]
        self.conv_in = CausalConv3d(config.z_dim, width, (3, 3, 3), **kw)
        self.mid_block = MidBlock(width, **kw)
        temporal = (*config.temperal_downsample[::-1], False)
        blocks = []
        for level, mult in enumerate(config.dim_mult[::-1]):
            last = level == len(config.dim_mult) - 1
            blocks.append(UpBlock(width, base * mult, config.num_res_blocks + 1, not last, temporal[level], **kw))
            width = base * mult // 2
        self.up_blocks = nnx.List(blocks)
        self.norm_out = RMSNorm(base * config.dim_mult[0], **kw)
        self.conv_out = CausalConv3d(base * config.dim_mult[0], config.out_channels, (3, 3, 3), **kw)

    def __call__(self, x: Volume, history: History, remat: bool = False) -> Volume:
        """With `remat`, the backward pass keeps only the input of each layer."""
        x = self.conv_in(x, history)
        for layer in (self.mid_block, *(layer for block in self.up_blocks for layer in block.layers)):
            x = rematerialised(layer, x, history) if remat else layer(x, history)
        return self.conv_out(self.norm_out(x, silu=True), history)


def _in_chunks(
    run: Callable[[Volume, History], Volume],
    x: Volume,
    size: int,
    out_size: int,
    cache: Cache | None,
    strip: Strip | None,
) -> tuple[Volume, Cache]:
    """Runs over chunks of `size` frames, each with the history of the previous one.

    Without a `cache`, the first frame is the clip's first, and a chunk by itself. It gives one output frame, each other
    chunk `out_size`. Chunks are written in place into the result, so that besides the result only one chunk is in
    memory.

    Returns:
      The result, and the history after the last chunk.
    """
    history, head = History(cache, strip), 1 if cache is None else size
    first = run(x[:, :head], history)
    chunks, begin = (x.shape[1] - head) // size, first.shape[1]
    if chunks == 0:
        return first, history.seen

    def step(carry: tuple[Cache, Volume], index: Int[Array, ""]) -> tuple[tuple[Cache, Volume], None]:
        frames, out = carry
        history = History(frames, strip)
        chunk = run(jax.lax.dynamic_slice_in_dim(x, head + index * size, size, axis=1), history)
        return (history.seen, jax.lax.dynamic_update_slice_in_dim(out, chunk, begin + index * out_size, axis=1)), None

    out = jnp.zeros((first.shape[0], begin + chunks * out_size, *first.shape[2:]), first.dtype)
    out = jax.lax.dynamic_update_slice_in_dim(out, first, 0, axis=1)
    (seen, out), _ = jax.lax.scan(step, (history.seen, out), jnp.arange(chunks))
    return out, seen


class WanVAE(nnx.Module):
    """The autoencoder: maps videos `[b, t, height, width, 3]` in [-1, 1] to float32 latents `[b, f, h, w, z_dim]`.

    Args:
      config: its shape.
      rngs: source of the initial weights.
      dtype: of convolutions and attention; norms and softmax are always float32.
      param_dtype: of the weights.

    Attributes:
      rows: devices over which `encode`, `decode` and their piecewise forms spread a clip's rows; None uses one device.
    """

    def __init__(
        self,
        config: WanVAEConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        kw: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.config, self.dtype = config, dtype
        self.rows: Rows | None = None
        self.encoder = Encoder(config, **kw)
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1), **kw)
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1), **kw)
        self.decoder = Decoder(config, **kw)

    def moments(self, video: Video) -> tuple[Latents, Latents]:
        """Mean and log-variance of the latents, not normalised.

        Raises:
          UserError: the number of frames is not 1 + a multiple of the temporal compression, or rows or columns are not
            multiples of the spatial compression.
        """
        self.check_video(video)
        mean, logvar = jnp.split(self._encode(video, History()), 2, axis=-1)
        return mean, logvar

    def decode_raw(self, z: Latents) -> Video:
        """Decodes unnormalised latents; values may exceed [-1, 1].

        Raises:
          UserError: the latents and the autoencoder differ in their number of channels.
        """
        self._check_channels(z)
        return self._decode(z, History())

    def encode(self, video: Video) -> Latents:
        """The mean, normalised per channel; memory does not grow with the number of frames. Raises as `moments`.

        Since this makes the training data, float32 products are computed in TF32 on GPUs, as in PyTorch, and in three
        bfloat16 passes on TPUs, where the default is one pass.
        """
        return self.encode_next(video)[0]

    def encode_next(self, video: Video, cache: Cache | None = None) -> tuple[Latents, Cache]:
        """`encode` for a clip that arrives piece by piece.

        Args:
          video: the next frames, a multiple of the temporal compression; one more at the clip's beginning.
          cache: the second result for the piece before; None at the clip's beginning.

        Returns:
          The latents of these frames, and the cache for the next piece, whose size does not grow.

        Raises as `moments`.
        """
        self.check_video(video, begun=cache is not None)

        def run(vae: WanVAE, x: Volume, cache: Cache | None, strip: Strip | None) -> tuple[Volume, Cache]:
            stages = vae.encode_stages()
            with jax.default_matmul_precision(PRECISION):
                return _in_chunks(partial(_in_turn, stages), x, vae.config.scale_factor_temporal, 1, cache, strip)

        return self.by_rows(run, video, cache, video.shape[2] // self.config.scale_factor_spatial)

    def decode(self, latents: Latents) -> Video:
        """Inverse of `encode`, clipped to [-1, 1]; memory does not grow with the number of frames.

        Raises as `decode_raw`.
        """
        return self.decode_next(latents)[0]

    def decode_next(self, latents: Latents, cache: Cache | None = None) -> tuple[Video, Cache]:
        """`decode` for a clip that arrives piece by piece.

        Args:
          latents: the next latent frames, one or more.
          cache: the second result for the piece before; None at the clip's beginning.

        Returns:
          `scale_factor_temporal` frames for each latent frame, except one for the clip's first; and the cache for the
          next piece, whose size does not grow.

        Raises as `decode_raw`.
        """
        self._check_channels(latents)

        def run(vae: WanVAE, x: Volume, cache: Cache | None, strip: Strip | None) -> tuple[Volume, Cache]:
            return _in_chunks(vae.decode_piece, x, 1, vae.config.scale_factor_temporal, cache, strip)

        return self.by_rows(run, latents, cache, latents.shape[2])

    def decode_at(self, latents: Latents, frame: Int[Array, ""]) -> Video:
        """The first video frame and those of one latent frame, as `decode` gives them; for a discriminator on frames.

        The decoder is causal: earlier latent frames are decoded as well, one at a time and without gradient, because
        the convolutions keep some of their values; later ones are not decoded. The first video frame is differentiable
        in the first latent frame, and the others in the chosen one; everything else is a constant.

        Args:
          latents: normalised, as for `decode`.
          frame: index of the latent frame, from 1 to f - 1; may be a traced value. Without effect for clips of one
            latent frame.

        Returns:
          1 + `scale_factor_temporal` frames, clipped to [-1, 1]; only the first for clips of one latent frame.

        Raises as `decode_raw`.
        """
        self._check_channels(latents)
        z = latents * jnp.asarray(self.config.latents_std) + jnp.asarray(self.config.latents_mean)
        history = History()
        first = self._decode(z[:, :1], history, remat=True)
        if z.shape[1] == 1:
            return jnp.clip(first, -1.0, 1.0)
        constant = jax.lax.stop_gradient(z)

        def advance(index: Int[Array, ""], seen: list[Volume]) -> list[Volume]:
            own = History(seen)
            self._decode(jax.lax.dynamic_slice_in_dim(constant, index, 1, axis=1), own)
            return own.seen

        seen = jax.lax.fori_loop(1, frame, advance, jax.lax.stop_gradient(history.seen))
        last = self._decode(jax.lax.dynamic_slice_in_dim(z, frame, 1, axis=1), History(seen), remat=True)
        return jnp.clip(jnp.concatenate([first, last], axis=1), -1.0, 1.0)

    def by_rows(
        self, run: Callable[..., tuple[Volume, Any]], x: Volume, carried: Any, latent_rows: int
    ) -> tuple[Volume, Any]:
        """`run(vae, x, carried, strip)`; with `rows`, on each device with its own rows (`Rows.run`)."""
        if self.rows is None or self.rows.devices == 1:
            return run(self, x, carried, None)
        graph, weights = nnx.split(self)

        def local(weights: Any, *given: Any) -> tuple[Volume, Any]:
            return run(nnx.merge(graph, weights), *given)

        return self.rows.run(local, weights, x, carried, latent_rows)

    def encode_stages(self) -> list[Stage]:
        """The parts of `encode`, one per resolution, from a piece of a clip to normalised latents."""
        *first, last = self.encoder.stages

        def end(x: Volume, history: History) -> Volume:
            mean = self.quant_conv(last(x, history), history)[..., : self.config.z_dim].astype(jnp.float32)
            return (mean - jnp.asarray(self.config.latents_mean)) / jnp.asarray(self.config.latents_std)

        return [lambda x, history: first[0](x.astype(self.dtype), history), *first[1:], end]

    def decode_piece(self, x: Volume, history: History) -> Volume:
        """Decodes a clip's first latent frames, or the next ones."""
        z = x * jnp.asarray(self.config.latents_std) + jnp.asarray(self.config.latents_mean)
        return jnp.clip(self._decode(z, history), -1.0, 1.0)

    def _encode(self, x: Volume, history: History) -> Volume:
        return self.quant_conv(self.encoder(x.astype(self.dtype), history), history).astype(jnp.float32)

    def _decode(self, z: Volume, history: History, remat: bool = False) -> Volume:
        x = self.post_quant_conv(z.astype(self.dtype), history)
        return self.decoder(x, history, remat).astype(jnp.float32)

    def check_video(self, video: Video, begun: bool = False) -> None:
        """Raises `UserError` for a video, or with `begun` for the next frames of one, that cannot be encoded."""
        time, space = self.config.scale_factor_temporal, self.config.scale_factor_spatial
        _, t, height, width, _ = video.shape
        if t < 1 or (t if begun else t - 1) % time or height % space or width % space:
            needed = f"a multiple of {time} more" if begun else f"1 + a multiple of {time}"
            raise UserError(
                f"video is {t} frames of {height}x{width}; the autoencoder needs {needed} frames "
                f"and rows and columns divisible by {space}; crop or pad it"
            )

    def _check_channels(self, z: Latents) -> None:
        if z.shape[-1] != self.config.z_dim:
            raise UserError(
                f"latents have {z.shape[-1]} channels, the autoencoder {self.config.z_dim}; "
                "they were encoded by another autoencoder"
            )
