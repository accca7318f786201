"""One safetensors file: checked by the safetensors library, read by byte range, written tensor by tensor.

The library's own reader is not used because it has no float8 under NumPy, and because it memory-maps the file, so that
a file that shrinks or a failing disk kills the process with a signal; its writer is not used because it takes all
tensors at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open

from vpae_jax.types import HostArray, UserError

Bytes = UInt8[np.ndarray, "n"]
Info = tuple[str, np.dtype, tuple[int, ...]]

MAX_AXES = 32
MAX_HEADER, MAX_TENSORS = 2**24, 2**16  # bytes, and tensors: the largest models have 2**18 and 2**12

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
    """A tensor's entry in a file.

    Attributes:
      name: its name in the file.
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
    """An open safetensors file.

    Args:
      path: the file.
      file: the same file, open; it is not closed.

    Attributes:
      stored: its tensors, by name.
      metadata: its text metadata.

    Raises:
      UserError: a file that is truncated, or does not match its header.
    """

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self._file = path, file
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(self._read(8, 0).tobytes(), "little") if size >= 8 else 0
        if MAX_HEADER < length <= size - 8:
            reason = f"header too large: {length} bytes, expected at most {MAX_HEADER}"
            raise UserError(f"{path}: truncated or not a safetensors file ({reason}); fetch it again")
        try:
            with safe_open(path, "np") as checked_file:
                self.metadata: Mapping[str, str] = checked_file.metadata() or {}
                count = len(checked_file.keys())
        except (SafetensorError, OSError) as error:
            reason = one_line(str(error).removeprefix("Error while deserializing header: "))
            raise UserError(f"{path}: truncated or not a safetensors file ({reason}); fetch it again") from error
        if count > MAX_TENSORS:
            raise UserError(f"{path}: holds {count} tensors, expected at most {MAX_TENSORS}; is this a model?")
        # The library does not expose the tensors' offsets.
        header = json.loads(self._read(length, 8).tobytes())
        header.pop("__metadata__", None)
        self.stored: dict[str, StoredTensor] = {}
        self._starts: dict[str, int] = {}
        for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            self.stored[name] = checked(path, name, DTYPES.get(info["dtype"]), info["dtype"], tuple(info["shape"]))
            self._starts[name] = 8 + length + info["data_offsets"][0]

    def read_rows(self, name: str, start: int, stop: int) -> HostArray:
        """Reads a range of a tensor's first axis; all of a tensor without axes.

        Raises:
          UserError: the file shrank or cannot be read.
          ValueError: the file was closed.
        """
        stored = self.stored[name]
        if not stored.shape:
            return self._read(stored.nbytes, self._starts[name]).view(stored.dtype).reshape(())
        shape = (stop - start, *stored.shape[1:])
        row = prod(stored.shape[1:]) * stored.dtype.itemsize
        return self._read(shape[0] * row, self._starts[name] + start * row).view(stored.dtype).reshape(shape)

    def _read(self, size: int, offset: int) -> Bytes:
        """Reads bytes of the file, in several calls if the system returns fewer than requested."""
        result = np.empty(size, np.uint8)
        buffer = result.data
        while buffer:
            try:
                count = os.preadv(self._file.fileno(), [buffer], offset)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be read at byte {offset}: {error.strerror}") from error
            if not count:
                raise UserError(f"{self.path}: ends at byte {offset}, but was longer before; fetch it again")
            buffer, offset = buffer[count:], offset + count
        return result


def write_file(path: Path, infos: Sequence[Info], values: Iterator[HostArray], metadata: Mapping[str, str]) -> None:
    """Writes one file, a tensor at a time.

    Args:
      path: the file.
      infos: name, dtype and shape of each tensor.
      values: the tensors in the order of `infos`; only that many are consumed.
      metadata: of the file.

    Raises:
      ValueError: a value that is missing, or does not match `infos`.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    # Wide dtypes come first, so that every tensor is aligned without padding, which the format forbids.
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
    """A tensor's entry, checked to be representable.

    Args:
      path: its file.
      name: the tensor.
      dtype: its dtype; None if it is not supported.
      called: the file's name for the dtype.
      shape: its shape.

    Raises:
      UserError: an unsupported dtype; a shape that no array can have.
    """
    if dtype is None:
        known = ", ".join(known.name for known in CODES)
        raise UserError(f"{path}: tensor {quote(name)} has dtype {quote(called)}, expected one of {known}; convert it")
    # NumPy checks the size of an empty array without its empty axes.
    if len(shape) > MAX_AXES or any(n < 0 for n in shape) or dtype.itemsize * prod(max(n, 1) for n in shape) > 2**62:
        raise UserError(f"{path}: tensor {quote(name)} has shape {quote(list(shape))}, which no array can have")
    return StoredTensor(name, path, dtype, shape)


def parse_json(raw: bytes) -> dict[str, Any]:
    """Parses a JSON object. Raises `ValueError` or `RecursionError` for anything else."""
    value = json.loads(raw.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, expected an object")
    return value


def one_line(text: str, limit: int = 200) -> str:
    """Text from a file or library made fit for a one-line message: shortened, and without control characters."""
    text = " ".join(text.split())
    text = text if len(text) <= limit else f"{text[:limit]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def quote(value: Any) -> str:
    """The representation of a value from a file, made fit for a one-line message."""
    return one_line(repr(value))


def _bytes_of(info: Info, value: HostArray | None) -> Bytes:
    name, dtype, shape = info
    if value is None or value.dtype != dtype or value.shape != tuple(shape):
        found = "none" if value is None else f"{value.dtype}{list(value.shape)}"
        raise ValueError(f"tensor {name!r}: expected {dtype}{list(shape)}, found {found}")
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)
