"""Checkpoints of Self-Forcing and CausVid: one `.pt` with named sets of a transformer's weights.

Their programs load one set, strictly, into a module that holds the transformer as `model`: CausVid loads `generator`,
Self-Forcing either that or the average, `generator_ema`. The tensors have Wan's own names. Everything else is in Wan's
folder and in their configs: sizes, text encoder, VAE, chunks and timesteps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from vpae_jax.files import replacing
from vpae_jax.types import UserError
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.find import find_model
from vpae_jax.weights.pickles import write_sets
from vpae_jax.weights.settings import Scheduler
from vpae_jax.weights.writing import Values, tensors_of, verify_part

SUFFIX, PREFIX = ".pt", "model."
PART = "transformer"


def write_checkpoint(
    path: Path,
    sets: Mapping[str, Values],
    dtype: DTypeLike | None = None,
    like: ModelDirectory | None = None,
) -> dict[str, int]:
    """Writes one checkpoint, complete or not at all; all its tensors are in memory at once.

    Args:
      path: the file.
      sets: transformers: `generator`, its average `generator_ema`, or both.
      dtype: of all tensors; None keeps theirs.
      like: a model of the same sizes, which serves to read back every tensor and check that it is bit-identical before
        the file appears; None for no check.

    Returns:
      The number of parameters and layers of each set that were compared; empty without `like`.

    Raises:
      UserError: another suffix, a value that is not finite, no PyTorch, tensors that do not read back as they were
        written.
    """
    if path.suffix != SUFFIX:
        raise UserError(f"{path}: a Self-Forcing checkpoint is one file; give it a name that ends in {SUFFIX}")
    with replacing(path) as temporary:
        tensors = {name: tensors_of(PART, values, "wan", PREFIX, dtype) for name, values in sets.items()}
        write_sets(temporary, tensors)
        if like is None:
            return {}
        return {name: _verify(temporary, path, name, values, dtype, like) for name, values in sets.items()}


def config_of(scheduler: Scheduler) -> dict[str, Any]:
    """The entries that Self-Forcing's config needs for a causal model; empty for a model that generates whole clips."""
    chunks = scheduler.chunks
    if chunks is None:
        return {}
    found: dict[str, Any] = {"num_frame_per_block": chunks.size}
    if chunks.first not in (0, chunks.size):
        found["independent_first_frame"] = True
    if scheduler.solver != "consistency":
        return found
    even = [(scheduler.steps - i) / scheduler.steps for i in range(scheduler.steps)]
    times = [round(1000 * t) for t in scheduler.times[:-1] or even]
    found |= {"denoising_step_list": times, "warp_denoising_step": not scheduler.times}
    return found | {"model_kwargs.timestep_shift": scheduler.shift}


def _verify(
    temporary: Path, path: Path, name: str, values: Values, dtype: DTypeLike | None, like: ModelDirectory
) -> int:
    written = dataclasses.replace(find_model(temporary, like, name), path=path)
    try:
        return verify_part(written, PART, values, dtype)
    except UserError as error:
        raise UserError(f"{error}; nothing is kept. Is the disk sound?") from error
