"""Rows of CSV, TSV and JSON Lines files, read from the beginning or from any place noted before.

Tables are read as a stream: nothing of them is kept but what the caller keeps. A row that cannot be read is a `Refused`
among the others, and the next one is read as if it were not there.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, runtime_checkable

from vpae_jax.types import UserError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
# An open quote takes in all that follows: this is how much of a file one bad row can hide. It is also the limit of
# Python's csv on a field, which is a setting of the whole process and so never decides.
ROW_BYTES = 1 << 17
COLUMNS_SHOWN = 20

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


class Place(NamedTuple):
    """Where a row begins: its first byte and the lines before it in a text, its number elsewhere."""

    offset: int
    line: int = 0


@runtime_checkable
class Digest(Protocol):
    """What `hashlib` makes."""

    def update(self, data: bytes, /) -> None: ...


@runtime_checkable
class Table(Protocol):
    """Rows in a fixed order, each a mapping from column to value, or a `Refused`, or with some values `Refused`."""

    def scan(self, keys: Sequence[str], digest: Digest) -> Iterator[tuple[Place, TableRow | Refused]]:
        """All rows with at least the columns `keys`; `digest` takes in all that decides them."""
        ...

    def rows(self, place: Place, count: int) -> Iterator[TableRow | Refused]:
        """As many whole rows from a place that `scan` gave."""
        ...


class TextTable:
    """A CSV or TSV file with a header, or JSON Lines; in UTF-8, with or without a byte order mark.

    CSV is read strictly (RFC 4180): a quoted field may hold line breaks and doubled quotes, and a row whose quotes are
    broken, or whose number of fields is not the header's, is refused.

    Args:
      path: the file; its suffix names its format.
      needed: the columns that it must have, by what they are needed for.

    Raises:
      UserError: it cannot be read, is empty, is not UTF-8, or a column is missing; also while rows are read, and then
        too when the file is not the one that was scanned.
    """

    def __init__(self, path: Path, needed: Mapping[str, str]) -> None:
        self.path, self.needed = path, needed
        self.delimiter = DELIMITERS.get(path.suffix.lower())
        self.header: list[str] = []
        self.signature = signature(path)

    def scan(self, keys: Sequence[str], digest: Digest) -> Iterator[tuple[Place, TableRow | Refused]]:
        with open_unchanged(self.path, self.signature) as file:
            lines = _Lines(file, self.path, Place(0), digest)
            yield from self._csv(lines) if self.delimiter else self._checked_json(lines)

    def rows(self, place: Place, count: int) -> Iterator[TableRow | Refused]:
        with open_unchanged(self.path, self.signature) as file:
            file.seek(place.offset)
            lines = _Lines(file, self.path, place, None)
            found = self._csv(lines) if self.delimiter else self._json(lines)
            yield from (row for _, row in islice(found, count))

    def _csv(self, lines: _Lines) -> Iterator[tuple[Place, TableRow | Refused]]:
        reader = csv.reader(lines, delimiter=self.delimiter or ",", strict=True)
        while True:
            place = lines.begin()
            try:
                fields = next(reader)
            except StopIteration:
                return
            except (csv.Error, Refused) as error:
                if not self.header:
                    raise UserError(f"{self.path}: its first line is no header: {error}; write one again") from error
                yield place, Refused("row", f"{_span(place, lines)}: {error}")
                continue
            if not fields:
                continue
            if not self.header:
                self.header = fields
                require(self.path, fields, self.needed)
            elif len(fields) != len(self.header):
                reason = f"{_span(place, lines)}: {len(fields)} fields, expected {len(self.header)} as in the header"
                yield place, Refused("row", reason)
            else:
                yield place, dict(zip(self.header, fields, strict=True))

    def _checked_json(self, lines: _Lines) -> Iterator[tuple[Place, TableRow | Refused]]:
        """JSON Lines have no header: a column is there when any row has it."""
        seen: dict[str, None] = {}
        missing = set(self.needed.values())
        any_row = False
        for place, row in self._json(lines):
            any_row = True
            if isinstance(row, Mapping):
                missing.difference_update(row)
                if len(seen) <= COLUMNS_SHOWN:
                    seen.update(dict.fromkeys(islice(row, COLUMNS_SHOWN + 1)))
            yield place, row
        if any_row and missing:
            found = [*seen, *(column for column in self.needed.values() if column not in missing)]
            require(self.path, list(dict.fromkeys(found)), self.needed)

    def _json(self, lines: _Lines) -> Iterator[tuple[Place, TableRow | Refused]]:
        while True:
            place = lines.begin()
            try:
                text = next(lines)
                if not text.strip():
                    continue
                row = json.loads(text)
            except StopIteration:
                return
            except (ValueError, RecursionError, Refused) as error:
                yield place, Refused("row", f"{_span(place, lines)}: {_one_line(str(error))}")
                continue
            if isinstance(row, dict):
                yield place, row
            else:
                yield place, Refused("row", f"{_span(place, lines)}: no JSON object")


def lines_of(
    path: Path, known: tuple[int, int], place: Place, digest: Digest | None
) -> Iterator[tuple[Place, str | Refused]]:
    """The lines of an unchanged file from a place on; a line that is too long is a `Refused`."""
    with open_unchanged(path, known) as file:
        file.seek(place.offset)
        lines = _Lines(file, path, place, digest)
        while True:
            where = lines.begin()
            try:
                yield where, next(lines)
            except StopIteration:
                return
            except Refused as refused:
                yield where, refused


class _Lines:
    """Decoded lines of a file. A row that grows over the limit is left where it is, with a `Refused`."""

    def __init__(self, file: BinaryIO, path: Path, place: Place, digest: Digest | None) -> None:
        self.file, self.path, self.digest = file, path, digest
        self.offset, self.line = place
        self.row = self.offset

    def begin(self) -> Place:
        """Says that a row begins here."""
        self.row = self.offset
        return Place(self.offset, self.line)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = self._take()
        if not raw:
            raise StopIteration
        first = self.offset == len(raw)
        self.line += 1
        if self.offset - self.row > ROW_BYTES:
            while raw and not raw.endswith(b"\n"):
                raw = self._take()
            raise Refused("row", f"longer than {ROW_BYTES} bytes; are its quotes closed?")
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path}: line {self.line} is not UTF-8 (byte {raw[error.start]:#04x}); convert the file, "
                f"for instance with `iconv -f LATIN1 -t UTF-8`, and give that with --manifest=FILE"
            ) from error
        return text.removeprefix("\ufeff") if first else text

    def _take(self) -> bytes:
        raw = self.file.readline(ROW_BYTES + 1)
        self.offset += len(raw)
        if self.digest is not None:
            self.digest.update(raw)
        return raw


def require(path: Path, columns: Sequence[str], needed: Mapping[str, str]) -> None:
    """Raises `UserError` unless each needed column is there once."""
    for use, column in needed.items():
        if columns.count(column) == 1:
            continue
        names = ", ".join(repr(name[:40]) for name in columns[:COLUMNS_SHOWN])
        names += ", ..." if len(columns) > COLUMNS_SHOWN else ""
        trouble, remedy = ("more than one", "rename one, or name") if column in columns else ("no", "name")
        raise UserError(
            f"{path} has {trouble} column {column!r} for the {use}; it has {names or 'none'}; "
            f"{remedy} another with --columns={use}=COLUMN"
        )


def signature(path: Path) -> tuple[int, int]:
    """By which a file is known again. Raises `UserError` for one that is not there, or empty."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {_why(error)}; give a manifest with --manifest=FILE") from error
    if not path.is_file():
        raise UserError(f"{path} is no file; give a manifest with --manifest=FILE, or a folder with --videos=FOLDER")
    if not found.st_size:
        raise UserError(f"{path} is empty; give another manifest with --manifest=FILE")
    return found.st_size, found.st_mtime_ns


def open_unchanged(path: Path, known: tuple[int, int]) -> BinaryIO:
    """Opens a file, unless it was changed."""
    if signature(path) != known:
        raise UserError(f"{path} was changed while it was in use; start again")
    try:
        return path.open("rb", buffering=1 << 16)
    except OSError as error:
        raise UserError(f"{path}: {_why(error)}; give a manifest with --manifest=FILE") from error


def _why(error: OSError | ValueError) -> str:
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else _one_line(str(error))


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def _span(place: Place, lines: _Lines) -> str:
    """The lines of a row, for people."""
    first, last = place.line + 1, lines.line
    return f"line {first}" if last <= first else f"lines {first} to {last}"
