"""PyTorch checkpoints (`.pth`, `.pt`, `.bin`): dense tensors by name, read and written without running their code.

Files in PyTorch's zip format are memory-mapped, so that only what is copied is read; legacy files are read whole. Only
this module needs PyTorch, and imports it only for such a file.
"""

from __future__ import annotations

import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vpae_jax.files import atomically
from vpae_jax.types import HostArray, UserError
from vpae_jax.weights.safetensors_file import CODES, StoredTensor, checked, one_line, quote

BY_NAME = {dtype.name: dtype for dtype in CODES}  # PyTorch and NumPy use the same names for dtypes
# Exceptions that unpickling, `torch.load` and `zipfile` raise for damaged files, found by damaging 60,000 of them
# (tests/weights/test_fuzz.py); base classes of those observed.
DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,  # of keys, places in lists, and codecs
    MemoryError,
    OSError,
    RuntimeError,  # most of PyTorch's own; also NotImplementedError and RecursionError
    TypeError,
    ValueError,  # also UnicodeError
    struct.error,
    zipfile.BadZipFile,
)
# Warnings about files that PyTorch then reads, or rejects with a more informative error.
REMARKS = ("Detected pickle protocol", "(?s).*TorchScript archive", "(?s).*deprecated", "(?s).* in (beta|prototype) ")
# Keys under which training programs save the weights among other things; as the only set, they are not part of names.
WRAPPERS = ("state_dict", "model")
DEPTH = 3  # maximum nesting of dictionaries


class Checkpoint:
    """An open checkpoint.

    Args:
      path: for messages.
      file: the open file; it is not closed.

    Attributes:
      stored: its tensors, by name.
      metadata: empty; only safetensors files have metadata.

    Raises:
      UserError: PyTorch is not installed; a damaged file; one that holds anything but (possibly nested, see `_sets`)
        mappings of names to dense tensors; one that asks to run code.
    """

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self._file = path, file
        self._size = os.fstat(file.fileno()).st_size
        self._tensors = _load(path, file)
        self.metadata: Mapping[str, str] = {}
        self.stored: dict[str, StoredTensor] = {}
        for name, tensor in self._tensors.items():
            called = str(tensor.dtype).removeprefix("torch.")
            self.stored[name] = checked(path, name, BY_NAME.get(called), called, tuple(tensor.shape))

    def read_rows(self, name: str, start: int, stop: int) -> HostArray:
        """Copies a range of a tensor's first axis; errors as `SafetensorsFile.read_rows`."""
        if os.fstat(self._file.fileno()).st_size < self._size:  # accessing mapped memory beyond the end is fatal
            raise UserError(f"{self.path}: became shorter while it was open; fetch it again")
        import torch

        dtype, tensor = self.stored[name].dtype, self._tensors[name]
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        rows = tensor[start:stop] if tensor.ndim else tensor
        return rows.view(integer).numpy().copy(order="C").view(dtype)

    def close(self) -> None:
        """Releases the memory."""
        self._tensors = {}


def write_pickle(path: Path, values: Iterable[tuple[str, HostArray]]) -> None:
    """Writes a dict of tensors as `torch.save` does, complete or not at all; all tensors are in memory at once.

    Raises:
      UserError: PyTorch is not installed.
    """
    torch = require_torch(path)
    _save(torch, path, _tensors(torch, values))


def write_sets(path: Path, sets: Mapping[str, Iterable[tuple[str, HostArray]]]) -> None:
    """Writes a dict of dicts of tensors, like `write_pickle`.

    Raises:
      UserError: PyTorch is not installed.
    """
    torch = require_torch(path)
    _save(torch, path, {name: _tensors(torch, values) for name, values in sets.items()})


def _tensors(torch: Any, values: Iterable[tuple[str, HostArray]]) -> dict[str, Any]:
    tensors = {}
    for name, value in values:
        # PyTorch warns about read-only memory.
        bits = np.require(value, requirements=["C", "W"]).view(f"i{value.itemsize}")
        tensors[name] = torch.from_numpy(bits).view(getattr(torch, value.dtype.name))
    return tensors


def _save(torch: Any, path: Path, content: dict[str, Any]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, PyTorch would write the temporary name into the file
            torch.save(content, file)

    atomically(path, write)


def require_torch(path: Path) -> Any:
    """The torch module. Raises `UserError` if it is not installed, naming the checkpoint that needs it."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path}: a PyTorch checkpoint needs PyTorch: pip install torch") from error
    return torch


def _load(path: Path, file: BinaryIO) -> dict[str, Any]:
    """Loads the tensors as plain dense `torch.Tensor`s on the CPU; errors as `Checkpoint`."""
    torch = require_torch(path)
    try:
        records = _records(path, file)
        with warnings.catch_warnings():
            for remark in REMARKS:
                warnings.filterwarnings("ignore", remark, UserWarning)
            # By descriptor, since PyTorch would trust a name that ends in .safetensors.
            name = f"/dev/fd/{file.fileno()}"
            found = torch.load(name, map_location="cpu", weights_only=True, mmap=records is not None)
            return _plain(path, torch, found, os.fstat(file.fileno()).st_size, records)
    except pickle.UnpicklingError as error:
        reason = "refused: the file asks to run code or holds more than tensors"
        raise UserError(f"{path}: {reason} ({_why(error)})") from error
    except DAMAGE as error:
        raise UserError(f"{path}: truncated or not a PyTorch checkpoint ({_why(error)}); fetch it again") from error


def _records(path: Path, file: BinaryIO) -> set[int] | None:
    """The sizes of a zip's records; None for a legacy file, which is not a zip."""
    if os.pread(file.fileno(), 4, 0) != b"PK\3\4":
        return None
    with zipfile.ZipFile(file) as archive:
        if not any(name.endswith("data.pkl") for name in archive.namelist()):
            raise UserError(f"{path}: is a zip archive without a PyTorch checkpoint; unpack it, and give its contents")
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:  # PyTorch would map the compressed bytes, and read garbage
                raise UserError(
                    f"{path}: record {quote(info.filename)} is compressed; write the file again with torch.save"
                )
        return {info.file_size for info in archive.infolist()}


def _plain(path: Path, torch: Any, found: Any, size: int, records: set[int] | None) -> dict[str, Any]:
    """Checks what `torch.load` returned.

    Args:
      path: for messages.
      torch: the module.
      found: what it returned.
      size: of the file, in bytes.
      records: sizes of the zip's records; None for a legacy file.
    """
    found = _weights(found, torch.Tensor)
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}, expected a mapping of names to tensors")
    tensors = {}
    for name, tensor in found.items():
        quoted = quote(name)
        if type(name) is not str:
            raise UserError(f"{path}: a tensor is named {quoted}, expected a string")
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise UserError(f"{path}: {quoted} is a {type(tensor).__name__}, expected a tensor; keep only the weights")
        tensor = torch.Tensor.detach(tensor)  # through the class, since a file may set attributes of the same name
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_neg():
            raise UserError(
                f"{path}: tensor {quoted} is not stored densely ({tensor.layout}, {tensor.dtype}); densify it first"
            )
        if tensor.device.type != "cpu":
            raise UserError(f"{path}: tensor {quoted} holds no values (device {tensor.device}); fetch the file again")
        # A view may claim far more than the file holds, and a mapped storage may cover other records.
        claimed, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        if claimed > size or (records is not None and held not in records):
            what = f"{claimed} bytes in a storage of {held}"
            raise UserError(f"{path}: tensor {quoted} claims {what}, which the file does not hold; fetch it again")
        tensors[name] = tensor
    return tensors


def _weights(found: Any, tensor: type) -> Any:
    """The weights in a checkpoint. If there are several sets, such as a generator and its average, their keys become
    prefixes."""
    sets = dict(_sets(found, tensor))
    if not sets:
        inner = (found.get(key) for key in WRAPPERS) if isinstance(found, dict) else ()
        return next((value for value in inner if isinstance(value, dict)), found)
    if len(sets) == 1 and set(*sets) <= set(WRAPPERS):
        return next(iter(sets.values()))
    return {
        ".".join([*path, name]) if isinstance(name, str) else name: value
        for path, values in sets.items()
        for name, value in values.items()
    }


def _sets(found: Any, tensor: type, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[Any, Any]]]:
    """Nested dictionaries of tensors whose names have dots, like the parameters of modules; with their keys."""
    if not isinstance(found, dict):
        return
    if any(isinstance(value, tensor) and "." in str(name) for name, value in found.items()):
        yield path, found
    elif len(path) < DEPTH:
        for key, inner in found.items():
            yield from _sets(inner, tensor, (*path, str(key)))


def _why(error: BaseException) -> str:
    """The informative line of an error, without PyTorch's advice, some of which is unsafe."""
    lines = str(error).split("WeightsUnpickler error:")[-1].splitlines()
    told = [line for line in map(str.strip, lines) if line and not line.startswith("Weights only load failed")]
    return one_line(told[0].split(" Please use")[0]) if told else type(error).__name__
