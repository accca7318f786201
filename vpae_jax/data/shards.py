"""Reads single records of an ArrayRecord file in place, from a file system or by one request to an object store.

ArrayRecord's own reader does not support object stores, and takes several times the CPU time (`benchmarks/data.py`).
The files written by `encoding.units` are uncompressed and have one record per chunk, so that the position of a record
follows from the sizes of the preceding ones.

The layout is that of Riegeli (doc/riegeli_records_file_format.md in its repository): a stream of chunks, each a header
and its data, the first one a signature without data. A block header precedes every 65,512 bytes of that stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from vpae_jax.data.stores import Address, Location

BLOCK, BLOCK_HEADER, CHUNK_HEADER = 65536, 24, 40
BODY = BLOCK - BLOCK_HEADER
# Options of `ArrayRecordWriter`. Latents hardly compress.
WRITING = "group_size:1,uncompressed"


def starts(sizes: Sequence[int]) -> list[int]:
    """Returns the positions in the stream of chunks at which records of these sizes begin."""
    found, position = [], CHUNK_HEADER
    for size in sizes:
        # The data of a chunk: the compression type (none), the length of the list of sizes, the sizes, the records.
        length = _varint_bytes(size)
        position += CHUNK_HEADER + 1 + _varint_bytes(length) + length
        found.append(position)
        position += size
    return found


def read_record(path: Location, start: int, size: int) -> UInt8[np.ndarray, "size"]:
    """Reads the record of `size` bytes that begins at position `start` of the stream.

    Raises:
      OSError: the system cannot read the file.
      EOFError: the file ends before the record does.
      UserError: an object store cannot be read.
    """
    first, last = _position(start), _position(start + size - 1) + 1
    if isinstance(path, Address):
        data = path.read_range(first, last)
    else:
        with path.open("rb") as file:
            file.seek(first)
            data = file.read(last - first)
    if len(data) < last - first:
        raise EOFError(f"the file ends at byte {first + len(data)}")
    view = memoryview(data)
    blocks = range(first - first % BLOCK, last, BLOCK)
    pieces = [view[max(block + BLOCK_HEADER - first, 0) : block + BLOCK - first] for block in blocks]
    return np.frombuffer(bytearray().join(pieces), np.uint8)


def _position(offset: int) -> int:
    """Returns the position in the file of a byte of the stream."""
    block, rest = divmod(offset, BODY)
    return block * BLOCK + BLOCK_HEADER + rest


def _varint_bytes(number: int) -> int:
    """Returns the length of a number that is encoded with seven bits per byte."""
    return max(1, -(-number.bit_length() // 7))
