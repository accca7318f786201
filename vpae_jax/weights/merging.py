"""Merges LoRA files into a transformer: parses their names, and adds them to the weights as these are read.

Sums are computed in float32 and rounded once, to the final dtype of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vpae_jax.files import local_path
from vpae_jax.models.wan_dit import WanTransformerConfig
from vpae_jax.types import HostArray, UserError
from vpae_jax.weights.lora import Lora, Merged
from vpae_jax.weights.lora_reading import read_lora
from vpae_jax.weights.names import Index
from vpae_jax.weights.tensors import finite
from vpae_jax.weights.writing import Values

MERGED_BEFORE = "LoRA merged before training"  # its label in model cards


class LoraFile(NamedTuple):
    """A LoRA file, and the factor that its changes are multiplied by."""

    path: Path
    strength: float = 1.0

    def __str__(self) -> str:
        return f"{self.path}:{self.strength:g}"


def parse_lora(text: str, name: str, place: Callable[[str], Path] = local_path) -> LoraFile:
    """Parses "FILE" or "FILE:STRENGTH". If a file with the whole name exists, that file is meant.

    Args:
      text: the value.
      name: the flag or key that it was given by, for messages.
      place: resolves a path.

    Raises:
      UserError: a strength that is not a finite number, or a URL instead of a path.
    """
    file, colon, strength = text.rpartition(":")
    if not colon or place(text).exists():
        return LoraFile(place(text))
    try:
        value = float(strength)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise UserError(f"{name}={text}: the strength is {strength!r}, expected a number, such as {file}:0.8")
    return LoraFile(place(file), value)


def told(files: Iterable[LoraFile]) -> str:
    """LoRA files with their strengths, for model cards and messages."""
    return ", ".join(map(str, files))


def about_base(base: Path | str, loras: Iterable[LoraFile]) -> dict[str, str]:
    """A LoRA file's metadata about the model that it is for, into which `loras` must be merged first."""
    names = told(loras)
    return {"base": str(base), **({"base_lora": names} if names else {})}


def merged(values: Values, files: Iterable[LoraFile]) -> Values:
    """A transformer's weights with the changes of LoRA files added.

    Raises:
      UserError: as `read_lora`.
    """
    for file, strength in files:
        values = Merged(values, read_lora(file, values.config), strength)
    return values


@dataclass(frozen=True)
class Merging:
    """Adds LoRA files to weights while these are being read, piece by piece (`stream.Merge`).

    Attributes:
      loras: the changes, each with its strength.
    """

    loras: tuple[tuple[Lora, float], ...]

    def __call__(self, path: str, layer: int, index: Index, value: HostArray) -> HostArray:
        """Adds the changes to a piece of a layer, in float32.

        Args:
          path: of the parameter.
          layer: its layer index.
          index: the position of the piece in the layer; a slice for each leading axis.
          value: the piece.

        Raises:
          UserError: a sum that is not finite.
        """
        changed = value
        for lora, strength in self.loras:
            changed = lora.added(changed, strength, path, layer, index)
        if changed is not value and not finite(changed):
            raise UserError(f"{path} of layer {layer} plus its changes overflows float32; lower the strength")
        return changed


def open_merging(files: Iterable[LoraFile], config: WanTransformerConfig) -> Merging:
    """Reads LoRA files, to be added to weights as these are read.

    Args:
      files: with their strengths.
      config: of the transformer.

    Raises:
      UserError: as `read_lora`.
    """
    return Merging(tuple((read_lora(file, config), strength) for file, strength in files))
