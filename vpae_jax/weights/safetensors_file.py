"""One safetensors file: read by byte range, written as its tensors come.

The header is parsed here and not by the safetensors library, because the library maps the whole file. Whatever the
header says is checked before it is believed. Reading is by `pread`, so that memory in use is what was asked for, and a
file that shrinks meanwhile is an error instead of a signal.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from jaxtyping import UInt8

from vpae_jax.types import HostArray, UserError

Bytes = UInt8[np.ndarray, "n"]
Ranges = tuple[range, ...]
Info = tuple[str, np.dtype, tuple[int, ...]]

MAX_HEADER = 100_000_000  # the safetensors library's own limit
MAX_AXES = 32
# Parts of rows up to this size are read as whole rows: one call a row would be 5 to 250 times slower, and the system
# reads whole pages anyway. They are read some at a time, so that memory stays small.
WHOLE_ROWS = 4096
PIECE_BYTES = 4 << 20

DTYPES: Mapping[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BOOL": np.dtype(np.bool_),
    **{f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """What a file says of one tensor.

    Attributes:
      name: what the file calls it.
      file: the file.
      dtype: one of `DTYPES`.
      shape: the shape.
    """

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape)


class SafetensorsFile:
    """An open file.

    Args:
      path: for messages.
      file: the file; left open.

    Attributes:
      stored: its tensors, by name.
      metadata: texts that the file keeps beside them.

    Raises:
      UserError: a file that is truncated, or is not what its header says.
    """

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self._file = path, file
        self.stored: dict[str, StoredTensor] = {}
        self._starts: dict[str, int] = {}
        size = os.fstat(file.fileno()).st_size
        first = np.zeros(8, np.uint8)
        self._read(first[:size].data, 0)
        length = int.from_bytes(first.tobytes(), "little")
        if length > min(size - 8, MAX_HEADER):
            raise self._bad(f"its first 8 bytes announce a header of {length} bytes, it has {size} bytes in all")
        raw = np.empty(length, np.uint8)
        self._read(raw.data, 8)
        try:
            header = parse_json(raw.tobytes())
        except (ValueError, RecursionError) as error:
            raise self._bad(f"header: {one_line(str(error))}") from error
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._bad("header: __metadata__ is not a mapping of texts")
        self.metadata: Mapping[str, str] = metadata
        entries = [(name, *self._entry(name, entry)) for name, entry in header.items()]
        position = 0
        for name, stored, start, end in sorted(entries, key=lambda entry: entry[2:]):
            if end - start != stored.nbytes:
                found = f"spans bytes {start} to {end}, expected {stored.nbytes} bytes"
                raise self._bad(f"tensor {quote(name)} of {stored.dtype}{list(stored.shape)} {found}")
            if start != position:
                raise self._bad(f"tensor {quote(name)} begins at byte {start}, expected {position}")
            self.stored[name], self._starts[name] = stored, 8 + length + start
            position = end
        if 8 + length + position != size:
            raise self._bad(f"its header announces {8 + length + position} bytes, it has {size}")

    def fill(self, name: str, ranges: Ranges, out: HostArray) -> int:
        """Reads a part of a tensor.

        Args:
          name: the tensor.
          ranges: the part, by axis.
          out: where it goes; not empty.

        Returns:
          How many bytes were asked from the file.

        Raises:
          UserError: the file shrank or cannot be read.
          ValueError: it was closed.
        """
        shape, ranges = self.stored[name].shape or (1,), ranges or (range(1),)
        strides = [out.itemsize * prod(shape[axis + 1 :]) for axis in range(len(shape))]
        # From axis `run` on, what is wanted is one run of bytes. From `outer` on it is read with what lies between.
        run = max((axis for axis, wanted in enumerate(ranges) if len(wanted) != shape[axis]), default=0)
        outer = run
        while outer and strides[outer - 1] <= WHOLE_ROWS:
            outer -= 1
        at = np.asarray(self._starts[name] + sum(r.start * stride for r, stride in zip(ranges, strides, strict=True)))
        for axis in range(outer):
            at = np.add.outer(at, strides[axis] * np.arange(len(ranges[axis])))
        offsets: list[int] = at.ravel().tolist()
        if outer == run:
            view, size = out.reshape(-1).view(np.uint8).data, out.nbytes // len(offsets)
            for number, offset in enumerate(offsets):
                self._read(view[number * size : (number + 1) * size], offset)
            return out.nbytes
        asked, step = 0, strides[outer]
        rows = min(len(ranges[outer]), max(1, PIECE_BYTES // step))
        piece = np.empty(rows * step, np.uint8)
        inner = range(outer + 1, len(shape))
        last = out.itemsize + sum((len(ranges[axis]) - 1) * strides[axis] for axis in inner)
        for block, offset in zip(out.reshape(len(offsets), *map(len, ranges[outer:])), offsets, strict=True):
            for row in range(0, len(block), rows):
                part = block[row : row + rows]
                size = (len(part) - 1) * step + last
                self._read(piece[:size].data, offset + row * step)
                part[...] = np.ndarray(part.shape, out.dtype, piece, strides=strides[outer:])
                asked += size
        return asked

    def _entry(self, name: str, entry: Any) -> tuple[StoredTensor, int, int]:
        match entry:
            case {"dtype": str(code), "shape": list(shape), "data_offsets": [start, end]} if all(
                type(n) is int and n >= 0 for n in (*shape, start, end)
            ):
                return checked(self.path, name, DTYPES.get(code), code, tuple(shape)), start, end
        raise self._bad(f"tensor {quote(name)}: expected dtype, shape and data_offsets, found {quote(entry)}")

    def _read(self, buffer: memoryview, offset: int) -> None:
        """Fills a buffer from the file; the system may give less than is asked for."""
        while buffer:
            try:
                count = os.preadv(self._file.fileno(), [buffer], offset)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be read at byte {offset}: {error.strerror}") from error
            if not count:
                raise UserError(f"{self.path}: ends at byte {offset}, it was longer before; fetch it again")
            buffer, offset = buffer[count:], offset + count

    def _bad(self, reason: str) -> UserError:
        return UserError(f"{self.path}: truncated or not a safetensors file ({reason}); fetch it again")


def write_file(path: Path, infos: Sequence[Info], values: Iterator[HostArray], metadata: Mapping[str, str]) -> None:
    """Writes one file, a tensor at a time.

    Args:
      path: the file.
      infos: name, dtype and shape of each tensor.
      values: as many are taken as there are `infos`, in their order.
      metadata: of the file.

    Raises:
      ValueError: a value that is missing, or is not what `infos` says.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    # Wide dtypes lie first, so that every tensor is aligned without holes, which the format forbids.
    for name, dtype, shape in sorted(infos, key=lambda info: -info[1].itemsize):
        end = position + dtype.itemsize * prod(shape)
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for info in infos:
            file.seek(8 + len(raw) + header[info[0]]["data_offsets"][0])
            file.write(_bytes_of(info, next(values, None)).data)


def checked(path: Path, name: str, dtype: np.dtype | None, called: str, shape: tuple[int, ...]) -> StoredTensor:
    """A tensor that we can hold.

    Args:
      path: its file.
      name: the tensor.
      dtype: its dtype; None when we have none like it.
      called: the file's name of the dtype.
      shape: its shape.

    Raises:
      UserError: no such dtype; a shape that no array can have.
    """
    if dtype is None:
        known = ", ".join(known.name for known in CODES)
        raise UserError(f"{path}: tensor {quote(name)} has dtype {quote(called)}, expected one of {known}; convert it")
    # NumPy counts the bytes of an empty array as if its empty axes were not there.
    if len(shape) > MAX_AXES or any(n < 0 for n in shape) or dtype.itemsize * prod(max(n, 1) for n in shape) > 2**62:
        raise UserError(f"{path}: tensor {quote(name)} has shape {quote(list(shape))}, which no array can have")
    return StoredTensor(name, path, dtype, shape)


def decode_json(raw: bytes) -> Any:
    """A JSON value whose objects have distinct keys. Raises `ValueError` or `RecursionError` for anything else."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"{quote(twice)} is there twice")
        return found

    return json.loads(raw.decode("utf-8"), object_pairs_hook=distinct)


def parse_json(raw: bytes) -> dict[str, Any]:
    """A JSON object of distinct keys. Raises `ValueError` or `RecursionError` for anything else."""
    value = decode_json(raw)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, expected an object")
    return value


def one_line(text: str, limit: int = 200) -> str:
    """Text from a file or a library, fit for an error's single line: short, and nothing that a terminal obeys."""
    text = " ".join(text.split())
    text = text if len(text) <= limit else f"{text[:limit]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def quote(value: Any) -> str:
    """A value from a file, fit for an error's single line."""
    return one_line(repr(value))


def _bytes_of(info: Info, value: HostArray | None) -> Bytes:
    name, dtype, shape = info
    if value is None or value.dtype != dtype or value.shape != tuple(shape):
        found = "none" if value is None else f"{value.dtype}{list(value.shape)}"
        raise ValueError(f"tensor {name!r}: expected {dtype}{list(shape)}, found {found}")
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)
