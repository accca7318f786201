"""Images as the first frames of videos."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from vpae_jax.types import UserError

Pictures = UInt8[np.ndarray, "b height width 3"]


def fitted(height: int, width: int, own: tuple[int, int], units: tuple[int, int]) -> tuple[int, int]:
    """The video size for an image: its aspect ratio at the area of `own`, rounded down to multiples of `units`.

    This is Wan's formula for image-to-video in integer arithmetic: in Wan's floating point, an image of 480x832 falls
    just short of its own size, and gets 464x832.

    Args:
      height, width: of the image, in pixels.
      own: the model's default height and width.
      units: what height and width must be multiples of.

    Raises:
      UserError: an image so elongated that its shorter side would become 0.
    """
    area, (unit_h, unit_w) = own[0] * own[1], units
    rows = math.isqrt(area * height // (width * unit_h**2))
    columns = math.isqrt(area * width // (height * unit_w**2))
    if not rows or not columns:
        raise UserError(
            f"the image is {height}x{width}, too elongated for a video with the area of {own[0]}x{own[1]}; "
            "crop it, or give height and width"
        )
    return rows * unit_h, columns * unit_w


def first_frames(pictures: Pictures, height: int, width: int) -> Float[Array, "b 1 h w 3"]:
    """Clips of one frame: images at the video's size, in [-1, 1]."""
    return jnp.asarray(_stretch(pictures, height, width))[:, None]


def _stretch(pictures: Pictures, height: int, width: int) -> Float[np.ndarray, "b h w 3"]:
    """Images at the video's size (Lanczos, as in Diffusers' video processor), in [-1, 1]."""
    if pictures.shape[1:3] != (height, width):
        resized = (Image.fromarray(p).resize((width, height), Image.Resampling.LANCZOS) for p in pictures)
        pictures = np.stack([np.asarray(p) for p in resized])
    return pictures.astype(np.float32) / np.float32(127.5) - np.float32(1)
