"""The image encoder that a discriminator on pixels sees by: which one it is, and where its weights come from.

A kind is a function from a path to an `Encoder`; it looks at the files there and fetches nothing but what
`config.model.image_encoder` names. The one that is here reads the CLIP tower of a model directory, which image-to-video
models have anyhow. Another one, such as DINOv2, is one file and one line in `KINDS`: `docs/architecture.md` shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vpae_jax.config import Experiment, nearest
from vpae_jax.methods.base import Method
from vpae_jax.models.pixels import PixelCLIPConfig, PixelEncoderConfig, Preprocessing
from vpae_jax.run.first_weights import Reader, resolve_model
from vpae_jax.types import UserError
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.find import find_model
from vpae_jax.weights.image_processor import read_image_processor
from vpae_jax.weights.loading import read_part
from vpae_jax.weights.stream import Placement

PART = "image_encoder"


@dataclass(frozen=True)
class Encoder:
    """An image encoder in files.

    Attributes:
      config: its sizes; makes the network (`models.pixels.PixelEncoderConfig`).
      read: its weights, given their dtype and where each lies: nested dicts of arrays, as `nnx.to_pure_dict` gives the
        network's.
      files: what is read, for processes to compare.
    """

    config: PixelEncoderConfig
    read: Reader
    files: tuple[Path, ...]


def clip(model: ModelDirectory | Path) -> Encoder:
    """The CLIP tower of a model directory, with the preprocessing of its image processor.

    Raises:
      UserError: the directory has none, or it cannot be read.
    """
    found = find_model(model)
    if PART not in found.parts and PART not in found.unreadable:
        raise UserError(
            f"{found.path}: no image_encoder, which method.backbone='image_encoder' looks by; set "
            "config.model.image_encoder to a model directory that has one, as Wan's image-to-video models do"
        )
    stored = found.part(PART)
    shown = read_image_processor(found.image_processor, stored.config.image_size)
    preprocessing = Preprocessing(shown.size, shown.crop_size, shown.image_mean, shown.image_std)

    def read(dtype: np.dtype, place: Placement) -> Any:
        return read_part(found, PART, dtype, place)[1]

    return Encoder(PixelCLIPConfig(stored.config, preprocessing), read, stored.files)


KINDS: Mapping[str, Callable[[Path], Encoder]] = {"clip": clip}


def find(experiment: Experiment, method: Method, source: ModelDirectory | None, workdir: Path) -> Encoder | None:
    """The image encoder of a run; None for a method that looks at no pixels.

    Args:
      source: the model directory that the run starts from.

    Raises:
      UserError: there is none, or no such kind, or what its kind refuses.
    """
    if all(role.part != PART for role in method.roles.values()):
        return None
    kind, colon, path = experiment.model.image_encoder.partition(":")
    if not colon:
        kind, path = "clip", kind
    if kind not in KINDS:
        raise UserError(f"config.model.image_encoder: no kind {kind!r} of image encoders{nearest(kind, KINDS)}")
    if not path and source is not None and kind == "clip":
        return clip(source)
    return KINDS[kind](resolve_model(path, workdir))
