"""Loads weights from files into device memory, one parameter at a time; each process reads what its own devices hold.

Threads read a parameter's tensors in blocks of the file, and copy each block into the shards that overlap it, in our
layout and dtype; then the shards are handed to JAX. So apart from the result, the host holds one parameter, whatever
the size of the model. A process reads whole rows of the files even if its shards cover only some of their columns; a
model converted to the orbax layout is read by shards (`orbax.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike
from tqdm import tqdm

from vpae_jax.types import HostArray
from vpae_jax.weights.directory import PartTensors
from vpae_jax.weights.matching import Parameter
from vpae_jax.weights.names import Index, Shape

THREADS = 4
CHUNK_BYTES = 4 * 2**20

Bounds = tuple[tuple[int, int], ...]  # start and stop of an index along each axis
# Given a parameter's path and shape, returns its sharding.
Placement = Callable[[str, Shape], Sharding]
# Given a parameter's path, a layer, an index into it and the values there, returns the values with something added
# (`merging.py`).
Merge = Callable[[str, int, Index, HostArray], HostArray]


def load(
    tensors: PartTensors,
    dtype: DTypeLike | None,
    placement: Placement | None,
    label: str,
    merge: Merge | None = None,
) -> dict[str, jax.Array]:
    """Loads every parameter of a part onto its devices.

    Args:
      tensors: an open part.
      dtype: of the result; None keeps the tensors' own (the widest, if layers differ).
      placement: the sharding of each parameter; None for the default device, without committing the result to it.
      label: of the progress bar, which is shown on terminals.
      merge: applied to values before they are rounded to `dtype`.

    Returns:
      The parameters, by path.

    Raises:
      UserError: a tensor that cannot be read, or holds NaN or infinity.
    """
    total = sum(tensors.stored(name).nbytes for parameter in tensors.parameters for name in parameter.names)
    bar = tqdm(total=total, desc=f"reading {label}", unit="B", unit_scale=True, leave=False, disable=None)
    result: dict[str, jax.Array] = {}
    with bar, ThreadPoolExecutor(THREADS) as pool:
        for parameter in tensors.parameters:
            shape, kind = parameter.full_shape, _dtype(tensors, parameter, dtype)
            sharding = None if placement is None else placement(parameter.path, shape)
            indices = [()] if sharding is None else sharding.addressable_devices_indices_map(shape).values()
            bounds = {_bounds(index, shape) for index in indices}
            shards = {one: np.empty([stop - start for start, stop in one], kind) for one in bounds}
            for size in pool.map(partial(_fill, tensors, parameter, shards, merge), _chunks(tensors, parameter)):
                bar.update(size)
            result[parameter.path] = _array(shape, sharding, shards)
    return result


def read(tensors: PartTensors, parameter: Parameter, dtype: DTypeLike) -> HostArray:
    """Reads one whole parameter of an open part onto the host. Raises `UserError` as `load`."""
    bounds = _bounds((), parameter.full_shape)
    shards = {bounds: np.empty(parameter.full_shape, dtype)}
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(partial(_fill, tensors, parameter, shards, None), _chunks(tensors, parameter)):
            pass
    return shards[bounds]


def widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The dtype of a parameter whose layers have these dtypes, which can represent all of their values."""
    kinds = set(dtypes)
    most = max(kind.itemsize for kind in kinds)
    wide = {kind for kind in kinds if kind.itemsize == most}
    return wide.pop() if len(wide) == 1 else np.dtype(np.float32)


def _dtype(tensors: PartTensors, parameter: Parameter, dtype: DTypeLike | None) -> np.dtype:
    kind = widest(tensors.stored(name).dtype for name in parameter.names) if dtype is None else dtype
    return jax.dtypes.canonicalize_dtype(kind)


def _chunks(tensors: PartTensors, parameter: Parameter) -> Iterator[tuple[int, Index]]:
    """Layers, and indices into them, that are contiguous bytes of the file."""
    whole = [slice(0, size) for size in parameter.shape]
    axis = len(parameter.shape) - 1 if parameter.op.kernel else 0  # the file's slowest-varying axis
    rows = parameter.shape[axis]
    for layer, name in enumerate(parameter.names):
        size = math.prod(parameter.shape) * tensors.stored(name).dtype.itemsize
        step = max(1, min(rows, rows * CHUNK_BYTES // size))
        for start in range(0, rows, step):
            yield layer, (*whole[:axis], slice(start, min(start + step, rows)), *whole[axis + 1 :])


def _fill(
    tensors: PartTensors,
    parameter: Parameter,
    shards: Mapping[Bounds, HostArray],
    merge: Merge | None,
    chunk: tuple[int, Index],
) -> int:
    """Copies a chunk into every shard that overlaps it; returns its size in the file in bytes."""
    (layer, index), op = chunk, parameter.op
    name, bounds = parameter.names[layer], _bounds(index, parameter.shape)
    if parameter.stacked:
        bounds = ((layer, layer + 1), *bounds)
    if wanted := {shard: common for shard in shards if (common := _common(shard, bounds))}:
        value = op.to_ours(tensors.read(name, op.their_index(parameter.shape, index)))
        value = value if merge is None else merge(parameter.path, layer, index, value)
        value = value[None] if parameter.stacked else value
        for shard, common in wanted.items():
            with np.errstate(over="ignore", invalid="ignore"):
                shards[shard][_within(common, shard)] = value[_within(common, bounds)]
    return math.prod(stop - start for start, stop in bounds) * tensors.stored(name).dtype.itemsize


def _array(shape: Shape, sharding: Sharding | None, shards: Mapping[Bounds, HostArray]) -> jax.Array:
    if sharding is None:
        (array,) = map(jax.device_put, shards.values())
    else:
        array = jax.make_array_from_callback(shape, sharding, lambda index: shards[_bounds(index, shape)])
    return array.block_until_ready()  # so that host memory is free again before more is read


def _bounds(index: Index | None, shape: Shape) -> Bounds:
    """Start and stop of an index along each axis."""
    full = (*(index or ()), *[slice(None)] * (len(shape) - len(index or ())))
    return tuple((s.indices(n)[0], s.indices(n)[1]) for s, n in zip(full, shape, strict=True))


def _common(one: Bounds, other: Bounds) -> Bounds | None:
    """The intersection of two bounds; None if they do not overlap."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return both if all(start < stop for start, stop in both) else None


def _within(bounds: Bounds, outer: Bounds) -> Index:
    """`bounds` as an index into an array that covers `outer`."""
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(bounds, outer, strict=True))
