"""A part's arrays as an Orbax checkpoint: our own layout, which restores straight into shards without any turning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from vpae_jax.types import UserError


def is_checkpoint(folder: Path) -> bool:
    """Whether Orbax has finished a checkpoint there."""
    return (folder / "_CHECKPOINT_METADATA").is_file()


def save(folder: Path, params: PyTree[Any]) -> None:
    """Writes nested dicts of arrays into a new folder."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), params)


def restore(folder: Path, abstract: PyTree[Any]) -> PyTree[jax.Array]:
    """Reads arrays of the shapes, dtypes and shardings of `abstract`, a tree of `jax.ShapeDtypeStruct`.

    Raises:
      UserError: a checkpoint that is damaged, or of other parameters.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            return checkpointer.restore(folder.absolute(), abstract)
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"{folder}: does not restore ({reason}); convert the model again") from error


def stored(folder: Path) -> PyTree[Any]:
    """What a checkpoint holds: shapes and dtypes in place of arrays."""
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(folder.absolute())
    return getattr(metadata, "item_metadata", metadata)
