"""Rows of Parquet files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from vpae_jax.encoding.tables import Digest, Place, Refused, TableRow, open_unchanged, require, signature
from vpae_jax.types import UserError

SCAN_ROWS = 4096
READ_ROWS = 64
BUFFER = 1 << 20  # so that a column of a large row group is read as a stream
# What pyarrow says of files that are damaged; of values, also what Python says when it takes them over.
DAMAGED = (pa.ArrowException, OSError, ValueError, OverflowError)


class ParquetTable:
    """A Parquet file, read row group by row group.

    Of the columns that are not asked for by name, those of text and of numbers are read. A reader keeps its place, so
    that units read in order cost one pass over a row group, however large.

    Args:
      path: the file.
      needed: the columns that it must have, by what they are needed for.

    Raises:
      UserError: it cannot be read, is damaged, or a column is missing; while rows are read, when the file is not the
        one that was scanned.
    """

    def __init__(self, path: Path, needed: Mapping[str, str]) -> None:
        self.path = path
        self.signature = signature(path)
        try:
            with self._open() as file:
                kinds = [(field.name, field.type) for field in file.schema_arrow]
                groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        except DAMAGED as error:
            raise self._damaged(error) from error
        require(path, [name for name, _ in kinds], needed)
        for use in ("path", "caption", "id"):
            if use in needed and not _is_plain(kind := dict(kinds)[needed[use]]):
                raise UserError(
                    f"{path}: column {needed[use]!r} for the {use} holds {_one_line(kind)}, expected text; "
                    f"name another with --columns={use}=COLUMN"
                )
        self.columns = [name for name, kind in kinds if name in needed.values() or _is_plain(kind)]
        self.starts = np.cumsum([0, *groups])
        self._readers: list[_Reader] = []  # one at most; taken by who reads, and given back
        self._lost: list[tuple[int, int, Refused]] = []  # rows from, to: what lies behind damage is not tried again

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": []}

    def scan(self, keys: Sequence[str], digest: Digest) -> Iterator[tuple[Place, TableRow | Refused]]:
        with open_unchanged(self.path, self.signature) as raw:
            hashlib.file_digest(raw, lambda: digest)  # pyright: ignore[reportArgumentType]
        number = 0
        with self._open() as file:
            for group, end in enumerate(self.starts[1:]):
                try:
                    for batch in _batches(file, group, SCAN_ROWS, keys):
                        for row in _rows(batch):
                            yield Place(number), row
                            number += 1
                except DAMAGED as error:
                    raise self._damaged(error) from error
                if number != end:
                    raise self._damaged(f"{number} rows, expected {end}")

    def rows(self, place: Place, count: int) -> Iterator[TableRow | Refused]:
        if signature(self.path) != self.signature:
            raise UserError(f"{self.path} was changed while it was in use; start again")
        for first, end, refused in self._lost:
            if first <= place.offset < end:
                yield from [refused] * count
                return
        try:
            reader = self._readers.pop()
        except IndexError:
            reader = None
        if reader is None or reader.number > place.offset:
            reader = _Reader(self._open(), self.starts, self.columns)
        try:
            found = reader.take(place.offset, count)
        except DAMAGED as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk's trouble, not the file's
                raise UserError(f"{self.path}: {os.strerror(error.errno)}; start again") from error
            refused = Refused("row", f"cannot be read: {_one_line(error)}")
            end = self.starts[np.searchsorted(self.starts, reader.number, side="right")]
            self._lost.append((reader.number, int(end), refused))
            yield from [refused] * count
            return
        self._readers[:] = [reader]
        yield from found

    def _open(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.path, buffer_size=BUFFER, page_checksum_verification=True)
        except DAMAGED as error:
            raise self._damaged(error) from error

    def _damaged(self, why: object) -> UserError:
        return UserError(
            f"{self.path} is damaged, or no Parquet file ({_one_line(why)}); give another with --manifest=FILE"
        )


class _Reader:
    """Goes forward through a file."""

    def __init__(self, file: pq.ParquetFile, starts: Int[np.ndarray, " groups"], columns: Sequence[str]) -> None:
        self.file, self.starts, self.columns = file, starts, columns
        self.number = self.end = 0  # of the row that comes next; where its row group ends
        self.left: list[TableRow] = []
        self.batches: Iterator[pa.RecordBatch] = iter(())

    def take(self, first: int, count: int) -> list[TableRow]:
        """Rows `first` to `first + count`, which is not over the file's end."""
        group = int(np.searchsorted(self.starts, first, side="right")) - 1
        if self.starts[group] > self.number:
            self._enter(group)
        while self.number < first:
            self._skip(first - self.number)
        taken: list[TableRow] = []
        while len(taken) < count:
            if not self.left:
                self.left = list(_rows(self._next()))
            some = self.left[: count - len(taken)]
            self.left = self.left[len(some) :]
            taken += some
            self.number += len(some)
        return taken

    def _enter(self, group: int) -> None:
        self.batches, self.left = _batches(self.file, group, READ_ROWS, self.columns), []
        self.number, self.end = int(self.starts[group]), int(self.starts[group + 1])

    def _skip(self, count: int) -> None:
        if self.left:
            self.left, count = self.left[count:], min(count, len(self.left))
            self.number += count
            return
        batch = self._next()
        self.number += min(count, batch.num_rows)
        self.left = list(_rows(batch.slice(count))) if batch.num_rows > count else []

    def _next(self) -> pa.RecordBatch:
        """Rows from `number` on, at least one. Damage may leave a row group with fewer than the file says, or more."""
        batch = next((batch for batch in self.batches if batch.num_rows), None)
        if batch is None:
            group = int(np.searchsorted(self.starts, self.number, side="right")) - 1
            if group < len(self.starts) - 1 and self.starts[group] == self.number:
                self._enter(group)
                batch = next((batch for batch in self.batches if batch.num_rows), None)
        if batch is None or self.number + batch.num_rows > self.end:
            raise OSError("a row group is not as long as the file says")
        return batch


def _batches(file: pq.ParquetFile, group: int, size: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    return file.iter_batches(size, row_groups=[group], columns=list(columns), use_threads=False)


def _rows(batch: pa.RecordBatch) -> Iterator[TableRow]:
    columns = [_values(name, column) for name, column in zip(batch.schema.names, batch.columns, strict=True)]
    for values in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, values, strict=True))


def _values(name: str, column: pa.Array) -> list[Any]:
    """A column in Python's types; `Refused` where a value has none, as text that is not UTF-8."""
    try:
        return column.to_pylist()
    except DAMAGED:
        return [_value(name, cell) for cell in column]


def _value(name: str, cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except DAMAGED as error:
        return Refused("row", f"column {name!r} cannot be read: {_one_line(error)}")


def _is_plain(kind: pa.DataType) -> bool:
    kind = kind.value_type if isinstance(kind, pa.DictionaryType) else kind
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_boolean,
    )
    return any(test(kind) for test in tests)


def _one_line(what: object) -> str:
    return " ".join(str(what).split())[:200]
