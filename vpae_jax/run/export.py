"""Writes the result of a finished run: a model directory with the trained part in it.

Every run writes `model/` in its workdir, a complete directory in the Diffusers layout with the parts that it trained
and unchanged copies of all others. So Diffusers can load any student, except a causal one: its index names a pipeline
that Diffusers does not have, because in Diffusers' pipelines all frames attend to each other. For runs that train other
parts, the task writes the directory (`tasks.base.Task.write_model`), except for a small decoder, which any task can
train.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vpae_jax.flow.sampler import Sampler
from vpae_jax.models.tiny_decoder import TinyDecoderConfig
from vpae_jax.models.wan_dit import WanTransformerConfig
from vpae_jax.types import Params
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.layout import Contents, write_product
from vpae_jax.weights.lora import Lora, Merged
from vpae_jax.weights.merging import LoraFile
from vpae_jax.weights.parts import LOW
from vpae_jax.weights.settings import Scheduler
from vpae_jax.weights.writing import Values, from_tree

APART = 1e-4  # minimum distance between the boundary of two experts and the nearest timestep


@dataclass(frozen=True)
class Trained:
    """A trained transformer.

    Attributes:
      params: its weights, or the base weights of its adapters.
      lora: its adapters (`weights.lora.from_adapters`); None if it has none.
    """

    params: Params
    lora: Lora | None = None

    def values(self, config: WanTransformerConfig) -> Values:
        """Returns the values to write, with adapters merged, in the float32 in which they were trained."""
        values = from_tree("transformer", config, self.params)
        return values if self.lora is None else Merged(values, self.lora, changed_dtype=np.dtype(np.float32))


def write_student(
    workdir: Path,
    base: ModelDirectory,
    trained: Trained,
    sampler: Sampler,
    shift: float = 1.0,
    low: Trained | None = None,
    boundary: float | None = None,
    facts: Mapping[str, Any] | None = None,
    loras: Sequence[LoraFile] = (),
) -> Path:
    """Writes the model directory of a student, `model/` in the workdir.

    Args:
      workdir: the run's folder.
      base: the model that the run started from, which provides all parts except the transformers.
      trained: the transformer; of two experts, the one for timesteps from `boundary` up. Adapters are merged. If it is
        the only transformer and not causal, they are also written to a LoRA file in the directory, for use with the
        base plus `loras`.
      sampler: how the student is sampled; for a causal student, with chunks.
      shift: shift of an even time grid, for numbers of steps other than the sampler's (`Scheduler.of`).
      low: the second expert.
      boundary: timestep in (0, 1) between two experts; required with `low`.
      facts: facts about the run for the model card.
      loras: LoRA files that were merged into the base's transformer before training.

    Returns:
      The directory.
    """
    if (low is None) != (boundary is None):
        raise ValueError("a second expert and a boundary belong together")
    config = base.part("transformer").config
    others = dataclasses.replace(base, parts={n: s for n, s in base.parts.items() if n != LOW}, boundary=None)
    parts = {"transformer": trained.values(config)}
    if low is not None and boundary is not None:
        parts[LOW], boundary = low.values(config), _apart(boundary, sampler)
    lora = trained.lora if low is None else None
    scheduler = Scheduler.of(sampler, shift)
    contents = Contents(others, parts, scheduler, boundary=boundary, lora=lora, base_loras=tuple(loras))
    return write_product(workdir, contents, facts)


def write_decoder(workdir: Path, base: ModelDirectory, config: TinyDecoderConfig, params: Params) -> Path:
    """Writes the model directory that the run started from, with a small decoder added, to `model/` in the workdir."""
    return write_product(workdir, Contents(base, {"decoder": from_tree("decoder", config, params)}))


def _apart(boundary: float, sampler: Sampler) -> float:
    """Returns the boundary, slightly lowered if it is one of the sampler's timesteps, which could fall on either side
    of it in float32."""
    return boundary - APART if any(abs(t - boundary) < APART for t in sampler.times) else boundary
