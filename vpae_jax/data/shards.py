"""Records of an ArrayRecord file, read in place.

ArrayRecord's own reader passes a record through several buffers, which costs more than all that is done with it
afterwards (`benchmarks/data.py`). The files that `encoding.units` writes are not compressed and have one record a
chunk, so that where a record lies follows from the sizes of those before it, and one call reads it straight into its
array, or one request from an object store.

The layout is that of Riegeli (doc/riegeli_records_file_format.md in its repository): a stream of chunks, each a header
and its data, the first one a signature without data; a block header lies before every 65512 bytes of that stream.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from vpae_jax.data.stores import Address, Location

BLOCK, BLOCK_HEADER, CHUNK_HEADER = 65536, 24, 40
BODY = BLOCK - BLOCK_HEADER
# What `ArrayRecordWriter` is to be told. Latents hardly compress.
WRITING = "group_size:1,uncompressed"
# Files that are held open; a folder may have many thousands.
OPEN_FILES = 64
_PIECES = os.sysconf("SC_IOV_MAX")  # buffers that one call fills


def starts(sizes: Sequence[int]) -> list[int]:
    """Where records of these sizes begin in the stream of chunks."""
    found, position = [], CHUNK_HEADER
    for size in sizes:
        # The data of a chunk: that it is not compressed, how long the list of sizes is, the sizes, the records.
        length = _varint_bytes(size)
        position += CHUNK_HEADER + 1 + _varint_bytes(length) + length
        found.append(position)
        position += size
    return found


class Shards:
    """Reads from files of which the last used ones stay open. Threads may share it, and it may be sent to processes."""

    def __init__(self, limit: int = OPEN_FILES) -> None:
        self.limit = limit
        self._lock, self._open = threading.Lock(), OrderedDict[Path, _File]()

    def read(self, path: Location, start: int, size: int) -> UInt8[np.ndarray, "size"]:
        """The record that begins at `start` of the stream.

        Raises:
          OSError: what the system says of a file.
          EOFError: a file ends before the record does.
          UserError: an object store cannot be read.
        """
        record = np.empty(size, np.uint8)
        block, offset = divmod(start, BODY)
        position = block * BLOCK + BLOCK_HEADER + offset
        view, skipped = record.data, memoryview(bytearray(BLOCK_HEADER))
        pieces = [view[: BODY - offset]]
        for first in range(BODY - offset, size, BODY):
            pieces += [skipped, view[first : first + BODY]]
        if isinstance(path, Address):
            _scatter(path.read_range(position, position + sum(map(len, pieces))), pieces)
            return record
        file = self._file(path)
        while pieces:
            count = os.preadv(file.number, pieces[:_PIECES], position)
            if not count:
                raise EOFError(f"the file ends at byte {position}")
            position += count
            while pieces and count >= len(pieces[0]):  # the system may give less than is asked for
                count -= len(pieces.pop(0))
            if count:
                pieces[0] = pieces[0][count:]
        return record

    def _file(self, path: Path) -> _File:
        with self._lock:
            file = self._open.get(path)
        if file is None:
            file = _File(path)
        with self._lock:
            self._open[path] = file
            self._open.move_to_end(path)
            while len(self._open) > self.limit:
                self._open.popitem(last=False)
        return file

    def __reduce__(self) -> tuple[type[Shards], tuple[int]]:
        return Shards, (self.limit,)


class _File:
    """An open file, which is closed when nobody holds it any more: a thread may still read from one that is dropped."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # when Python ends, `os` may be gone before
        if self.number >= 0:
            close(self.number)


def _scatter(data: bytes, pieces: Iterable[memoryview]) -> None:
    """Fills buffers one after the other."""
    rest = memoryview(data)
    for piece in pieces:
        piece[:], rest = rest[: len(piece)], rest[len(piece) :]


def _varint_bytes(number: int) -> int:
    """Length of a number in seven bits a byte."""
    return max(1, -(-number.bit_length() // 7))
