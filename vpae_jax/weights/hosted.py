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

from vpae_jax.weights.directory import PartTensors
from vpae_jax.weights.entries import Entry
from vpae_jax.weights.names import Index, Shape
from vpae_jax.weights.stream import THREADS, HostArray, Key, Place, check_finite, dtype_of, key_of, sharding_of
from vpae_jax.weights.tensors import finite

CHUNK_BYTES = 4 * 2**20
COLUMNS = 32  # that are turned at once: as many cache lines as a processor holds near
ALIGNMENT = 64  # of memory that XLA takes as it is


@dataclass(frozen=True)
class Target:
    """A parameter in the making.

    Attributes:
      entry: the parameter.
      sharding: where it lies; None for the default device, to which it is not bound.
      shards: memory of its distinct shards, by where they are in it.
    """

    entry: Entry
    sharding: Sharding | None
    shards: Mapping[Key, HostArray]

    def finished(self) -> jax.Array:
        """The array that this memory is from now on."""
        shape = self.entry.full_shape
        if self.sharding is None:
            (shard,) = self.shards.values()
            return jax.device_put(shard)
        places = self.sharding.devices_indices_map(shape).items()
        arrays = [jax.device_put(self.shards[key_of(index or (), shape)], device) for device, index in places]
        return jax.make_array_from_single_device_arrays(shape, self.sharding, arrays)


def holds(tensors: PartTensors, place: Place | None) -> bool:
    """Whether every parameter is to lie in this process's own memory."""
    if place is None:
        return all(device.platform == "cpu" for device in jax.device_put(np.zeros(())).devices())
    shardings = {place(entry.path, entry.full_shape) for entry in tensors.entries}
    return all(s.is_fully_addressable and all(d.platform == "cpu" for d in s.device_set) for s in shardings)


def load(tensors: PartTensors, dtype: DTypeLike | None, place: Place | None, label: str) -> dict[str, jax.Array]:
    """Every parameter of a part. Arguments and errors as `stream.load`."""
    targets = [_target(tensors, entry, dtype, place) for entry in tensors.entries]
    chunks = [(target, layer, index) for target in targets for layer, index in _chunks(tensors, target.entry)]
    total = sum(tensors.stored(name).nbytes for target in targets for name in target.entry.names)
    bar = tqdm(total=total, desc=f"reading {label}", unit="B", unit_scale=True, leave=False, disable=None)
    ok = {name: True for target in targets for name in target.entry.names}
    with bar, ThreadPoolExecutor(THREADS) as pool:
        filled = pool.map(lambda chunk: _fill(tensors, *chunk), chunks)
        for (target, layer, _), (size, good) in zip(chunks, filled, strict=True):
            ok[target.entry.names[layer]] &= good
            bar.update(size)
    check_finite(tensors, ok.items())
    return {target.entry.path: target.finished() for target in targets}


def _target(tensors: PartTensors, entry: Entry, dtype: DTypeLike | None, place: Place | None) -> Target:
    kind, shape, sharding = dtype_of(tensors, entry, dtype), entry.full_shape, sharding_of(entry, place)
    indices = [()] if sharding is None else sharding.devices_indices_map(shape).values()
    keys = {key_of(index or (), shape) for index in indices}
    return Target(entry, sharding, {key: _empty(tuple(stop - start for start, stop in key), kind) for key in keys})


def _chunks(tensors: PartTensors, entry: Entry) -> Iterator[tuple[int, Index]]:
    """Layers and indices into them that are runs of bytes of the file."""
    whole = [slice(0, size) for size in entry.shape]
    axis = len(entry.shape) - 1 if entry.op.kernel else 0  # the file's slowest
    rows = entry.shape[axis]
    for layer, name in enumerate(entry.names):
        size = math.prod(entry.shape) * tensors.stored(name).dtype.itemsize
        step = max(1, min(rows, rows * CHUNK_BYTES // size))
        for start in range(0, rows, step):
            yield layer, (*whole[:axis], slice(start, min(start + step, rows)), *whole[axis + 1 :])


def _fill(tensors: PartTensors, target: Target, layer: int, index: Index) -> tuple[int, bool]:
    """Writes a chunk into every shard that has some of it; returns its bytes, and whether it is finite."""
    entry = target.entry
    read = tensors.read(entry.names[layer], entry.op.their_index(entry.shape, index))
    kind = next(iter(target.shards.values())).dtype
    with np.errstate(over="ignore", invalid="ignore"):
        value = entry.op.to_ours(read.astype(kind, copy=False)).view(f"u{kind.itemsize}")
    for key, memory in target.shards.items():
        shard = (memory[layer] if entry.stacked else memory).view(value.dtype)
        ranges = key[1:] if entry.stacked else key
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
