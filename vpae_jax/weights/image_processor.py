"""Preprocessing for the image encoder: CLIP's, equal to transformers' `CLIPImageProcessor`.

It resizes the shorter edge to `size` by bicubic interpolation, crops the centre, scales to [0, 1], and normalises by
mean and standard deviation. As in Diffusers' Wan pipeline, its input is the original image, before any resizing to the
video's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from vpae_jax.config import build
from vpae_jax.models.clip import CLIP_MEAN, CLIP_STD
from vpae_jax.types import UserError
from vpae_jax.weights.filenames import read_json
from vpae_jax.weights.safetensors_file import quote

IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
MAX_SIDE, MAX_PIXELS = 4096, 2**26  # far beyond any encoder's input, and of a resized image

# Keys for which only one value is supported, and keys without effect here.
_FIXED: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "do_pad": None,
    "rescale_factor": 1 / 255,
    "resample": int(Image.Resampling.BICUBIC),
}
_IGNORED = {"image_processor_type", "feature_extractor_type", "data_format", "input_data_format", "use_fast", "device"}


@dataclass(frozen=True)
class ImageProcessor:
    """Converts uint8 images of any size to an image encoder's pixels.

    Attributes:
      size: pixels of the shorter edge after resizing, or (height, width) regardless of the aspect.
      crop_size: (height, width) of the centre crop; None for no crop.
      image_mean: mean of each channel, for values in [0, 1].
      image_std: standard deviation of each channel.

    Raises:
      UserError: an impossible size or deviation; when called, an image that is too elongated.
    """

    size: int | tuple[int, int] = 224
    crop_size: tuple[int, int] | None = (224, 224)
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        sides = (*(self.size if isinstance(self.size, tuple) else (self.size,)), *(self.crop_size or ()))
        if not all(1 <= side <= MAX_SIDE for side in sides):
            raise UserError(f"size is {self.size}, crop_size {self.crop_size}; expected pixels from 1 to {MAX_SIDE}")
        if not min(self.image_std) > 0:
            raise UserError(f"image_std is {self.image_std}, expected positive numbers")

    def __call__(self, pictures: UInt8[np.ndarray, "b height width 3"]) -> Float[np.ndarray, "b h w 3"]:
        pixels = np.stack([self._crop(self._resize(picture)) for picture in pictures]).astype(np.float32) / 255
        return (pixels - np.asarray(self.image_mean, np.float32)) / np.asarray(self.image_std, np.float32)

    def to_json(self) -> dict[str, Any]:
        """The preprocessor_config.json that transformers reads."""
        size = {"shortest_edge": self.size} if isinstance(self.size, int) else _edges(self.size)
        return {
            **{key: value for key, value in _FIXED.items() if value is not None},
            "image_processor_type": "CLIPImageProcessor",
            "size": size,
            "do_center_crop": self.crop_size is not None,
            "crop_size": _edges(self.crop_size or (224, 224)),
            "image_mean": self.image_mean,
            "image_std": self.image_std,
        }

    def _resize(self, picture: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "h w 3"]:
        height, width, _ = picture.shape
        if isinstance(self.size, int):
            short, long = min(height, width), max(height, width)
            long = int(self.size * long / short)
            height, width = (long, self.size) if height > width else (self.size, long)
        else:
            height, width = self.size
        if height * width > MAX_PIXELS:
            given = f"{picture.shape[0]}x{picture.shape[1]}"
            raise UserError(f"the image is {given}, too elongated for the image encoder; crop it")
        return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))

    def _crop(self, picture: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "h w 3"]:
        if self.crop_size is None:
            return picture
        (height, width), (h, w) = picture.shape[:2], self.crop_size
        if height < h or width < w:
            raise UserError(f"image processor: crop {h}x{w} is larger than the resized image {height}x{width}")
        top, left = (height - h) // 2, (width - w) // 2
        return picture[top : top + h, left : left + w]


def read_image_processor(folder: Path | None, side: int) -> ImageProcessor:
    """Reads `preprocessor_config.json`.

    Args:
      folder: where it is; None for a model without one, for which images are cropped to squares.
      side: side of the image encoder's square input, in pixels.

    Raises:
      UserError: no such file, or a setting that this package does not support.
    """
    if folder is None:
        return ImageProcessor(side, (side, side))
    path = folder / IMAGE_PROCESSOR_FILE
    values = {key: value for key, value in read_json(path).items() if not key.startswith("_") and key not in _IGNORED}
    for key, expected in _FIXED.items():
        found = values.pop(key, expected)
        if found != expected:
            raise UserError(f"{path}: {key} is {quote(found)}, only {expected!r} is supported")
    if not values.pop("do_center_crop", True):
        values["crop_size"] = None
    given = {key: _numbers(value) if key in ("size", "crop_size") else value for key, value in values.items()}
    if isinstance(given.get("crop_size"), int):
        given["crop_size"] = (given["crop_size"],) * 2
    return build(ImageProcessor, given, str(path))


def _numbers(value: Any) -> Any:
    """transformers' size dictionaries as a number or (height, width); anything else unchanged."""
    if isinstance(value, dict) and set(value) == {"shortest_edge"}:
        return value["shortest_edge"]
    if isinstance(value, dict) and set(value) == {"height", "width"}:
        return (value["height"], value["width"])
    return value


def _edges(size: tuple[int, int]) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}
