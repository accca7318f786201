"""A part's arrays as an Orbax checkpoint: our own layout, which restores directly into shards without transposing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jaxtyping import PyTree, Shaped

from vpae_jax.files import refused_writes
from vpae_jax.types import UserError
from vpae_jax.weights.safetensors_file import one_line, parse_json

# Given a parameter's path, an index into it and the values there, returns the values with something added.
Merge = Callable[[str, tuple[slice, ...], Shaped[np.ndarray, "..."]], Shaped[np.ndarray, "..."]]
# Exceptions for damaged checkpoints, found by damaging every file of one; base classes of those observed.
_ERRORS = (
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,  # also RecursionError
    TypeError,
    ValueError,  # tensorstore's; also those of JSON and of text
)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a finished Orbax checkpoint."""
    return (folder / "_CHECKPOINT_METADATA").is_file()


def save(folder: Path, params: PyTree[Any]) -> None:
    """Writes nested dicts of arrays into a new folder. Raises `UserError` if writing fails."""
    with refused_writes(folder), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), params)


def restore(folder: Path, abstract: PyTree[Any], merge: Merge | None = None) -> PyTree[jax.Array]:
    """Reads arrays with the shapes, dtypes and shardings of `abstract`, a tree of `jax.ShapeDtypeStruct`. `merge` is
    applied to the values before they are rounded to these dtypes.

    It reads with tensorstore, as Orbax does, but not through Orbax, whose errors have no type of their own. Every
    process reads its own shards, one at a time.

    Raises:
      UserError: a checkpoint that is damaged, or has other parameters.
    """
    try:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: _restore_one(folder, [key.key for key in path], leaf, merge), abstract
        )
    except _ERRORS as error:
        raise _damaged(folder, error) from error


def stored(folder: Path) -> PyTree[Any]:
    """The shapes and dtypes of a checkpoint's arrays. Raises `UserError` if it is damaged."""
    tree: dict[str, Any] = {}
    try:
        for entry in parse_json((folder / "_METADATA").read_bytes())["tree_metadata"].values():
            *parents, last = keys = [key["key"] for key in entry["key_metadata"]]
            array, inner = _open(folder, keys), tree
            for name in parents:
                inner = inner.setdefault(name, {})
            inner[last] = jax.ShapeDtypeStruct(array.shape, array.dtype.numpy_dtype)
    except _ERRORS as error:
        raise _damaged(folder, error) from error
    return tree


def _open(folder: Path, keys: Sequence[str]) -> tensorstore.TensorStore:
    """Opens one array of a checkpoint as written by `save`: zarr in an OCDBT store, under the keys joined by dots."""
    base = {"driver": "file", "path": f"{folder.absolute()}/"}
    store = {"driver": "ocdbt", "base": base, "path": f"{'.'.join(keys)}/"}
    # Missing chunks would otherwise be read as zeros.
    spec = {"driver": "zarr", "kvstore": store, "fill_missing_data_reads": False}
    return tensorstore.open(tensorstore.Spec(spec), open=True, read=True).result()


def _restore_one(folder: Path, keys: Sequence[str], leaf: jax.ShapeDtypeStruct, merge: Merge | None) -> jax.Array:
    array = _open(folder, keys)
    if array.shape != leaf.shape:
        raise ValueError(f"{'/'.join(keys)} has shape {list(array.shape)}, expected {list(leaf.shape)}")

    def read(index: tuple[slice, ...] | None) -> Shaped[np.ndarray, "..."]:
        value = np.asarray(array[index or ...].read().result())
        value = value if merge is None else merge("/".join(keys), index or (), value)
        return value.astype(leaf.dtype, copy=False)

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, read, dtype=leaf.dtype)


def _damaged(folder: Path, error: Exception) -> UserError:
    reason = one_line(str(error)) or type(error).__name__
    return UserError(f"{folder}: cannot be restored ({reason}); convert the model again")
