"""Records of an ArrayRecord file, read in place, from a file system or by one request from an object store.

ArrayRecord's own reader knows no object stores, and takes several times the processor time (`benchmarks/data.py`). The
files that `encoding.units` writes are not compressed and have one record a chunk, so that where a record lies follows
from the sizes of those before it.

The layout is that of Riegeli (doc/riegeli_records_file_format.md in its repository): a stream of chunks, each a header
and its data, the first one a signature without data; a block header lies before every 65512 bytes of that stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from vpae_jax.data.stores import Address, Location

BLOCK, BLOCK_HEADER, CHUNK_HEADER = 65536, 24, 40
BODY = BLOCK - BLOCK_HEADER
# What `ArrayRecordWriter` is to be told. Latents hardly compress.
WRITING = "group_size:1,uncompressed"


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


def read_record(path: Location, start: int, size: int) -> UInt8[np.ndarray, "size"]:
    """The record of `size` bytes that begins at `start` of the stream.

    Raises:
      OSError: what the system says of a file.
      EOFError: a file ends before the record does.
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
    """Where in the file a byte of the stream lies."""
    block, rest = divmod(offset, BODY)
    return block * BLOCK + BLOCK_HEADER + rest


def _varint_bytes(number: int) -> int:
    """Length of a number in seven bits a byte."""
    return max(1, -(-number.bit_length() // 7))
