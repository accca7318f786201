"""From files straight into shards: each process reads the bytes of its own, a layer at a time.

The destination lies on the devices from the start. One layer of one parameter after the other is read (several at
once, in threads; large tables in blocks of rows), turned into our layout, cast and written into its place there, so
that the host holds no more than `AHEAD_BYTES` and a piece beside it, whatever the size of the model. Where the devices
are this process's own processors, `hosted.py` does the same without them, several times faster.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt
from tqdm import tqdm

from vpae_jax.types import HostArray, UserError
from vpae_jax.weights.directory import PartTensors
from vpae_jax.weights.matching import Parameter
from vpae_jax.weights.names import Index, Shape

THREADS = 4
AHEAD_BYTES = 256 * 2**20
BLOCK_BYTES = 128 * 2**20

Bounds = tuple[tuple[int, int], ...]  # where an index begins and ends along each axis
Callback = Callable[[Index | None], HostArray]
# Given a parameter's path and shape, its sharding.
Placement = Callable[[str, Shape], Sharding]


@dataclass(frozen=True)
class Piece:
    """What is read at once: a layer of a stacked parameter, or some rows of another.

    Attributes:
      parameter: the parameter.
      layer: number of the tensor among the parameter's.
      start: where the piece begins along the parameter's first axis.
      shape: of the piece, without a layer axis.
      padded: its shape as the devices are given it, which they can divide; the numbers beyond `shape` are zeros.
      sharding: of the padded piece; None for the default device, to which the result is not bound.
      whole: sharding of the parameter; None likewise.
    """

    parameter: Parameter
    layer: int
    start: int
    shape: Shape
    padded: Shape
    sharding: Sharding | None
    whole: Sharding | None

    def rows(self, index: Index) -> Index:
        """An index of the piece as one of the tensor."""
        first, *rest = (slice(*s.indices(n)[:2]) for s, n in zip(index, self.shape, strict=True))
        offset = 0 if self.parameter.stacked else self.start
        return (slice(first.start + offset, first.stop + offset), *rest)


def load(
    tensors: PartTensors, dtype: DTypeLike | None, placement: Placement | None, label: str
) -> dict[str, jax.Array]:
    """Every parameter of a part, on its devices.

    Args:
      tensors: an open part.
      dtype: of the result; None keeps the tensors' own (the widest, where layers differ).
      placement: where each parameter lies; None for the default device. No layer axis may be sharded.
      label: of the progress bar, which is shown on terminals.

    Raises:
      UserError: a tensor that cannot be read, or holds NaN or infinity.
    """
    result: dict[str, jax.Array] = {}
    finite: list[tuple[str, jax.Array]] = []
    pieces = [piece for parameter in tensors.parameters for piece in _pieces(tensors, parameter, placement)]
    total = sum(_bytes(tensors, piece) for piece in pieces)
    bar = tqdm(total=total, desc=f"reading {label}", unit="B", unit_scale=True, leave=False, disable=None)
    with bar, ThreadPoolExecutor(THREADS) as pool:
        for piece, values in _ahead(pool, tensors, pieces):
            parameter = piece.parameter
            if parameter.path not in result:
                result[parameter.path] = _zeros(piece.whole)(parameter.full_shape, dtype_of(tensors, parameter, dtype))
            if piece.sharding is None:
                value = jax.device_put(values(None))
            else:
                value = jax.make_array_from_callback(piece.padded, piece.sharding, values)
            put = _put(piece.whole, parameter.stacked, piece.shape)
            result[parameter.path], ok = put(result[parameter.path], value, piece.start)
            # The host's memory is free again; and processes exchange one piece at a time, or would wait for each other.
            ok.block_until_ready()
            finite.append((parameter.names[piece.layer], ok))
            bar.update(_bytes(tensors, piece))
    check_finite(tensors, finite)
    return result


def sharding_of(parameter: Parameter, placement: Placement | None) -> Sharding | None:
    """Where a parameter lies; None for the default device. Raises `ValueError` when its layer axis is sharded."""
    sharding = None if placement is None else placement(parameter.path, parameter.full_shape)
    if parameter.stacked and isinstance(sharding, NamedSharding) and sharding.spec and sharding.spec[0] is not None:
        raise ValueError(
            f"{parameter.path}: the layer axis is sharded over {sharding.spec[0]!r}; layers are read one by one"
        )
    return sharding


def dtype_of(tensors: PartTensors, parameter: Parameter, dtype: DTypeLike | None) -> np.dtype:
    """The dtype of a parameter: the one asked for, or the widest of its layers'."""
    kind = widest(tensors.stored(name).dtype for name in parameter.names) if dtype is None else dtype
    return jax.dtypes.canonicalize_dtype(kind)


def _pieces(tensors: PartTensors, parameter: Parameter, placement: Placement | None) -> Iterator[Piece]:
    """An parameter in pieces: its layers, or blocks of rows if it is one large table."""
    whole = sharding_of(parameter, placement)
    spec = tuple(whole.spec) if isinstance(whole, NamedSharding) else ()
    if parameter.stacked:
        one = NamedSharding(whole.mesh, PartitionSpec(*spec[1:])) if isinstance(whole, NamedSharding) else whole
        padded, sharding = _contiguous(parameter, parameter.shape, one)
        for layer in range(len(parameter.names)):
            yield Piece(parameter, layer, layer, parameter.shape, padded, sharding, whole)
        return
    rows = parameter.shape[0]
    divisible = len(parameter.shape) > 1 and not parameter.op.kernel and (not spec or spec[0] is None)
    size = int(np.prod(parameter.shape)) * tensors.stored(parameter.names[0]).dtype.itemsize
    step = max(1, rows * BLOCK_BYTES // size) if divisible and size > BLOCK_BYTES else rows
    for start in range(0, rows, step):
        shape = (min(step, rows - start), *parameter.shape[1:])
        yield Piece(parameter, 0, start, shape, *_contiguous(parameter, shape, whole), whole)


def _contiguous(parameter: Parameter, shape: Shape, sharding: Sharding | None) -> tuple[Shape, Sharding | None]:
    """How a piece is read: each of several processes takes an equal run of bytes, and the devices exchange the rest.

    The shards themselves may be narrow columns of the file, or copies; so read, no byte leaves the disk twice.

    Returns:
      the piece's shape, padded to what the devices can divide, and its sharding.
    """
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_addressable:
        return shape, sharding
    axis = len(shape) - 1 if parameter.op.kernel else 0  # the file's slowest
    spec: list[Any] = [None] * len(shape)
    spec[axis] = sharding.mesh.axis_names
    each = -(-shape[axis] // sharding.mesh.size)
    padded = (*shape[:axis], each * sharding.mesh.size, *shape[axis + 1 :])
    return padded, NamedSharding(sharding.mesh, PartitionSpec(*spec))


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
    name, op, shape = piece.parameter.names[piece.layer], piece.parameter.op, piece.parameter.shape

    def read(bounds: Bounds) -> HostArray:
        within = [(min(start, n), min(stop, n)) for (start, stop), n in zip(bounds, piece.shape, strict=True)]
        if not _size(within):
            return np.zeros([stop - start for start, stop in bounds], tensors.stored(name).dtype)
        value = op.to_ours(tensors.read(name, op.their_index(shape, piece.rows(tuple(slice(*w) for w in within)))))
        beyond = [(0, stop - end) for (_, stop), (_, end) in zip(bounds, within, strict=True)]
        return np.pad(value, beyond) if any(end for _, end in beyond) else value

    everything = bounds_of((), piece.padded)
    devices: Mapping[Any, Index | None] = {None: ()}
    if piece.sharding is not None:
        devices = piece.sharding.addressable_devices_indices_map(piece.padded)
    wanted = {bounds_of(index or (), piece.padded) for index in devices.values()}
    if sum(map(_size, wanted)) >= _size(everything):  # this process holds all of it
        whole = read(everything)
        return lambda index: whole[index or ...]
    values = {key: read(key) for key in wanted}
    return lambda index: values[bounds_of(index or (), piece.padded)]


def bounds_of(index: Index, shape: Shape) -> Bounds:
    """Where an index begins and ends along each axis."""
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
def _put(sharding: Sharding | None, stacked: bool, shape: Shape) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Writes a piece of this shape, which may be padded, into its placement, and says whether it is finite."""

    def put(
        whole: Float[Array, "..."], piece: Float[Array, "..."], start: Int[Array, ""] | int
    ) -> tuple[Float[Array, "..."], Bool[Array, ""]]:
        values = _bits(piece[tuple(map(slice, shape))].astype(whole.dtype))
        placed = jax.lax.dynamic_update_slice_in_dim(_bits(whole), values[None] if stacked else values, start, 0)
        return jax.lax.bitcast_convert_type(placed, whole.dtype), jnp.isfinite(piece.astype(jnp.float32)).all()

    if sharding is None:
        return jax.jit(put, donate_argnums=0)
    flag = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
    return jax.jit(put, donate_argnums=0, out_shardings=(sharding, flag))


def _bits(value: Float[Array, "..."]) -> UInt[Array, "..."]:
    """The same bits as whole numbers: XLA on processors moves bfloat16 as float32, which takes 20 times longer."""
    return jax.lax.bitcast_convert_type(value, f"uint{8 * value.dtype.itemsize}")


def _bytes(tensors: PartTensors, piece: Piece) -> int:
    return math.prod(piece.shape) * tensors.stored(piece.parameter.names[piece.layer]).dtype.itemsize


def widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The dtype of a parameter whose layers have these: it holds all of their values."""
    kinds = set(dtypes)
    most = max(kind.itemsize for kind in kinds)
    wide = {kind for kind in kinds if kind.itemsize == most}
    return wide.pop() if len(wide) == 1 else np.dtype(np.float32)


def check_finite(tensors: PartTensors, finite: Iterable[tuple[str, bool | jax.Array]]) -> None:
    """Raises `UserError` unless all of a part's tensors, given by name, are finite."""
    bad = [name for name, ok in finite if not np.asarray(ok)]
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        name = tensors.names.get(bad[0], bad[0])
        raise UserError(
            f"{tensors.stored(bad[0]).file}: tensor {name!r} holds NaN or infinity{more}; the weights are damaged"
        )
