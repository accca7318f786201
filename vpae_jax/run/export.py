"""What a finished run leaves behind: a model directory with the trained part in it.

Every run writes `model/` in its workdir, a complete directory in the Diffusers layout: the parts that it trained, and
all others as they were. So a student is a directory that Diffusers loads. Of a run that trains other parts, its task
writes it (`tasks.base.Task.write_model`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vpae_jax.types import Params
from vpae_jax.weights.card import Provenance
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.find import find_model
from vpae_jax.weights.layout import write_model
from vpae_jax.weights.settings import Scheduler
from vpae_jax.weights.writing import Values, from_tree

FOLDER = "model"


def write_student(workdir: Path, params: Params, source: Path, scheduler: Scheduler | None) -> Path:
    """The source with the trained transformer."""
    base = find_model(source)
    values = from_tree("transformer", base.part("transformer").config, params)
    return _write(workdir, base, {"transformer": values}, scheduler)


def _write(
    workdir: Path,
    base: ModelDirectory,
    parts: Mapping[str, Values],
    scheduler: Scheduler | None,
) -> Path:
    folder = workdir / FOLDER
    given = Provenance(str(workdir), {"started from": str(base.path)} if base.parts else {})
    write_model(folder, base, parts, scheduler=scheduler, overwrite=True, provenance=given)
    return folder
