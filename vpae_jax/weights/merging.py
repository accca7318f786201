"""LoRA files that are merged into a transformer: named in a text, and added to its weights as they are read.

Sums are taken in float32 and rounded once, to the dtype that the weights are then kept in.
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

MERGED_BEFORE = "LoRA merged before training"  # what cards call it


class LoraFile(NamedTuple):
    """A LoRA file, and the factor on what it changes."""

    path: Path
    strength: float = 1.0

    def __str__(self) -> str:
        return f"{self.path}:{self.strength:g}"


def parse_lora(text: str, name: str, place: Callable[[str], Path] = local_path) -> LoraFile:
    """ "FILE" or "FILE:STRENGTH", taken apart. A file whose own name ends in a colon and something is that file.

    Args:
      name: what the text was given as, for messages.
      place: where a path leads.

    Raises:
      UserError: a strength that is no finite number, or an address in place of a path.
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
    """LoRA files with their strengths, for cards and messages."""
    return ", ".join(map(str, files))


def about_base(base: Path | str, loras: Iterable[LoraFile]) -> dict[str, str]:
    """What the metadata of a LoRA file say of the model that it is for, into which `loras` are merged first."""
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
    """Adds LoRA files to weights while these are read from files, part by part (`stream.Merge`).

    Attributes:
      loras: the changes, each with its strength.
    """

    loras: tuple[tuple[Lora, float], ...]

    def __call__(self, path: str, layer: int, index: Index, value: HostArray) -> HostArray:
        """What of a layer was read, with its changes in float32.

        Args:
          index: which part of the layer it is; a slice for each leading axis.

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
    """Reads LoRA files, to be added to weights as they are read.

    Args:
      config: of the transformer.

    Raises:
      UserError: as `read_lora`.
    """
    return Merging(tuple((read_lora(file, config), strength) for file, strength in files))
