"""Image encoders for discriminators on pixels, with their preprocessing as differentiable arithmetic.

Frames are preprocessed as the encoder's image processor does (`weights.image_processor`, transformers'
`CLIPImageProcessor`), in float32: bicubic resizing, a square crop, mean and standard deviation. Two differences are
intended. Nothing is rounded to 8 bits, since rounding has no gradient; values agree with the processor's to within two
levels of 255. And the caller chooses the position of the crop, since the processor's, at the centre, would never show a
discriminator the sides of a wide video.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vpae_jax.models.clip import CLIP_MEAN, CLIP_STD, CLIPVision, CLIPVisionConfig
from vpae_jax.types import Features, UserError, Video

Images = Float[Array, "n height width 3"]
Pixels = Float[Array, "n h w 3"]  # of another size


@runtime_checkable
class PixelEncoderConfig(Protocol):
    """Sizes of an encoder for a discriminator on pixels.

    Attributes:
      width: of its hidden states.
      depth: number of its blocks, each of which heads may read, counted from 1.
    """

    @property
    def width(self) -> int: ...

    @property
    def depth(self) -> int: ...

    def make(self, rngs: nnx.Rngs, dtype: DTypeLike) -> nnx.Module:
        """The encoder with random weights, a `methods.base.PixelEncoder`, with compute dtype `dtype`."""
        ...


@dataclass(frozen=True)
class Preprocessing:
    """A differentiable image processor; the fields are those of `weights.image_processor.ImageProcessor`.

    Attributes:
      size: pixels of the shorter edge after resizing, or (height, width) for any aspect ratio.
      crop_size: (height, width) of the crop; None for no crop.
      image_mean, image_std: of each channel, for values in [0, 1].
    """

    size: int | tuple[int, int]
    crop_size: tuple[int, int] | None
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    def __call__(self, images: Images, place: Float[Array, ""]) -> Pixels:
        """The encoder's pixels, float32.

        Args:
          images: values in [-1, 1].
          place: position of the crop along the longer edge, from 0 (top or left) to 1; the image processor's is 0.5.

        Raises:
          UserError: the crop is larger than the resized images.
        """
        pixels = self._crop(self._resize((images.astype(jnp.float32) + 1) / 2), place)
        return (pixels - jnp.asarray(self.image_mean)) / jnp.asarray(self.image_std)

    def _resize(self, images: Images) -> Pixels:
        """Resizes columns, then rows, as Pillow does, each clipped to the range of pixel values."""
        n, height, width, c = images.shape
        if isinstance(self.size, int):
            short, long = min(height, width), max(height, width)
            long = int(self.size * long / short)
            to_height, to_width = (long, self.size) if height > width else (self.size, long)
        else:
            to_height, to_width = self.size
        if to_width != width:
            images = jnp.clip(jax.image.resize(images, (n, height, to_width, c), "cubic"), 0.0, 1.0)
        if to_height != height:
            images = jnp.clip(jax.image.resize(images, (n, to_height, to_width, c), "cubic"), 0.0, 1.0)
        return images

    def _crop(self, images: Images, place: Float[Array, ""]) -> Pixels:
        if self.crop_size is None:
            return images
        n, height, width, c = images.shape
        h, w = self.crop_size
        if height < h or width < w:
            raise UserError(f"image processor: crop {h}x{w} is larger than the resized image {height}x{width}")
        top, left = (jnp.floor(place * left_over).astype(jnp.int32) for left_over in (height - h, width - w))
        return jax.lax.dynamic_slice(images, (0, top, left, 0), (n, h, w, c))


@dataclass(frozen=True)
class PixelCLIPConfig:
    """A CLIP vision tower and the preprocessing of its input images."""

    clip: CLIPVisionConfig
    preprocessing: Preprocessing

    @property
    def width(self) -> int:
        return self.clip.hidden_size

    @property
    def depth(self) -> int:
        return self.clip.num_hidden_layers

    def make(self, rngs: nnx.Rngs, dtype: DTypeLike) -> PixelCLIP:
        return PixelCLIP(self, rngs=rngs, dtype=dtype)


class PixelCLIP(CLIPVision):
    """CLIP's hidden states of every frame of a video, with the weights and parameter names of `CLIPVision`."""

    def __init__(self, config: PixelCLIPConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        super().__init__(config.clip, rngs=rngs, dtype=dtype)
        self.preprocessing = config.preprocessing

    def features(self, video: Video, place: Float[Array, ""], taps: tuple[int, ...]) -> Features:
        """Hidden states of the patches of all frames, without the class token; frames do not see each other.

        Args:
          video: values in [-1, 1], of any size.
          place: see `Preprocessing`.
          taps: layers, counted from 1.
        """
        b, t = video.shape[:2]
        pixels = self.preprocessing(rearrange(video, "b t height width c -> (b t) height width c"), place)
        side = self.config.image_size // self.config.patch_size
        states: Any = self.hidden_states(pixels, taps)
        tokens = tuple(rearrange(state[:, 1:], "(b t) n e -> b (t n) e", b=b, t=t) for state in states)
        return Features(tokens, None, None, grid=(t, side, side))
