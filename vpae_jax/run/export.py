"""What a finished run leaves behind: a model directory with the trained part in it.

Every run writes `model/` in its workdir, a complete directory in the Diffusers layout: the parts that it trained, and
all others as they were. So a student is a directory that Diffusers loads, but for a causal one: its index names a
pipeline that Diffusers does not have, since Diffusers' let all frames see each other. Of a run that trains other parts,
its task writes it (`tasks.base.Task.write_model`), but for a small decoder, which any task can train.
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

APART = 1e-4  # between two experts' boundary and the nearest time


@dataclass(frozen=True)
class Trained:
    """A trained transformer.

    Attributes:
      params: its weights, or those that its adapters are added to.
      lora: its adapters (`weights.lora.from_adapters`); None without.
    """

    params: Params
    lora: Lora | None = None

    def values(self, config: WanTransformerConfig) -> Values:
        """What is written: adapters merged, in the float32 in which they were trained."""
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
    """The model directory of a student.

    Args:
      workdir: the run's; the directory is `model/` in it.
      base: the model that the run started from: all parts but the transformers.
      trained: the transformer; of two experts the one for times from `boundary` on. One with adapters is written
        merged, and if it is the only one, and not causal, the adapters as a LoRA file beside it, for the base with
        `loras`.
      sampler: how the student is sampled; a causal one has chunks.
      shift: of even times, for other numbers of steps than the sampler's (`Scheduler.of`).
      low: the second expert.
      boundary: time in (0, 1) between two experts; given if `low` is.
      facts: what the directory's card says of the run.
      loras: LoRA files that were merged into the base's transformer before it was trained.
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
    """The model directory that the run started from, with a decoder beside its parts; `model/` in the workdir."""
    return write_product(workdir, Contents(base, {"decoder": from_tree("decoder", config, params)}))


def _apart(boundary: float, sampler: Sampler) -> float:
    """The boundary, a little lower where it is one of the times, which in float32 may fall on either side of it."""
    return boundary - APART if any(abs(t - boundary) < APART for t in sampler.times) else boundary
