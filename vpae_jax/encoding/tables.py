"""Reads the rows of tables (CSV, TSV, JSON Lines, Parquet, and text with one caption per line), numbered and in units.

Tables are streamed, so that a table of a million rows is never in memory. Text is parsed row by row with Python's `csv`
and `json`, because a broken row then only affects itself, and not its block as in pyarrow's text readers.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, UInt64

from vpae_jax.placeholders import HEAD, placeholder_kind
from vpae_jax.types import UserError

COLUMNS_SHOWN = 20
BATCH = 256  # rows of a Parquet file in memory at a time
BUFFER = 1 << 20  # bytes; with a buffer, the columns of a large row group are streamed
# Raised by pyarrow for damaged files, and by Python when it converts damaged values.
DAMAGED = (pa.ArrowException, OSError, ValueError, OverflowError)
# Encodings with two and four bytes per character, by byte order mark, and by which of the first bytes are zero.
MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
ZEROS = {"_0_0": "UTF-16LE", "0_0_": "UTF-16BE", "_000": "UTF-32LE", "000_": "UTF-32BE"}
CONVERT = "convert it from its encoding, for instance with `iconv -f WINDOWS-1252 -t UTF-8`"
OF_JSON = "; `jq -c '.[]' FILE.json` converts a JSON array to JSON Lines"
DELIMITERS = ",;\t|"  # spreadsheets write semicolons in many European locales
HEADER = 1 << 16  # bytes that are searched for a header
_SAID = re.compile(r"sep=(?P<mark>.)\r?\n", re.IGNORECASE)  # a line before the header that tells Excel the delimiter

TableRow = Mapping[str, Any]


class Refused(Exception):
    """A row or value that cannot be used. It can take the place of a row or value, and is raised when that is accessed.

    Attributes:
      kind: one word, by which rejects are counted.
      reason: one line.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason

    def __str__(self) -> str:
        return self.reason


@runtime_checkable
class Digest(Protocol):
    """A digest of `hashlib`."""

    def update(self, data: bytes, /) -> None: ...


@runtime_checkable
class Table(Protocol):
    """Rows in a fixed order. Each is a mapping from column to value, or a `Refused`; values may be `Refused`, too."""

    def scan(self, digest: Digest) -> Iterator[TableRow | Refused]:
        """Yields all rows, at least with the columns of their ids; adds everything that determines them to `digest`."""
        ...

    def read(self, first: int, count: int) -> list[TableRow | Refused]:
        """Returns complete rows, which must be among those that `scan` has yielded."""
        ...


class TableFile:
    """A table in a file. Its suffix gives the format; text must be UTF-8, with or without a byte order mark.

    CSV is parsed strictly (RFC 4180), except that the delimiter is detected from the header: quoted fields may contain
    line breaks and doubled quotes; rows with broken quotes, or with another number of fields than the header, are
    rejected. An unclosed quote hides at most 128 KiB, Python's limit for a field. From a Parquet file, only the needed
    columns and those with text or numbers are read.

    Args:
      path: a file with a suffix in `FORMATS`.
      needed: the columns that it must have, by use.
      flag: the flag that named the file, for messages.

    Raises:
      UserError: the file cannot be read, is empty, damaged or not UTF-8, or lacks a column. Raised also while rows are
        read, including when the file has changed since it was scanned.
    """

    def __init__(self, path: Path, needed: Mapping[str, str], flag: str = "--manifest") -> None:
        self.path, self.needed, self.flag = path, needed, flag
        self._format = FORMATS[path.suffix.lower()]
        self._signature = self._signed()
        self._rows: Iterator[TableRow | Refused] = iter(())
        self._number = 0  # number of the next row of `_rows`; 0 before the first

    def scan(self, digest: Digest) -> Iterator[TableRow | Refused]:
        with self._opened() as file:
            hashlib.file_digest(file, lambda: digest)  # pyright: ignore[reportArgumentType]
        return self._all()

    def read(self, first: int, count: int) -> list[TableRow | Refused]:
        if self._signed() != self._signature:
            raise UserError(f"{self.path} has changed while it was in use; start again")
        if not 0 < self._number <= first:  # units are usually read in order; an earlier one is found from the beginning
            self._rows, self._number = self._all(), 0
        before = first - self._number
        rows = list(islice(self._rows, before, before + count))
        self._number = first + len(rows)
        return rows

    def _all(self) -> Iterator[TableRow | Refused]:
        try:
            with self._opened() as file:
                if what := placeholder_kind(file.read(HEAD)):
                    raise UserError(f"{self.path}: {what}")
                file.seek(0)
                yield from self._format(self, file)
        except UnicodeError as error:
            raise UserError(f"{self.path}: {error}, and give the result with {self.flag}=FILE") from error

    def _opened(self) -> BinaryIO:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}; give another with {self.flag}=FILE") from error

    def _signed(self) -> tuple[int, int]:
        """Returns the size and modification time, by which a change of the file is detected."""
        try:
            found = self.path.stat()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"{self.path}: {why}; give another with {self.flag}=FILE") from error
        if not self.path.is_file():
            raise UserError(
                f"{self.path} is not a file; give one with {self.flag}=FILE, or a folder with --videos=FOLDER"
            )
        if not found.st_size:
            raise UserError(f"{self.path} is empty; give another with {self.flag}=FILE")
        return found.st_size, found.st_mtime_ns

    def require(self, columns: Sequence[str], needed: Mapping[str, str]) -> None:
        """Raises `UserError` unless each needed column occurs exactly once among these."""
        for use, column in needed.items():
            if columns.count(column) == 1:
                continue
            names = ", ".join(repr(name[:40]) for name in columns[:COLUMNS_SHOWN])
            names += ", ..." if len(columns) > COLUMNS_SHOWN else ""
            trouble, remedy = ("more than one", "rename one, or name") if column in columns else ("no", "name")
            raise UserError(
                f"{self.path} has {trouble} column {column!r} for the {use}; it has {names or 'none'}; "
                f"{remedy} another with --columns={use}=COLUMN"
            )


def not_utf8(data: bytes) -> str | None:
    """Returns why text with this beginning is probably not UTF-8, with the remedy; None if it may be UTF-8."""
    mark = next((name for mark, name in MARKS.items() if data.startswith(mark)), None)
    wide = mark or ZEROS.get("".join("_" if byte else "0" for byte in data[:4]))
    return wide and f"is {wide}, expected UTF-8; convert it with `iconv -f {wide} -t UTF-8`"


def _lines(file: BinaryIO) -> Iterator[str]:
    if wide := not_utf8(file.read(4)):
        raise UnicodeError(f"the file {wide}")
    file.seek(0)
    for number, raw in enumerate(file, 1):
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise UnicodeError(f"line {number} is not UTF-8 (byte {raw[error.start]:#04x}); {CONVERT}") from error
        yield text.removeprefix("\ufeff") if number == 1 else text


def _delimiter(table: TableFile, file: BinaryIO) -> tuple[str, int]:
    """Returns the delimiter, and the number of lines before the header. The delimiter is the one in a line `sep=;`, or
    else the one with which the header contains the needed columns, or the most columns."""
    lines = file.read(HEADER).decode("utf-8-sig", errors="replace").splitlines(keepends=True)
    file.seek(0)
    if lines and (said := _SAID.fullmatch(lines[0])):
        return said["mark"], 1
    headers: dict[str, list[str]] = {}
    for delimiter in ("\t" if table.path.suffix.lower() == ".tsv" else ",", *DELIMITERS):
        with suppress(csv.Error):
            headers[delimiter] = next(filter(None, csv.reader(lines, delimiter=delimiter, strict=True)), [])
    whole = (mark for mark, columns in headers.items() if set(columns).issuperset(table.needed.values()))
    return next(whole, max(headers, key=lambda mark: len(headers[mark]), default=",")), 0


def _csv(table: TableFile, file: BinaryIO) -> Iterator[TableRow | Refused]:
    mark, before = _delimiter(table, file)
    reader = csv.reader(islice(_lines(file), before, None), delimiter=mark, strict=True)
    header: list[str] = []
    while True:
        begins = before + reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if not header:
                raise UserError(f"{table.path}: its first line is not a header: {error}; rewrite it") from error
            yield Refused("row", f"{_span(begins, before + reader.line_num)}: {error}; are its quotes closed?")
            continue
        if not fields:
            continue
        if not header:
            header = fields
            table.require(header, table.needed)
        elif len(fields) != len(header):
            lines = _span(begins, before + reader.line_num)
            yield Refused("row", f"{lines}: {len(fields)} fields, expected {len(header)} as in the header")
        else:
            yield dict(zip(header, fields, strict=True))


def _json_lines(table: TableFile, file: BinaryIO) -> Iterator[TableRow | Refused]:
    """Yields rows of JSON Lines. There is no header: a column exists if any row has it."""
    missing, first = set(table.needed.values()), None
    for number, text in enumerate(_lines(file), 1):
        if not text.strip():
            continue
        if first is None and (text.lstrip().startswith("[") or text.strip() == "{"):
            what, how = ("a JSON array", "'.[]'") if "[" in text else ("indented JSON", ".")
            raise UserError(
                f"{table.path} is {what}, expected one object per line; convert it with `jq -c {how}`, and give the "
                f"result with {table.flag}=FILE"
            )
        first = first or {}
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield Refused("row", f"line {number}: {error}")
            continue
        if isinstance(row, dict):
            first = first or row
            missing.difference_update(row)
            yield row
        else:
            yield Refused("row", f"line {number}: not a JSON object")
    if first is not None:
        table.require([*first], {use: column for use, column in table.needed.items() if column in missing})


def _captions(table: TableFile, file: BinaryIO) -> Iterator[TableRow | Refused]:
    """Yields one caption per line, skipping empty lines."""
    return ({table.needed["caption"]: text} for text in _lines(file) if text.strip())


def _parquet(table: TableFile, file: BinaryIO) -> Iterator[TableRow | Refused]:
    try:
        source = pq.ParquetFile(file, buffer_size=BUFFER, page_checksum_verification=True)
        names, kinds = source.schema_arrow.names, source.schema_arrow.types
        table.require(names, table.needed)
        of = dict(zip(names, kinds, strict=True))
        for use in ("path", "caption", "id", "image"):
            if use in table.needed and not _is_plain(kind := of[table.needed[use]]):
                raise UserError(
                    f"{table.path}: column {table.needed[use]!r} for the {use} has type {kind}, expected text; "
                    f"name another with --columns={use}=COLUMN"
                )
        columns = [name for name in names if name in table.needed.values() or _is_plain(of[name])]
        count = 0
        for batch in source.iter_batches(BATCH, columns=columns, use_threads=False):
            count += batch.num_rows
            yield from _rows(batch)
        if count != source.metadata.num_rows:
            raise ValueError(f"{count} rows, expected {source.metadata.num_rows}")
    except DAMAGED as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"{table.path} is damaged, or not a Parquet file ({why}); give another with {table.flag}=FILE"
        ) from error


def _rows(batch: pa.RecordBatch) -> list[TableRow | Refused]:
    """Converts rows to Python types. If a value cannot be converted, as invalid UTF-8, only its row is rejected."""
    try:
        return batch.to_pylist()
    except DAMAGED as error:
        if batch.num_rows == 1:
            return [Refused("row", f"cannot be read: {error}")]
        return [row for i in range(batch.num_rows) for row in _rows(batch.slice(i, 1))]


def _is_plain(kind: pa.DataType) -> bool:
    """Whether values of this type are texts or numbers."""
    kind = kind.value_type if isinstance(kind, pa.DictionaryType) else kind
    types = pa.types
    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return any(test(kind) for test in tests)


def _span(first: int, last: int) -> str:
    """Formats the line numbers of a row."""
    return f"line {first}" if last <= first else f"lines {first} to {last}"


TABLES = {
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
    ".pq": _parquet,
}
FORMATS: dict[str, Callable[[TableFile, BinaryIO], Iterator[TableRow | Refused]]] = {".txt": _captions, **TABLES}


class RowUnits:
    """The rows of a table, numbered and divided into work units. Units can be read in any order; in ascending order it
    takes a single pass.

    Args:
      table: the table.
      size: rows per unit.
      name: returns a row's id, or raises `Refused` for a row without one.

    Attributes:
      count, units: number of rows and of units.
      digest: hash (16 hexadecimal digits) of everything that determines the rows.

    Raises:
      UserError: the table cannot be read.
    """

    def __init__(self, table: Table, size: int, name: Callable[[TableRow], str]) -> None:
        self._table, self.size = table, size
        digest = hashlib.sha256()
        hashes = array("Q", (_hash(row, name) for row in table.scan(digest)))
        self.count, self.units = len(hashes), -(-len(hashes) // size)
        self.digest = digest.hexdigest()[:16]
        self._repeated = repeated(np.frombuffer(hashes, np.uint64))

    def rows_of(self, unit: int) -> int:
        """Returns the number of rows in a unit."""
        return min(self.size, self.count - unit * self.size)

    def read(self, unit: int) -> Iterator[tuple[int, TableRow | Refused, bool]]:
        """Yields a unit's rows: the number from 0, the values, and whether an earlier row has the same id.

        Ids are compared by 8 bytes of their hash; with a million rows, the probability of a collision is 3e-8.

        Raises:
          IndexError: no such unit.
          UserError: the table has changed since it was scanned, or is gone.
        """
        if not 0 <= unit < self.units:
            raise IndexError(f"unit {unit} of {self.units}")
        for number, row in enumerate(self._table.read(unit * self.size, self.rows_of(unit)), unit * self.size):
            yield number, row, bool(self._repeated[number])


def repeated(hashes: UInt64[np.ndarray, "rows"]) -> Bool[np.ndarray, "rows"]:
    """Returns which hashes occurred before; 0 stands for a row without an id."""
    result = hashes != 0
    result[np.unique(hashes, return_index=True)[1]] = False
    return result


def _hash(row: TableRow | Refused, name: Callable[[TableRow], str]) -> int:
    """Returns a 64-bit hash of a row's id; 0 for a row without one."""
    try:
        if isinstance(row, Refused):
            raise row
        found = name(row)
    except Refused:
        return 0
    return int.from_bytes(hashlib.blake2b(found.encode(), digest_size=8).digest(), "little") or 1
