"""The LoRA files of `config.model.lora`, which are merged into all roles that start from the model's transformer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from vpae_jax.config import Experiment
from vpae_jax.files import resolve
from vpae_jax.methods.base import Role
from vpae_jax.run.workdir import read_object, read_run
from vpae_jax.train.checkpoint import CONFIG_FILE
from vpae_jax.types import Note, UserError
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.merging import LoraFile, Merging, open_merging, parse_lora, told

LORA = "config.model.lora"


def lora_files(names: str, workdir: Path) -> tuple[LoraFile, ...]:
    """Parses `config.model.lora`. Raises `UserError` for an invalid strength."""
    place = partial(resolve, workdir=workdir)
    return tuple(parse_lora(name.strip(), LORA, place) for name in names.split(",")) if names else ()


def check_loras(loras: Sequence[LoraFile], merged: bool) -> None:
    """Raises `UserError` for LoRA files that do not exist, or that no role would use.

    Args:
      merged: whether a role starts from the model directory's transformer.
    """
    for file in loras:
        if not file.path.is_file():
            raise UserError(f"{LORA}: {file.path}: no such file; expected LoRA files, as FILE or FILE:STRENGTH")
    if loras and not merged:
        raise UserError(f"{LORA} is {told(loras)}, but no role starts from the model directory; leave it out")


def open_loras(loras: Sequence[LoraFile], source: ModelDirectory) -> Merging:
    """Opens LoRA files, to be merged into a model's transformer while that is read.

    Raises:
      UserError: a file cannot be read, or is for another model.
    """
    try:
        return open_merging(loras, source.part("transformer").config)
    except UserError as error:
        raise UserError(f"{LORA}: {error}") from error


def compare_loras(experiment: Experiment, workdir: Path, roles: Mapping[str, Role]) -> None:
    """Compares the LoRA files of a run with those of the previous phase; a difference is a `Note`.

    Raises:
      UserError: they differ, and adapters would be used on another teacher than the one they were trained on.
    """
    folder = resolve(experiment.previous.workdir, workdir)
    if read_object(folder / CONFIG_FILE) is None:  # the folder may only contain its checkpoints
        return
    theirs, ours = lora_files(read_run(folder).lora, folder), lora_files(experiment.model.lora, workdir)
    if [(file.path.absolute(), file.strength) for file in theirs] == [(f.path.absolute(), f.strength) for f in ours]:
        return
    wrong = f"{LORA} is {told(ours) or 'empty'}, but {told(theirs) or 'empty'} in the previous phase, {folder}"
    for name, role in roles.items():
        sits = role.adapters is not None and roles[role.adapters.on].start == "pretrained"
        if sits and role.previous(name) is not None:
            raise UserError(f"{wrong}, on whose teacher the {name}'s adapters were trained; give the same files")
    warnings.warn(f"{wrong}; this run has another teacher than the previous phase", Note, stacklevel=3)
