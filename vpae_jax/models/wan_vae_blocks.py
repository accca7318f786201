"""Blocks of the Wan 2.1 video autoencoder.

Every temporal convolution is causal and starts from zeros, so a clip may be processed in chunks: a block that is given
the last frames of the chunk before computes the same numbers as on the whole clip. `History` carries those frames.

Source: Wan 2.1 (arXiv:2503.20314, section 4.1); names follow Diffusers' `AutoencoderKLWan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from flax.nnx.nn.initializers import lecun_normal, zeros_init
from flax.typing import Initializer
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from vpae_jax.models.wan_vae_rows import Strip

Volume = Float[Array, "_ _ _ _ _"]  # [b, t, h, w, c]; each may change from input to output


class History:
    """The last frames seen by each temporal convolution, in the order in which the convolutions run.

    Used for one pass over one chunk: the pass pops the frames of the chunk before (`frames`) and appends its own
    (`seen`). Without `frames` the chunk is the clip's first, or the whole clip. `strip` describes the rows that a
    device has; None if it has all.
    """

    def __init__(self, frames: Sequence[Volume] | None = None, strip: Strip | None = None):
        self.first, self.strip = frames is None, strip
        self.frames = list(frames or ())
        self.seen: list[Volume] = []

    def join(self, x: Volume, length: int) -> Volume:
        """Prepends the `length` frames before this chunk to x (zeros before the first frame of a clip)."""
        before = jnp.zeros((x.shape[0], length, *x.shape[2:]), x.dtype) if self.first else self.frames.pop(0)
        x = jnp.concatenate([before, x], axis=1)
        self.seen.append(x[:, x.shape[1] - length :])
        return x


def rematerialised(block: nnx.Module, x: Volume, history: History) -> Volume:
    """`block(x, history)`, of which the backward pass keeps only the input and recomputes the rest."""
    graph, weights = nnx.split(block)
    first = history.first

    def run(weights: Any, x: Volume, frames: list[Volume]) -> tuple[Volume, list[Volume], list[Volume]]:
        own = History(None if first else frames, history.strip)
        made: Any = nnx.merge(graph, weights)
        return made(x, own), own.seen, own.frames

    x, seen, history.frames = jax.checkpoint(run)(weights, x, history.frames)
    history.seen += seen
    return x


Sides = tuple[int, int]
Kernel = Float[Array, "kt kh kw c cout"]


def widened(x: Volume, size: int, stride: int, strip: Strip | None) -> tuple[Volume, tuple[Sides, Sides]]:
    """The input of a 2-D convolution, and its zero padding.

    The padding is equal on both sides; with stride 2 and three taps it is only below and to the right. A strip gets its
    neighbours' rows instead.
    """
    before = (size - stride) // 2
    sides = (before, size - stride - before) if size > 1 else (0, 0)
    if strip is None or not sum(sides):
        return x, (sides, sides)
    return strip.extended(x, *sides), ((0, 0), sides)


def conv_frames(
    x: Float[Array, "b t h w c"],
    kernel: Float[Array, "kh kw c cout"],
    padding: tuple[Sides, Sides],
    stride: int = 1,
) -> Float[Array, "b t h_out w_out cout"]:
    """A 2-D convolution of every frame, frames folded into the batch."""
    frames, layout = rearrange(x, "b t h w c -> (b t) h w c"), ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(frames, kernel, (stride, stride), padding, dimension_numbers=layout)
    return rearrange(y, "(b t) h w c -> b t h w c", t=x.shape[1])


def conv_causal(x: Volume, kernel: Kernel, padding: tuple[Sides, Sides], stride: int) -> Volume:
    """A convolution over time (without padding, with `stride`) and space.

    On TPUs it is a 3-D convolution. On other platforms the temporal taps become input channels of a 2-D convolution:
    the 3-D kernels of GPUs need channels before frames, and those of CPUs take twice as long.
    """
    if len(kernel) == 1:
        return conv_frames(x, kernel[0], padding)
    tpu, default = (partial(form, padding=padding, stride=stride) for form in (conv_whole, conv_merged))
    return jax.lax.platform_dependent(x, kernel, tpu=tpu, default=default)


def conv_whole(x: Volume, kernel: Kernel, padding: tuple[Sides, Sides], stride: int) -> Volume:
    """`conv_causal` as one 3-D convolution."""
    strides, layout = (stride, 1, 1), ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, ((0, 0), *padding), dimension_numbers=layout)


def conv_merged(x: Volume, kernel: Kernel, padding: tuple[Sides, Sides], stride: int) -> Volume:
    """`conv_causal` as one 2-D convolution of all taps."""
    steps = (x.shape[1] - len(kernel)) // stride + 1
    taps = [x[:, k : k + (steps - 1) * stride + 1 : stride] for k in range(len(kernel))]
    channels = kernel.transpose(1, 2, 0, 3, 4).reshape(*kernel.shape[1:3], -1, kernel.shape[-1])
    return conv_frames(jnp.concatenate(taps, axis=-1), channels, padding)


class Conv2d(nnx.Module):
    """A 2-D convolution with bias over every frame; kernel `[kh, kw, cin, cout]`."""

    def __init__(
        self,
        cin: int,
        cout: int,
        size: int,
        *,
        stride: int = 1,
        kernel_init: Initializer | None = None,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
    ):
        self.stride, self.dtype = stride, dtype
        self.kernel = nnx.Param((kernel_init or lecun_normal())(rngs.params(), (size, size, cin, cout), param_dtype))
        self.bias = nnx.Param(zeros_init()(rngs.params(), (cout,), param_dtype))

    def __call__(self, x: Volume, history: History) -> Volume:
        x, padding = widened(x, self.kernel.shape[0], self.stride, history.strip)
        return conv_frames(x, self.kernel[...].astype(self.dtype), padding, self.stride) + self.bias[...].astype(
            self.dtype
        )


class CausalConv3d(nnx.Module):
    """A convolution that sees this frame and earlier ones; kernel `[kt, kh, kw, cin, cout]`.

    With `time_stride` 2 there is no padding in time: output i sees inputs 2i, 2i+1, 2i+2.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        size: tuple[int, int, int],
        *,
        time_stride: int = 1,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
    ):
        self.time_stride, self.dtype = time_stride, dtype
        self.kernel = nnx.Param(lecun_normal()(rngs.params(), (*size, cin, cout), param_dtype))
        self.bias = nnx.Param(zeros_init()(rngs.params(), (cout,), param_dtype))

    def __call__(self, x: Volume, history: History) -> Volume:
        kernel = self.kernel[...].astype(self.dtype)
        size, stride = kernel.shape[0], self.time_stride
        if size > stride:
            x = history.join(x, size - stride)
        x, padding = widened(x, kernel.shape[1], 1, history.strip)
        return conv_causal(x, kernel, padding, stride) + self.bias[...].astype(self.dtype)


class RMSNorm(nnx.Module):
    """x / ||x|| * sqrt(c) * gamma over channels, computed in float32; optionally followed by SiLU."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        self.dtype = dtype
        self.gamma = nnx.Param(jnp.ones((channels,), param_dtype))

    def __call__(self, x: Volume, silu: bool = False) -> Volume:
        x = x.astype(jnp.float32)
        # The square root has an infinite gradient if the sum of squares is below the smallest normal float32: clamp.
        inverse = jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
        x = x * inverse * (x.shape[-1] ** 0.5) * self.gamma[...].astype(jnp.float32)
        return (jax.nn.silu(x) if silu else x).astype(self.dtype)


class ResidualBlock(nnx.Module):
    """Norm, SiLU and causal 3x3x3 convolution, twice, plus the input."""

    def __init__(self, cin: int, cout: int, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        kw: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.norm1 = RMSNorm(cin, **kw)
        self.conv1 = CausalConv3d(cin, cout, (3, 3, 3), **kw)
        self.norm2 = RMSNorm(cout, **kw)
        self.conv2 = CausalConv3d(cout, cout, (3, 3, 3), **kw)
        self.conv_shortcut = CausalConv3d(cin, cout, (1, 1, 1), **kw) if cin != cout else None

    def __call__(self, x: Volume, history: History) -> Volume:
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x, history)
        x = self.conv1(self.norm1(x, silu=True), history)
        return self.conv2(self.norm2(x, silu=True), history) + shortcut


class AttentionBlock(nnx.Module):
    """Self-attention of one head over the pixels of each frame, plus the input."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        kw: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.norm = RMSNorm(channels, **kw)
        self.to_qkv = Conv2d(channels, 3 * channels, 1, **kw)
        # Wan starts its attention as the identity.
        self.proj = Conv2d(channels, channels, 1, kernel_init=zeros_init(), **kw)

    def __call__(self, x: Volume, history: History) -> Volume:
        _, t, h, _, c = x.shape
        q, k, v = jnp.split(self.to_qkv(self.norm(x), history), 3, axis=-1)
        mask = None
        if history.strip is not None:
            seen = history.strip.seen(h)
            mask = None if seen is None else jnp.repeat(seen, x.shape[3])
            k, v = (history.strip.gathered(one) for one in (k, v))
        q, k, v = (rearrange(one, "b t h w c -> (b t) (h w) c") for one in (q, k, v))
        scores = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32) * c**-0.5
        out = jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(scores, axis=-1, where=mask).astype(v.dtype), v)
        return x + self.proj(rearrange(out, "(b t) (h w) c -> b t h w c", t=t, h=h), history)


class Downsample(nnx.Module):
    """Halves rows and columns, and with `temporal` also the frames after the clip's first."""

    def __init__(self, channels: int, temporal: bool, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        kw: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.resample = Conv2d(channels, channels, 3, stride=2, **kw)
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), time_stride=2, **kw) if temporal else None

    def __call__(self, x: Volume, history: History) -> Volume:
        x = self.resample(x, history)
        if self.time_conv is None:
            return x
        if not history.first:
            return self.time_conv(x, history)
        # The first frame is kept, and is also the frame before the second one.
        first = x[:, :1]
        if x.shape[1] == 1:
            history.seen.append(first)
            return first
        rest = History([first], history.strip)
        out = self.time_conv(x[:, 1:], rest)
        history.seen += rest.seen
        return jnp.concatenate([first, out], axis=1)


class Upsample(nnx.Module):
    """Doubles rows and columns and halves channels; with `temporal` also doubles the frames after the clip's first."""

    def __init__(self, channels: int, temporal: bool, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        kw: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.resample = Conv2d(channels, channels // 2, 3, **kw)
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1), **kw) if temporal else None

    def __call__(self, x: Volume, history: History) -> Volume:
        if self.time_conv is not None:
            # The first frame is not doubled, and does not count as the frame before the second one.
            alone = 1 if history.first else 0
            doubled = _double_frames(self.time_conv, x[:, alone:], history)
            x = jnp.concatenate([x[:, :alone], doubled], axis=1)
        return self.resample(jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3), history)


def _double_frames(time_conv: CausalConv3d, x: Volume, history: History) -> Volume:
    """Two frames for each frame, from the two halves of the convolution's channels."""
    if x.shape[1] == 0:
        history.join(x, 2)
        return x
    return rearrange(time_conv(x, history), "b t h w (two c) -> b (t two) h w c", two=2)


class MidBlock(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        kw: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.resnets = nnx.List([ResidualBlock(channels, channels, **kw) for _ in range(2)])
        self.attentions = nnx.List([AttentionBlock(channels, **kw)])

    def __call__(self, x: Volume, history: History) -> Volume:
        x = self.resnets[0](x, history)
        return self.resnets[1](self.attentions[0](x, history), history)


class UpBlock(nnx.Module):
    """Residual blocks, then an upsampling unless it is the decoder's last."""

    def __init__(
        self,
        cin: int,
        cout: int,
        num_resnets: int,
        upsample: bool,
        temporal: bool,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
    ):
        kw: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.resnets = nnx.List([ResidualBlock(cin if i == 0 else cout, cout, **kw) for i in range(num_resnets)])
        self.upsamplers = nnx.List([Upsample(cout, temporal, **kw)] if upsample else [])

    @property
    def layers(self) -> list[Any]:
        """The layers in the order in which the decoder runs them."""
        return [*self.resnets, *self.upsamplers]
