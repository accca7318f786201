"""Image encoders in files, for a discriminator on pixels: sizes, weights and preprocessing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vpae_jax.models.pixels import PixelCLIPConfig, PixelEncoderConfig, Preprocessing
from vpae_jax.types import Params, UserError
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.find import find_model
from vpae_jax.weights.image_processor import read_image_processor
from vpae_jax.weights.loading import read_part
from vpae_jax.weights.stream import Placement

PART = "image_encoder"


@dataclass(frozen=True)
class StoredEncoder:
    """An image encoder in files.

    Attributes:
      config: its sizes; builds the network (`models.pixels.PixelEncoderConfig`).
      read: loads its weights, given their dtype and placement, as nested dicts of arrays like those of
        `nnx.to_pure_dict`.
      files: the files that are read, for processes to compare.
    """

    config: PixelEncoderConfig
    read: Callable[[np.dtype, Placement], Params]
    files: tuple[Path, ...]


def clip(model: ModelDirectory | Path) -> StoredEncoder:
    """The CLIP tower of a model directory, with the preprocessing of its image processor.

    Raises:
      UserError: the directory has none, or it cannot be read.
    """
    found = find_model(model)
    if PART not in found.parts and PART not in found.unreadable:
        raise UserError(
            f"{found.path}: no image_encoder, which method.backbone='image_encoder' needs; set "
            "config.model.image_encoder to a model directory that has one, such as Wan's image-to-video models"
        )
    stored = found.part(PART)
    shown = read_image_processor(found.image_processor, stored.config.image_size)
    preprocessing = Preprocessing(shown.size, shown.crop_size, shown.image_mean, shown.image_std)

    def read(dtype: np.dtype, place: Placement) -> Any:
        return read_part(found, PART, dtype, place)[1]

    return StoredEncoder(PixelCLIPConfig(stored.config, preprocessing), read, stored.files)
