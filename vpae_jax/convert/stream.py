"""From files straight into shards: each process reads the bytes of its own, a layer at a time.

The destination lies on the devices from the start. One layer of one parameter after the other is read (several at
once, in threads; large tables in blocks of rows), turned into our layout, cast and written into its place there, so
that the host holds no more than `AHEAD_BYTES` and a piece beside it, whatever the size of the model.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped
from tqdm import tqdm

from vpae_jax.convert.entries import Entry
from vpae_jax.convert.source import PartTensors
from vpae_jax.convert.table import Index, Shape
from vpae_jax.types import UserError

THREADS = 4
AHEAD_BYTES = 256 * 2**20
BLOCK_BYTES = 128 * 2**20

HostArray = Shaped[np.ndarray, "..."]
Callback = Callable[[Index | None], HostArray]
# Given a parameter's path and shape, where it lies.
Place = Callable[[str, Shape], Sharding]


@dataclass(frozen=True)
class Piece:
    """What is read at once: a layer of a stacked parameter, or some rows of another.

    Attributes:
      entry: the parameter.
      layer: number of the tensor among the entry's.
      start: where the piece begins along the parameter's first axis.
      shape: of the piece, without a layer axis.
      sharding: of the piece; None for the default device, to which the result is not bound.
      whole: sharding of the parameter; None likewise.
    """

    entry: Entry
    layer: int
    start: int
    shape: Shape
    sharding: Sharding | None
    whole: Sharding | None

    def rows(self, index: Index) -> Index:
        """An index of the piece as one of the tensor."""
        first, *rest = (slice(*s.indices(n)[:2]) for s, n in zip(index, self.shape, strict=True))
        offset = 0 if self.entry.stacked else self.start
        return (slice(first.start + offset, first.stop + offset), *rest)


def load(tensors: PartTensors, dtype: DTypeLike | None, place: Place | None, label: str) -> dict[str, jax.Array]:
    """Every parameter of a part, on its devices.

    Args:
      tensors: an open part.
      dtype: of the result; None keeps the tensors' own (the widest, where layers differ).
      place: where each parameter lies; None for the default device. No layer axis may be sharded.
      label: of the progress bar, which is shown on terminals.

    Raises:
      UserError: a tensor that cannot be read, or holds NaN or infinity.
    """
    result: dict[str, jax.Array] = {}
    finite: list[tuple[str, jax.Array]] = []
    pieces = [piece for entry in tensors.entries for piece in _pieces(tensors, entry, place)]
    total = sum(_bytes(tensors, piece) for piece in pieces)
    bar = tqdm(total=total, desc=f"reading {label}", unit="B", unit_scale=True, leave=False, disable=None)
    with bar, ThreadPoolExecutor(THREADS) as pool:
        for piece, values in _ahead(pool, tensors, pieces):
            entry = piece.entry
            if entry.path not in result:
                kind = widest(tensors.stored(name).dtype for name in entry.names) if dtype is None else dtype
                kind = jax.dtypes.canonicalize_dtype(kind)
                result[entry.path] = _zeros(piece.whole)(entry.full_shape, kind)
            if piece.sharding is None:
                value = jax.device_put(values(None))
            else:
                value = jax.make_array_from_callback(piece.shape, piece.sharding, values)
            result[entry.path], ok = _put(piece.whole, entry.stacked)(result[entry.path], value, piece.start)
            if not ok.is_fully_addressable:
                ok.block_until_ready()  # one exchange between processes at a time: several would wait for each other
            finite.append((entry.names[piece.layer], ok))
            bar.update(_bytes(tensors, piece))
    _check_finite(tensors, finite)
    return result


def _pieces(tensors: PartTensors, entry: Entry, place: Place | None) -> Iterator[Piece]:
    """An entry in pieces: its layers, or blocks of rows if it is one large table."""
    whole = None if place is None else place(entry.path, entry.full_shape)
    spec = tuple(whole.spec) if isinstance(whole, NamedSharding) else ()
    if entry.stacked:
        if spec and spec[0] is not None:
            raise ValueError(f"{entry.path}: the layer axis is sharded over {spec[0]!r}; layers are read one by one")
        one = NamedSharding(whole.mesh, PartitionSpec(*spec[1:])) if isinstance(whole, NamedSharding) else whole
        one = _contiguous(entry, entry.shape, one)
        for layer in range(len(entry.names)):
            yield Piece(entry, layer, layer, entry.shape, one, whole)
        return
    rows = entry.shape[0]
    divisible = len(entry.shape) > 1 and not entry.op.kernel and (not spec or spec[0] is None)
    size = int(np.prod(entry.shape)) * tensors.stored(entry.names[0]).dtype.itemsize
    step = max(1, rows * BLOCK_BYTES // size) if divisible and size > BLOCK_BYTES else rows
    for start in range(0, rows, step):
        shape = (min(step, rows - start), *entry.shape[1:])
        yield Piece(entry, 0, start, shape, _contiguous(entry, shape, whole), whole)


def _contiguous(entry: Entry, shape: Shape, sharding: Sharding | None) -> Sharding | None:
    """How a piece is read: each of several processes takes an equal run of bytes, and the devices exchange the rest.

    The shards themselves may be narrow columns of the file, or copies; so read, no byte leaves the disk twice.
    """
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_addressable:
        return sharding
    axis = len(shape) - 1 if entry.op.kernel else 0  # the file's slowest
    if shape[axis] % sharding.mesh.size:
        return sharding
    spec: list[Any] = [None] * len(shape)
    spec[axis] = sharding.mesh.axis_names
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _ahead(pool: ThreadPoolExecutor, tensors: PartTensors, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Callback]]:
    """Every piece with its values, read in threads while the ones before are used."""
    waiting: deque[tuple[Piece, Future]] = deque()
    held = 0
    for piece in pieces:
        size = _bytes(tensors, piece)
        while waiting and held + size > AHEAD_BYTES:
            done, future = waiting.popleft()
            yield done, future.result()
            held -= _bytes(tensors, done)
        held += size
        waiting.append((piece, pool.submit(_read, tensors, piece)))
    while waiting:
        done, future = waiting.popleft()
        yield done, future.result()


def _read(tensors: PartTensors, piece: Piece) -> Callback:
    """A piece's values for this process's devices, by the index that each of them holds."""
    name, op, shape = piece.entry.names[piece.layer], piece.entry.op, piece.entry.shape

    def read(index: Index) -> HostArray:
        return op.to_ours(tensors.read(name, op.their_index(shape, piece.rows(index))))

    everything = tuple(slice(0, n) for n in piece.shape)
    devices = {None: everything}
    if piece.sharding is not None:
        devices = piece.sharding.addressable_devices_indices_map(piece.shape)
    wanted = {_key(index, piece.shape): index for index in devices.values() if index is not None}
    if sum(_size(key) for key in wanted) >= _size(_key(everything, piece.shape)):  # this process holds all of it
        whole = read(everything)
        return lambda index: whole[index or ...]
    values = {key: read(index) for key, index in wanted.items()}
    return lambda index: values[_key(index or (), piece.shape)]


def _key(index: Index, shape: Shape) -> tuple[tuple[int, int], ...]:
    full = (*index, *[slice(None)] * (len(shape) - len(index)))
    return tuple((s.indices(n)[0], s.indices(n)[1]) for s, n in zip(full, shape, strict=True))


def _size(ranges: Sequence[tuple[int, int]]) -> int:
    return math.prod(stop - start for start, stop in ranges)


@cache
def _zeros(sharding: Sharding | None) -> Callable[[Shape, np.dtype], jax.Array]:
    """Makes a destination; compiled once a shape."""
    options: dict[str, Any] = {} if sharding is None else {"out_shardings": sharding}
    return jax.jit(jnp.zeros, static_argnums=(0, 1), **options)


@cache
def _put(sharding: Sharding | None, stacked: bool) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Writes a piece into its place, and says whether it is finite."""

    def put(
        whole: Float[Array, "..."], piece: Float[Array, "..."], start: Int[Array, ""] | int
    ) -> tuple[Float[Array, "..."], Bool[Array, ""]]:
        values = piece.astype(whole.dtype)
        placed = jax.lax.dynamic_update_slice_in_dim(whole, values[None] if stacked else values, start, 0)
        return placed, jnp.isfinite(piece.astype(jnp.float32)).all()

    if sharding is None:
        return jax.jit(put, donate_argnums=0)
    flag = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
    return jax.jit(put, donate_argnums=0, out_shardings=(sharding, flag))


def _bytes(tensors: PartTensors, piece: Piece) -> int:
    return math.prod(piece.shape) * tensors.stored(piece.entry.names[piece.layer]).dtype.itemsize


def widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The dtype of a parameter whose layers have these: it holds all of their values."""
    kinds = set(dtypes)
    most = max(kind.itemsize for kind in kinds)
    wide = {kind for kind in kinds if kind.itemsize == most}
    return wide.pop() if len(wide) == 1 else np.dtype(np.float32)


def _check_finite(tensors: PartTensors, finite: list[tuple[str, jax.Array]]) -> None:
    bad = [name for name, ok in finite if not np.asarray(ok)]
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        name = tensors.names.get(bad[0], bad[0])
        raise UserError(
            f"{tensors.stored(bad[0]).file}: tensor {name!r} holds NaN or infinity{more}; the weights are damaged"
        )
