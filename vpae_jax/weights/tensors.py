"""Tensors in weight files, read lazily and by byte range, and written one after the other.

A file is recognised by its content: safetensors (`safetensors_file.py`), an index of shards, or a PyTorch checkpoint
(`pickles.py`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from pathlib import Path, PurePosixPath
from threading import Lock
from types import MappingProxyType
from typing import BinaryIO, Literal

import jax.numpy as jnp
import numpy as np

from vpae_jax.files import atomically, write_text
from vpae_jax.placeholders import HEAD, kinds, placeholder_kind
from vpae_jax.types import HostArray, UserError
from vpae_jax.weights import dialects
from vpae_jax.weights.filenames import MAX_JSON
from vpae_jax.weights.pickles import Checkpoint
from vpae_jax.weights.safetensors_file import (
    CODES,
    Info,
    SafetensorsFile,
    StoredTensor,
    one_line,
    parse_json,
    quote,
    write_file,
)

SHARD_BYTES = 5_000_000_000
_OTHERS = kinds(
    (rb"GGUF", "is a GGUF file, whose weights are quantised; fetch safetensors of float8 or wider"),
    (rb"\x89HDF\r\n", "is an HDF5 file; expected safetensors or a PyTorch checkpoint"),
    (rb"\x93NUMPY", "is a NumPy array; expected safetensors or a PyTorch checkpoint"),
)
DISTRIBUTED = ".distcp"  # suffix of the files of a PyTorch distributed checkpoint
CACHED_NUMBERS = 2**16
_EXPONENTS = {"bfloat16": np.uint16(0x7F80), "float16": np.uint16(0x7C00), "float32": np.uint32(0x7F800000)}
WeightFile = SafetensorsFile | Checkpoint


class Tensors(Mapping[str, StoredTensor]):
    """The tensors of one or several files, made by `open_tensors` and `open_shards` and usable until these close.

    They have canonical names, shapes and values (`dialects.py`): names without the words of wrapper modules, and a
    tensor with a scale multiplied by it, in float32.

    Args:
      files: the open files.

    Attributes:
      metadata: text metadata of the files.
      notes: tensors that are left out although they would change the model's outputs.

    Raises:
      UserError: a tensor that is in two files; a tensor that no model here computes with; scales that do not fit.
    """

    def __init__(self, files: Sequence[WeightFile]):
        self._stored: dict[str, StoredTensor] = {}
        self._files: dict[str, WeightFile] = {}
        self._scales: dict[str, tuple[WeightFile, str]] = {}
        self._bytes_read, self._lock = 0, Lock()
        self.metadata: Mapping[str, str] = {key: text for source in files for key, text in source.metadata.items()}
        gates = [self._add(source, stored) for source in files for stored in source.stored.values()]
        for name in list(self):
            self._scale(name)
        self.notes: tuple[str, ...] = ()
        if any(gates):
            self.notes = (
                f"{files[0].path}: read without the {sum(gates)} tensors of the gates of FastWan's sparse attention "
                "(to_gate_compress), and computed with full attention",
            )

    def _add(self, source: WeightFile, stored: StoredTensor) -> bool:
        """Adds a tensor unless it can be ignored; returns whether it belongs to a gate."""
        if (reason := dialects.refusal(stored.name)) is not None:
            raise UserError(f"{source.path}: tensor {quote(stored.name)} {reason}")
        if (gate := dialects.is_gate(stored.name)) or dialects.is_idle(stored.name):
            return gate
        name = dialects.plain(stored.name)
        if name in self._files:
            other = self._stored[name]
            where = f"also in {other.file}" if other.file != source.path else f"{quote(other.name)} once more"
            raise UserError(f"{source.path}: tensor {quote(stored.name)} is {where}; remove one")
        self._files[name] = source
        self._stored[name] = dataclasses.replace(stored, shape=dialects.shape(name, stored.shape))
        return False

    def _scale(self, name: str) -> None:
        """If `name` is the scale of another tensor, merges it into that one."""
        scaled = self._stored.get(dialects.scaled(name) or "")
        if scaled is None or not jnp.issubdtype(scaled.dtype, jnp.floating):
            return
        weight, scale = dialects.plain(scaled.name), self._stored.pop(name)
        rows = scaled.shape[:1]
        fits = prod(scale.shape) == 1 or (len(rows) == 1 and scale.shape in (rows, (*rows, 1)))
        if weight in self._scales or not fits or not jnp.issubdtype(scale.dtype, jnp.floating):
            raise UserError(
                f"{scale.file}: tensor {quote(scale.name)} of shape {list(scale.shape)} scales {quote(scaled.name)} of "
                f"shape {list(scaled.shape)}, expected a single floating-point number, or one for each row"
            )
        self._scales[weight] = self._files.pop(name), scale.name
        self._stored[weight] = dataclasses.replace(scaled, dtype=np.dtype(np.float32))

    def __getitem__(self, name: str) -> StoredTensor:
        return self._stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read from the files so far, including the rest of rows that were only partly used."""
        return self._bytes_read

    def read(self, name: str, index: tuple[slice, ...] = ()) -> HostArray:
        """Reads a tensor or a part of it, from any thread.

        Args:
          name: the tensor.
          index: a slice with step 1 for each leading axis; axes without one are read whole.

        Returns:
          An array in memory of its own, C-contiguous.

        Raises:
          KeyError: no such tensor.
          UserError: the file shrank or cannot be read.
          ValueError: an index that is not as described; the file was closed.
        """
        stored = self[name]
        if len(index) > len(stored.shape) or any(one.step not in (None, 1) for one in index):
            raise ValueError(f"tensor {name!r} of shape {list(stored.shape)}: cannot be read at {index}")
        whole = (slice(None),) * (len(stored.shape) - len(index))
        bounds = [one.indices(n)[:2] for one, n in zip((*index, *whole), stored.shape, strict=True)]
        shape = [max(0, stop - start) for start, stop in bounds]
        if not prod(shape):
            return np.empty(shape, stored.dtype)
        (start, stop), *inner = bounds or [(0, 1)]
        rows = self._files[name].read_rows(stored.name, start, stop)
        with self._lock:
            self._bytes_read += rows.nbytes
        if stored.shape:
            rows = rows.reshape(-1, *stored.shape[1:])
        if name in self._scales:
            with np.errstate(over="ignore", invalid="ignore"):  # readers check for values that are not finite
                rows = rows.astype(np.float32) * self._scale_of(name, start, stop)
        if rows.size == prod(shape):
            return rows
        return rows[:, *(slice(*one) for one in inner)].copy()

    def _scale_of(self, name: str, start: int, stop: int) -> HostArray:
        """The factor for rows of a tensor."""
        file, scale = self._scales[name]
        shape = file.stored[scale].shape
        if prod(shape) == 1:
            return file.read_rows(scale, 0, 1).astype(np.float32).reshape(())
        values = file.read_rows(scale, start, stop).astype(np.float32)
        return values.reshape(-1, *[1] * (len(self[name].shape) - 1))


@contextmanager
def open_tensors(path: Path) -> Iterator[Tensors]:
    """Opens a safetensors file, an index of shards, or a PyTorch checkpoint, recognised by content.

    Raises:
      UserError: a file that is missing, unreadable, damaged, or none of these; an index that does not match its shards.
    """
    with ExitStack() as stack:
        file = _open_file(path, stack)
        if _kind(path, file) == "index":
            yield _open_index(path, file, stack)
        else:
            yield Tensors([_open_source(path, file, stack)])


@contextmanager
def open_shards(paths: Sequence[Path]) -> Iterator[Tensors]:
    """Opens files whose tensors belong together, without an index.

    Raises:
      UserError: as `open_tensors`; a tensor that is in two files.
    """
    with ExitStack() as stack:
        yield Tensors([_open_source(path, _open_file(path, stack), stack) for path in paths])


def write_safetensors(
    folder: Path,
    stem: str,
    infos: Sequence[Info],
    values: Iterable[HostArray],
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
) -> None:
    """Writes tensors with one in memory at a time; several shards get an index.

    Args:
      folder: where to write; each file appears complete or not at all.
      stem: file name without suffix.
      infos: name, dtype and shape of each tensor.
      values: the tensors, in the order of `infos`.
      shard_bytes: maximum size of a shard.
      metadata: of every file.

    Raises:
      ValueError: a duplicate name, a dtype that cannot be written, values that do not match `infos`.
    """
    shards: list[list[Info]] = [[]]
    names, used, total = {"__metadata__"}, 0, 0
    for name, dtype, shape in infos:
        if name in names or dtype not in CODES:
            raise ValueError(f"tensor {name!r} of {dtype}: a dtype that cannot be written, or a name that is taken")
        names.add(name)
        size = dtype.itemsize * prod(shape)
        if used and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append((name, dtype, shape))
        used, total = used + size, total + size
    count, iterator = len(shards), iter(values)
    file_name = f"{stem}.safetensors" if count == 1 else stem + "-{:05d}-of-{:05d}.safetensors"
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = file_name.format(number, count)
        atomically(folder / file, partial(write_file, infos=shard, values=iterator, metadata=metadata))
        weight_map |= {name: file for name, _, _ in shard}
    if next(iterator, None) is not None:
        raise ValueError(f"{folder / stem}: more values than the {len(infos)} tensors announced")
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")


def blocks(value: HostArray) -> Iterator[HostArray]:
    """An array's values in memory order, in blocks that fit into a CPU cache."""
    flat = value.ravel(order="K")
    return (flat[start : start + CACHED_NUMBERS] for start in range(0, flat.size, CACHED_NUMBERS))


def finite(value: HostArray) -> bool:
    """Whether no value is NaN or infinity, which have all exponent bits set."""
    if value.dtype.kind in "biu":
        return True
    mask = _EXPONENTS.get(value.dtype.name)
    if mask is None:
        return all(np.isfinite(block).all() for block in blocks(value))
    return all((block.view(mask.dtype) & mask).max() != mask for block in blocks(value))


def _open_file(path: Path, stack: ExitStack) -> BinaryIO:
    try:
        # Without O_NONBLOCK, opening a pipe would block until there is a writer.
        file = open(path, "rb", 0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; the weights are incomplete") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}); expected a file of weights") from error
    stack.enter_context(file)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise UserError(f"{path}: is not a regular file; expected a file of weights")
    return file


def _kind(path: Path, file: BinaryIO) -> Literal["safetensors", "index", "pickle"]:
    """The kind of a file by its first bytes; "safetensors" if they are unknown. Raises `UserError` for a file that is
    known to be something else."""
    if path.suffix == DISTRIBUTED:
        raise UserError(
            f"{path}: is part of a PyTorch distributed checkpoint; merge its folder into one file first, with `python "
            f"-m torch.distributed.checkpoint.format_utils dcp_to_torch {path.parent} FILE.pt`, and give that file"
        )
    try:
        head = os.pread(file.fileno(), HEAD, 0)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if head[4:9] == b"\0\0\0\0{":  # the length of a header that is shorter than 4 GB, then the header
        return "safetensors"
    if head.startswith(b"PK\3\4") or (head[:1] == b"\x80" and head[1:2] <= b"\5"):
        return "pickle"  # a zip, or the first opcode of a pickle and its protocol
    if (what := placeholder_kind(head, _OTHERS)) is not None:
        raise UserError(f"{path}: {what}")
    return "index" if head.lstrip().startswith(b"{") and b"\0" not in head[:64] else "safetensors"


def _open_source(path: Path, file: BinaryIO, stack: ExitStack) -> WeightFile:
    kind = _kind(path, file)
    if kind == "index":
        raise UserError(f"{path}: truncated or not a safetensors file (it is JSON); expected tensors")
    if kind == "safetensors":
        return SafetensorsFile(path, file)
    checkpoint = Checkpoint(path, file)
    stack.callback(checkpoint.close)
    return checkpoint


def _open_index(path: Path, file: BinaryIO, stack: ExitStack) -> Tensors:
    """Opens the shards of an index, which must list all of their tensors."""
    listed = _weight_map(path, file)
    shards = {name: path.parent / name for name in sorted(set(listed.values()))}
    files = {name: _open_source(shard, _open_file(shard, stack), stack) for name, shard in shards.items()}
    tensors = Tensors(list(files.values()))
    for name, shard in listed.items():
        if name not in files[shard].stored:
            raise UserError(f"{path}: tensor {quote(name)} is listed in {shard}, but missing there; fetch both again")
    for source in files.values():
        for name in source.stored:
            if name not in listed:
                raise UserError(f"{source.path}: tensor {quote(name)} is not listed in {path}; fetch both again")
    return tensors


def _weight_map(path: Path, file: BinaryIO) -> Mapping[str, str]:
    if (size := os.fstat(file.fileno()).st_size) > MAX_JSON:
        raise UserError(f"{path}: {size} bytes of JSON; expected an index of safetensors shards")
    try:
        listed = parse_json(file.read()).get("weight_map")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {one_line(str(error))}; fetch it again") from error
    if not isinstance(listed, dict):
        raise UserError(f"{path}: no 'weight_map'; expected an index of safetensors shards")
    for name, shard in listed.items():
        # Only the name is checked: in the Hugging Face cache, shards are links out of the folder.
        plain = isinstance(shard, str) and shard.isprintable() and PurePosixPath(shard).parts
        if not plain or shard.startswith("/") or ".." in plain:
            raise UserError(
                f"{path}: tensor {quote(name)} is listed in {quote(shard)}, expected a file next to the index"
            )
    return listed
