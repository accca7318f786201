"""Rows of tables: CSV, TSV, JSON Lines, Parquet, and text with a caption a line; numbered and cut into units.

Tables are read as a stream, so that one of a million rows is never held. Text goes through Python's `csv` and `json` a
row at a time, since there a broken row costs itself alone and not its block, as it does in pyarrow's readers of text.
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

from vpae_jax.impostors import HEAD, impostor
from vpae_jax.types import UserError

COLUMNS_SHOWN = 20
BATCH = 256  # rows of a Parquet file that are held at a time
BUFFER = 1 << 20  # bytes; with it, a column of a large row group is read as a stream
# What pyarrow raises for damaged files; for values, also what Python raises when it takes them over.
DAMAGED = (pa.ArrowException, OSError, ValueError, OverflowError)
# Encodings of two and four bytes a letter, by their byte order marks, and by where the first bytes are zero.
MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
ZEROS = {"_0_0": "UTF-16LE", "0_0_": "UTF-16BE", "_000": "UTF-32LE", "000_": "UTF-32BE"}
CONVERT = "convert it from its encoding, for instance with `iconv -f WINDOWS-1252 -t UTF-8`"
OF_JSON = "; `jq -c '.[]' FILE.json` makes JSON Lines of a JSON array"
DELIMITERS = ",;\t|"  # spreadsheets write semicolons in half of Europe
HEADER = 1 << 16  # bytes in which a header is looked for
_SAID = re.compile(r"sep=(?P<mark>.)\r?\n", re.IGNORECASE)  # a line before the header, by which Excel knows the columns

TableRow = Mapping[str, Any]


class Refused(Exception):
    """Something that is not used. It stands in place of a row or of a value, and is raised when that is asked for.

    Attributes:
      kind: one word, by which refusals are counted.
      reason: one line.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason

    def __str__(self) -> str:
        return self.reason


@runtime_checkable
class Digest(Protocol):
    """What `hashlib` makes."""

    def update(self, data: bytes, /) -> None: ...


@runtime_checkable
class Table(Protocol):
    """Rows in a fixed order, each a mapping from column to value, or a `Refused`, or with some values `Refused`."""

    def scan(self, digest: Digest) -> Iterator[TableRow | Refused]:
        """All rows, at least with the columns of their ids; `digest` takes in all that decides them."""
        ...

    def read(self, first: int, count: int) -> list[TableRow | Refused]:
        """Whole rows, of which `scan` gave at least so many."""
        ...


class TableFile:
    """A table in a file, in UTF-8 with or without a byte order mark where it is text; its suffix names its format.

    CSV is read strictly (RFC 4180), but for what separates its columns, which its header tells: a quoted field may hold
    line breaks and doubled quotes, and a row whose quotes are broken, or whose number of fields is not the header's, is
    refused. An open quote hides no more than Python's limit on a field, 128 KiB. Of a Parquet file's columns, those are
    read that are needed, and those of text and of numbers.

    Args:
      path: one of `FORMATS` by its suffix.
      needed: the columns that it must have, by what they are needed for.
      flag: by which it was given, for messages.

    Raises:
      UserError: it cannot be read, is empty, damaged or not UTF-8, or a column is missing; also while rows are read,
        and then too when the file is not the one that was scanned.
    """

    def __init__(self, path: Path, needed: Mapping[str, str], flag: str = "--manifest") -> None:
        self.path, self.needed, self.flag = path, needed, flag
        self._format = FORMATS[path.suffix.lower()]
        self._signature = self._signed()
        self._rows: Iterator[TableRow | Refused] = iter(())
        self._number = 0  # of the row that `_rows` gives next; 0 before it was begun

    def scan(self, digest: Digest) -> Iterator[TableRow | Refused]:
        with self._opened() as file:
            hashlib.file_digest(file, lambda: digest)  # pyright: ignore[reportArgumentType]
        return self._all()

    def read(self, first: int, count: int) -> list[TableRow | Refused]:
        if self._signed() != self._signature:
            raise UserError(f"{self.path} was changed while it was in use; start again")
        if not 0 < self._number <= first:  # units are read in order; one that lies behind is found from the beginning
            self._rows, self._number = self._all(), 0
        before = first - self._number
        rows = list(islice(self._rows, before, before + count))
        self._number = first + len(rows)
        return rows

    def _all(self) -> Iterator[TableRow | Refused]:
        try:
            with self._opened() as file:
                if what := impostor(file.read(HEAD)):
                    raise UserError(f"{self.path}: {what}")
                file.seek(0)
                yield from self._format(self, file)
        except UnicodeError as error:
            raise UserError(f"{self.path}: {error}, and give that with {self.flag}=FILE") from error

    def _opened(self) -> BinaryIO:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}; give another with {self.flag}=FILE") from error

    def _signed(self) -> tuple[int, int]:
        """By which the file is known again."""
        try:
            found = self.path.stat()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"{self.path}: {why}; give another with {self.flag}=FILE") from error
        if not self.path.is_file():
            raise UserError(f"{self.path} is no file; give one with {self.flag}=FILE, or a folder with --videos=FOLDER")
        if not found.st_size:
            raise UserError(f"{self.path} is empty; give another with {self.flag}=FILE")
        return found.st_size, found.st_mtime_ns

    def require(self, columns: Sequence[str], needed: Mapping[str, str]) -> None:
        """Raises `UserError` unless each needed column is among these once."""
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
    """Why the beginning of a text is not UTF-8, or likely is not meant as such, and what to do; None if it may be."""
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
    """What separates the columns, and how many lines come before the header: what the first line says, or else by which
    the header has the columns that are needed, or the most."""
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
                raise UserError(f"{table.path}: its first line is no header: {error}; write one again") from error
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
    """There is no header: a column is there when any row has it."""
    missing, first = set(table.needed.values()), None
    for number, text in enumerate(_lines(file), 1):
        if not text.strip():
            continue
        if first is None and (text.lstrip().startswith("[") or text.strip() == "{"):
            what, how = ("a JSON array", "'.[]'") if "[" in text else ("JSON of several lines an object", ".")
            raise UserError(
                f"{table.path} is {what}, expected an object a line; convert it with `jq -c {how}`, and give that with "
                f"{table.flag}=FILE"
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
            yield Refused("row", f"line {number}: no JSON object")
    if first is not None:
        table.require([*first], {use: column for use, column in table.needed.items() if column in missing})


def _captions(table: TableFile, file: BinaryIO) -> Iterator[TableRow | Refused]:
    """A caption a line; empty lines are left out."""
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
                    f"{table.path}: column {table.needed[use]!r} for the {use} holds {kind}, expected text; "
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
            f"{table.path} is damaged, or no Parquet file ({why}); give another with {table.flag}=FILE"
        ) from error


def _rows(batch: pa.RecordBatch) -> list[TableRow | Refused]:
    """Rows in Python's types; one with a value that has none, as text that is not UTF-8, costs itself alone."""
    try:
        return batch.to_pylist()
    except DAMAGED as error:
        if batch.num_rows == 1:
            return [Refused("row", f"cannot be read: {error}")]
        return [row for i in range(batch.num_rows) for row in _rows(batch.slice(i, 1))]


def _is_plain(kind: pa.DataType) -> bool:
    """Whether values are texts or numbers."""
    kind = kind.value_type if isinstance(kind, pa.DictionaryType) else kind
    types = pa.types
    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return any(test(kind) for test in tests)


def _span(first: int, last: int) -> str:
    """The lines of a row, for people."""
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
    """The rows of a table, numbered and cut into units, which are read in any order, in ascending order by one pass.

    Args:
      table: where they are read.
      size: rows of a unit.
      name: a row's id, or raises `Refused` for a row that has none.

    Attributes:
      count, units: how many there are.
      digest: 16 hexadecimal digits of all that decides them.

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
        """How many rows a unit has."""
        return min(self.size, self.count - unit * self.size)

    def read(self, unit: int) -> Iterator[tuple[int, TableRow | Refused, bool]]:
        """A unit's rows: number from 0, values, and whether a row before it has the same id.

        Ids are compared by 8 bytes of their hash: that one of a million is taken for another has a chance of 3e-8.

        Raises:
          IndexError: no such unit.
          UserError: the table was changed since it was scanned, or is gone.
        """
        if not 0 <= unit < self.units:
            raise IndexError(f"unit {unit} of {self.units}")
        for number, row in enumerate(self._table.read(unit * self.size, self.rows_of(unit)), unit * self.size):
            yield number, row, bool(self._repeated[number])


def repeated(hashes: UInt64[np.ndarray, "rows"]) -> Bool[np.ndarray, "rows"]:
    """Of which rows the hash came before; 0 stands for no id."""
    result = hashes != 0
    result[np.unique(hashes, return_index=True)[1]] = False
    return result


def _hash(row: TableRow | Refused, name: Callable[[TableRow], str]) -> int:
    """64 bits of a row's id; 0 for a row that has none."""
    try:
        if isinstance(row, Refused):
            raise row
        found = name(row)
    except Refused:
        return 0
    return int.from_bytes(hashlib.blake2b(found.encode(), digest_size=8).digest(), "little") or 1
