"""Loads a model's parts, as trees of weights or as models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike
from jaxtyping import PyTree

from vpae_jax.types import HostArray, UserError
from vpae_jax.weights import matching, orbax, stream
from vpae_jax.weights.directory import ModelDirectory, StoredPart
from vpae_jax.weights.find import find_model
from vpae_jax.weights.names import Index
from vpae_jax.weights.parts import PARTS, abstract, flat
from vpae_jax.weights.stream import Merge, Placement

# A tree of weights, on devices or still on the host.
Weights = PyTree[jax.Array | np.ndarray]


def read_part(
    model: ModelDirectory | Path,
    part: str,
    dtype: DTypeLike | None = jnp.float32,
    placement: Placement | None = None,
    merge: Merge | None = None,
) -> tuple[Any, Weights]:
    """Reads one part's config and weights.

    Args:
      model: the model, or its path.
      part: a key of `parts.PARTS`.
      dtype: dtype of the returned weights, whatever the file's; None keeps the file's.
      placement: the sharding of each parameter; None for the default device.
      merge: what to add to weights before they are rounded to `dtype` (`merging.open_merging`).

    Returns:
      The config dataclass, and nested dicts of arrays like those of `nnx.to_pure_dict`.

    Raises:
      UserError: a missing or unreadable file, an unsupported config, a tensor that is missing, unknown, duplicated, of
        the wrong shape, or not finite.
    """
    source = _source(model, part)
    _, state = _read(source, dtype, placement, merge)
    return source.config, nnx.to_pure_dict(state)


def load_part(
    model: ModelDirectory | Path,
    part: str,
    dtype: DTypeLike = jnp.float32,
    placement: Placement | None = None,
    merge: Merge | None = None,
) -> Any:
    """Loads one part as a model with weights and compute dtype `dtype`. Arguments and errors as for `read_part`."""
    return nnx.merge(*_read(_source(model, part), dtype, placement, merge))


def left_part(model: ModelDirectory, part: str, dtype: DTypeLike, placement: Placement | None = None) -> Any:
    """The same model with shapes in place of weights, which are not read."""
    del placement
    return nnx.merge(*abstract(part, model.part(part).config, dtype))


@contextmanager
def open_parameters(model: ModelDirectory, part: str, dtype: DTypeLike) -> Iterator[Callable[[str], HostArray]]:
    """A function that reads a single whole parameter of a part onto the host, by its path: for callers that inspect all
    parameters and need none in device memory. Errors as for `read_part`."""
    source = model.part(part)
    if source.layout == "orbax":
        place = SingleDeviceSharding(jax.local_devices()[0])
        kept = flat(orbax.stored(source.files[0]))

        def restored(path: str) -> HostArray:
            tree: Any = jax.ShapeDtypeStruct(kept[path].shape, dtype, sharding=place)
            for name in reversed(path.split("/")):
                tree = {name: tree}
            return np.asarray(jax.tree.leaves(orbax.restore(source.files[0], tree))[0])

        yield restored
        return
    with source.open() as tensors:
        parameters = {parameter.path: parameter for parameter in tensors.parameters}
        yield lambda path: stream.read(tensors, parameters[path], dtype)


def build(part: str, config: Any, params: Weights, dtype: DTypeLike = jnp.float32) -> Any:
    """Builds a part's model from weights, without allocating random ones first.

    Args:
      part: a key of `parts.PARTS`.
      config: the part's config dataclass.
      params: nested dicts of arrays, like those of `nnx.to_pure_dict`.
      dtype: compute dtype; the weights keep theirs.
    """
    graph, state = abstract(part, config, dtype)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def _source(model: ModelDirectory | Path, part: str) -> StoredPart:
    return find_model(model).part(part)


def _read(
    source: StoredPart, dtype: DTypeLike | None, placement: Placement | None, merge: Merge | None = None
) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph and weights of a part."""
    graph, state = abstract(source.part, source.config, jnp.float32 if dtype is None else dtype)
    if source.layout == "orbax":
        loaded = flat(_restore(source, state, dtype, placement, merge))
    else:
        with source.open() as tensors:
            loaded = stream.load(tensors, dtype, placement, source.part, merge)
    for path, variable in flat(state).items():
        variable.set_value(loaded[path])
    return graph, state


def _restore(
    source: StoredPart, state: nnx.State, dtype: DTypeLike | None, placement: Placement | None, merge: Merge | None
) -> Weights:
    """Restores the arrays of a part in the orbax layout."""
    kept = orbax.stored(source.files[0])
    shapes = {path: (leaf.shape, np.dtype(dtype or leaf.dtype)) for path, leaf in flat(kept).items()}
    wanted = {path: variable.shape for path, variable in flat(state).items()}
    if wrong := sorted({path for path in {*shapes, *wanted} if shapes.get(path, (None,))[0] != wanted.get(path)}):
        raise UserError(
            f"{source.files[0]}: parameter {wrong[0]} has shape {shapes.get(wrong[0], (None,))[0]}, expected "
            f"{wanted.get(wrong[0])}; does config.json belong to these weights?"
        )
    default = SingleDeviceSharding(jax.local_devices()[0])

    def one(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        name = "/".join(str(key.key) for key in path)
        shape, kind = shapes[name]
        sharding: Sharding = default if placement is None else placement(name, shape)
        return jax.ShapeDtypeStruct(shape, kind, sharding=sharding)

    by_layer = None if merge is None else partial(_merge_layers, source, merge)
    restored = orbax.restore(source.files[0], jax.tree_util.tree_map_with_path(one, kept), by_layer)
    if placement is None:  # Orbax binds arrays to a device; those read from files are not bound
        return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), restored)
    return restored


def _merge_layers(source: StoredPart, merge: Merge, path: str, index: Index, value: HostArray) -> HostArray:
    """Applies `merge` to a slice of a parameter that may span several layers."""
    if "{i}" not in matching.template(PARTS[source.part].rows(source.config), path, "diffusers")[0]:
        return merge(path, 0, index, value)
    first, inner = index[0].start or 0 if index else 0, index[1:]
    return np.stack([merge(path, first + i, inner, layer) for i, layer in enumerate(value)])
