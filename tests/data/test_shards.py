"""Records are where ArrayRecord puts them, whatever their sizes."""

from itertools import pairwise

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from vpae_jax.data.shards import BLOCK, BODY, WRITING, read_record, starts


def write(path, sizes):
    rng = np.random.default_rng(len(sizes))
    records = [rng.bytes(size) for size in sizes]
    writer = ArrayRecordWriter(str(path), WRITING)
    for record in records:
        writer.write(record)
    writer.close()
    return records


# Around the lengths of a size in seven bits a byte and the end of a block.
EDGES = [
    *(2**power + change for power in (7, 14, 21) for change in (-1, 0, 1)),
    *(BODY + change for change in range(-90, 3, 3)),
    BLOCK,
    100 * BODY,
]


@pytest.mark.parametrize("sizes", [[5], [200] * 2000, EDGES, [*range(100, 3000, 7)], [60_000, 70_000, 131_072] * 9])
def test_records_are_found_where_arrayrecord_put_them(sizes, tmp_path):
    path = tmp_path / "file"
    records = write(path, sizes)
    reader = ArrayRecordReader(str(path))
    found = starts(sizes)
    assert all(a < b for a, b in pairwise(found))
    for number, (start, size, record) in enumerate(zip(found, sizes, records, strict=True)):
        assert read_record(path, start, size).tobytes() == record
        if number % 50 == 0:
            assert reader.read([number])[0] == record, "and ArrayRecord's own reader finds the same"
    reader.close()


def test_a_file_that_ends_early_or_is_gone(tmp_path):
    path = tmp_path / "file"
    write(path, [1000, 200_000])
    _, start = starts([1000, 200_000])
    with path.open("r+b") as file:
        file.truncate(150_000)
    with pytest.raises(EOFError, match="the file ends at byte 150000"):
        read_record(path, start, 200_000)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_record(path, start, 200_000)
