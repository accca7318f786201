"""Model directories in the Diffusers layout, read and written part by part.

    model_index.json  transformer/  vae/  text_encoder/  tokenizer/  scheduler/  [image_encoder/  image_processor/]

Each part with weights holds `config.json` and safetensors, in one file or in shards. What is written here is read by
`from_pretrained` of diffusers and transformers; see `parts.py` for the classes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import PyTree

from vpae_jax.convert import table
from vpae_jax.convert.files import SHARD_BYTES, Tensors, open_tensors, write_json, write_tensors
from vpae_jax.convert.parts import PARTS, Part, config_json, read_config
from vpae_jax.types import UserError

# A tree of weights, on devices or still on the host.
Weights = PyTree[jax.Array | np.ndarray]
# Given a parameter's path and its values on the host, the array on its devices (or still on the host).
Place = Callable[[str, np.ndarray], jax.Array | np.ndarray]


def read_part(
    folder: Path, part: str, dtype: DTypeLike | None = jnp.float32, place: Place | None = None
) -> tuple[Any, Weights]:
    """One part's config and weights.

    Args:
      folder: the model directory.
      part: the sub-folder's name, a key of `PARTS`.
      dtype: dtype of the weights returned, whatever the file's; None keeps the file's.
      place: puts a parameter on its devices; the default device if None. Parameters are read one after the other, so
        that the host holds one at a time.

    Returns:
      the config dataclass, and nested dicts of arrays as `nnx.to_pure_dict` gives them.

    Raises:
      UserError: a missing or unreadable file, an unsupported config, a tensor that is missing, unknown, misshapen or
        there twice.
    """
    config, _, state = _read(folder, part, dtype, place)
    return config, nnx.to_pure_dict(state)


def load_part(folder: Path, part: str, dtype: DTypeLike = jnp.float32, place: Place | None = None) -> Any:
    """One part as a model whose weights and compute dtype are `dtype`. Arguments and errors as `read_part`."""
    _, graph, state = _read(folder, part, dtype, place)
    return nnx.merge(graph, state)


def build(part: str, config: Any, params: Weights, dtype: DTypeLike = jnp.float32) -> Any:
    """A part's model from weights, without ever allocating random ones.

    Args:
      part: a key of `PARTS`.
      config: the part's config dataclass.
      params: nested dicts of arrays, as `nnx.to_pure_dict` gives them.
      dtype: compute dtype; the weights keep theirs.
    """
    graph, state = _abstract(part, config, dtype)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def _abstract(part: str, config: Any, dtype: DTypeLike) -> tuple[nnx.GraphDef, nnx.State]:
    """The part's graph, and shapes in place of weights."""
    kind = PARTS[part].model
    model = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype))
    return nnx.split(model, nnx.Param)


def _read(folder: Path, part: str, dtype: DTypeLike | None, place: Place | None) -> tuple[Any, nnx.GraphDef, nnx.State]:
    """Config, graph and weights of a part."""
    spec, path = PARTS[part], folder / part
    if not path.is_dir():
        raise UserError(f"{folder}: no {part}/ folder; expected a model directory in the Diffusers layout")
    config = read_config(path / "config.json", spec)
    graph, state = _abstract(part, config, jnp.float32 if dtype is None else dtype)
    variables = {_path(keys): variable for keys, variable in nnx.to_flat_state(state)}
    entries = table.plan(spec.rows, {name: variable.shape for name, variable in variables.items()})
    stored = None if dtype is None else np.dtype(dtype)
    with open_tensors(path, spec.stem) as tensors:
        names = _canonical(tensors, spec)
        shapes = {name: tensors.shapes[theirs] for name, theirs in names.items()}
        where = {name: tensors.where[theirs] for name, theirs in names.items()}
        table.check(entries, shapes, where, str(path))
        for entry in entries:
            value = table.gather(entry, lambda name: tensors[names[name]], stored)
            variables[entry.path].set_value(jnp.asarray(value) if place is None else place(entry.path, value))
    return config, graph, state


def write_part(
    folder: Path,
    part: str,
    config: Any,
    params: Weights,
    dtype: DTypeLike | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes one part's config.json and safetensors; the folder appears whole or not at all.

    Args:
      folder: the model directory; made if it is not there.
      part: the sub-folder's name; an existing one is replaced.
      config: the part's config dataclass.
      params: nested dicts of arrays, or an `nnx.State`.
      dtype: dtype to store; None keeps the weights' own.
      shard_bytes: largest size of one safetensors file.
    """
    spec = PARTS[part]
    values = {_path(keys): value for keys, value in nnx.to_flat_state(_state(params))}
    entries = table.plan(spec.rows, {name: tuple(value.shape) for name, value in values.items()})
    dtypes = {name: np.dtype(value.dtype if dtype is None else dtype) for name, value in values.items()}
    sizes = {name: int(np.prod(entry.shape)) * dtypes[entry.path].itemsize for entry in entries for name in entry.names}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for entry in entries:
            yield from table.scatter(entry, np.asarray(values[entry.path]).astype(dtypes[entry.path]))

    with replacing(folder / part) as temporary:
        temporary.mkdir(parents=True)
        write_json(temporary / "config.json", config_json(config, spec))
        write_tensors(temporary, spec.stem, sizes, tensors(), shard_bytes)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it on success; removed on any failure, with `path` as before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        yield temporary
        if path.is_dir():
            path.rename(old)
        temporary.rename(path)
    finally:
        if old.is_dir() and not path.exists():
            old.rename(path)
        for leftover in (temporary, old):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)


def _canonical(tensors: Tensors, part: Part) -> dict[str, str]:
    """Table names of the tensors in the file, and the names that they have there."""
    names: dict[str, str] = {}
    for theirs in tensors.shapes:
        name = theirs if theirs.startswith(part.prefix) else part.prefix + theirs
        if name.endswith(part.unused):
            continue
        if name in names:
            raise UserError(f"{tensors.where[theirs]}: tensors {names[name]!r} and {theirs!r} are the same; remove one")
        names[name] = theirs
    for alias, name in part.aliases.items():
        if alias in names:
            theirs = names.pop(alias)
            if name not in names:
                names[name] = theirs
            elif not np.array_equal(tensors[theirs], tensors[names[name]]):
                raise UserError(
                    f"{tensors.where[theirs]}: tensor {theirs!r} differs from {name!r}, which it should repeat"
                )
    return names


def _path(keys: Any) -> str:
    return "/".join(str(key) for key in keys)


def _state(params: Weights) -> Any:
    return params if isinstance(params, nnx.State) else nnx.State(params)
