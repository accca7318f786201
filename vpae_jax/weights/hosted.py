"""From files into the memory of processors: threads write every value where it stays, and JAX takes that memory.

Going through devices, as `stream.py` does, would compile, and copy every value twice more: five times slower. Beside
the arrays, the host holds `CHUNK_BYTES` of the file in each of `THREADS`, and the same again where the dtype changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike
from tqdm import tqdm

from vpae_jax.types import HostArray
from vpae_jax.weights.directory import PartTensors
from vpae_jax.weights.matching import Parameter
from vpae_jax.weights.names import Index, Shape
from vpae_jax.weights.stream import THREADS, Bounds, Placement, bounds_of, check_finite, dtype_of, sharding_of
from vpae_jax.weights.tensors import finite

CHUNK_BYTES = 4 * 2**20
COLUMNS = 32  # that are turned at once: as many cache lines as a processor holds near
ALIGNMENT = 64  # of memory that XLA takes as it is


@dataclass(frozen=True)
class Target:
    """A parameter in the making.

    Attributes:
      parameter: the parameter.
      sharding: where it lies; None for the default device, to which it is not bound.
      shards: memory of its distinct shards, by where they are in it.
    """

    parameter: Parameter
    sharding: Sharding | None
    shards: Mapping[Bounds, HostArray]

    def finished(self) -> jax.Array:
        """The array that this memory is from now on."""
        shape = self.parameter.full_shape
        if self.sharding is None:
            (shard,) = self.shards.values()
            return jax.device_put(shard)
        places = self.sharding.devices_indices_map(shape).items()
        arrays = [jax.device_put(self.shards[bounds_of(index or (), shape)], device) for device, index in places]
        return jax.make_array_from_single_device_arrays(shape, self.sharding, arrays)


def holds(tensors: PartTensors, placement: Placement | None) -> bool:
    """Whether every parameter is to lie in this process's own memory."""
    if placement is None:
        return all(device.platform == "cpu" for device in jax.device_put(np.zeros(())).devices())
    shardings = {placement(parameter.path, parameter.full_shape) for parameter in tensors.parameters}
    return all(s.is_fully_addressable and all(d.platform == "cpu" for d in s.device_set) for s in shardings)


def load(
    tensors: PartTensors, dtype: DTypeLike | None, placement: Placement | None, label: str
) -> dict[str, jax.Array]:
    """Every parameter of a part. Arguments and errors as `stream.load`."""
    targets = [_target(tensors, parameter, dtype, placement) for parameter in tensors.parameters]
    chunks = [(target, layer, index) for target in targets for layer, index in _chunks(tensors, target.parameter)]
    total = sum(tensors.stored(name).nbytes for target in targets for name in target.parameter.names)
    bar = tqdm(total=total, desc=f"reading {label}", unit="B", unit_scale=True, leave=False, disable=None)
    ok = {name: True for target in targets for name in target.parameter.names}
    with bar, ThreadPoolExecutor(THREADS) as pool:
        filled = pool.map(lambda chunk: _fill(tensors, *chunk), chunks)
        for (target, layer, _), (size, good) in zip(chunks, filled, strict=True):
            ok[target.parameter.names[layer]] &= good
            bar.update(size)
    check_finite(tensors, ok.items())
    return {target.parameter.path: target.finished() for target in targets}


def _target(tensors: PartTensors, parameter: Parameter, dtype: DTypeLike | None, placement: Placement | None) -> Target:
    kind, shape, sharding = dtype_of(tensors, parameter, dtype), parameter.full_shape, sharding_of(parameter, placement)
    indices = [()] if sharding is None else sharding.devices_indices_map(shape).values()
    keys = {bounds_of(index or (), shape) for index in indices}
    return Target(parameter, sharding, {key: _empty(tuple(stop - start for start, stop in key), kind) for key in keys})


def _chunks(tensors: PartTensors, parameter: Parameter) -> Iterator[tuple[int, Index]]:
    """Layers and indices into them that are runs of bytes of the file."""
    whole = [slice(0, size) for size in parameter.shape]
    axis = len(parameter.shape) - 1 if parameter.op.kernel else 0  # the file's slowest
    rows = parameter.shape[axis]
    for layer, name in enumerate(parameter.names):
        size = math.prod(parameter.shape) * tensors.stored(name).dtype.itemsize
        step = max(1, min(rows, rows * CHUNK_BYTES // size))
        for start in range(0, rows, step):
            yield layer, (*whole[:axis], slice(start, min(start + step, rows)), *whole[axis + 1 :])


def _fill(tensors: PartTensors, target: Target, layer: int, index: Index) -> tuple[int, bool]:
    """Writes a chunk into every shard that has some of it; returns its bytes, and whether it is finite."""
    parameter = target.parameter
    read = tensors.read(parameter.names[layer], parameter.op.their_index(parameter.shape, index))
    kind = next(iter(target.shards.values())).dtype
    with np.errstate(over="ignore", invalid="ignore"):
        value = parameter.op.to_ours(read.astype(kind, copy=False)).view(f"u{kind.itemsize}")
    for key, memory in target.shards.items():
        shard = (memory[layer] if parameter.stacked else memory).view(value.dtype)
        ranges = key[1:] if parameter.stacked else key
        common = [
            (max(start, wanted.start), min(stop, wanted.stop))
            for (start, stop), wanted in zip(ranges, index, strict=True)
        ]
        if all(start < stop for start, stop in common):
            at = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, ranges, strict=True))
            of = tuple(slice(a - wanted.start, b - wanted.start) for (a, b), wanted in zip(common, index, strict=True))
            _copy(shard[at], value[of])
    return read.nbytes, finite(read)


def _copy(target: HostArray, source: HostArray) -> None:
    """Copies; a turned array some columns at a time, which is three times faster."""
    step = COLUMNS if target.ndim > 1 and source.strides[-1] != source.itemsize else target.shape[-1]
    for start in range(0, target.shape[-1], step):
        target[..., start : start + step] = source[..., start : start + step]


def _empty(shape: Shape, dtype: np.dtype) -> HostArray:
    """Memory that nobody has written to, aligned."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
