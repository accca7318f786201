"""Captions alone, unit by unit: what a teacher makes clips for (`data.synthetic`)."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from vpae_jax.data.cells import printable, text_of
from vpae_jax.data.filters import Filters
from vpae_jax.data.identity import Identity
from vpae_jax.data.manifest import PARQUET
from vpae_jax.data.parquet import ParquetTable
from vpae_jax.data.source import Reject
from vpae_jax.data.tables import DELIMITERS, JSON_LINES, Digest, Place, Refused, Row, Table, TextTable, lines_of
from vpae_jax.types import UserError

LINES = (".txt",)


@dataclass(frozen=True)
class Prompt:
    """A caption to make a clip for.

    Attributes:
      id: unique in its source.
      number: of its row, from 0.
      caption: what is to be shown.
    """

    id: str
    number: int
    caption: str


class Captions:
    """The captions of a file in its order, cut into units. Its identity is all that decides them.

    Args:
      file: .txt with a caption a line, or a table as `Manifest` reads them.
      column: of a table, the one that holds captions.
      unit: rows of a unit.
      filters: of which those of captions are used.

    Raises:
      UserError: an empty unit, an unknown suffix, a file that is empty, damaged or not UTF-8, a missing column.
    """

    def __init__(self, file: Path, column: str = "caption", unit: int = 4, filters: Filters | None = None) -> None:
        if unit < 1:
            raise UserError(f"units of {unit} captions; expected 1 or more")
        self.column, self.unit, self.filters = column, unit, filters or Filters()
        self._table = _table(file, column)
        digest, places, rows = hashlib.sha256(), array("Q"), 0
        for place, _ in self._table.scan([column], digest):
            if rows % unit == 0:
                places.extend(place)
            rows += 1
        if not rows:
            raise UserError(f"{file} has no rows; give other captions with --captions=FILE")
        self.rows, self.units, self.digest = rows, math.ceil(rows / unit), digest.hexdigest()[:16]
        self._places = np.array(places, np.uint64).reshape(self.units, 2)

    @property
    def identity(self) -> Identity:
        """All that decides them, by the names of the flags."""
        bounds = {"min_caption": self.filters.min_caption, "max_caption": self.filters.max_caption}
        return {"kind": "captions", "digest": self.digest, "column": self.column, "unit": self.unit, **bounds}

    def rows_of(self, unit: int) -> int:
        """How many captions a unit has."""
        return min(self.unit, self.rows - unit * self.unit)

    def read(self, unit: int) -> Iterator[Prompt | Reject]:
        """A unit's captions. Raises `UserError` when the file was changed since it was scanned."""
        offset, line = self._places[unit].tolist()
        rows = self._table.rows(Place(offset, line), self.rows_of(unit))
        for number, row in enumerate(rows, unit * self.unit):
            try:
                if isinstance(row, Refused):
                    raise row
                caption = text_of(row, self.column, "caption").strip()
                if refusal := self.filters.caption(caption):
                    raise Refused(*refusal)
                yield Prompt(f"row {number + 1}", number, caption)
            except Refused as refused:
                yield Reject(f"row {number + 1}", refused.kind, printable(refused.reason))


class _Lines(TextTable):
    """A caption a line; empty lines are left out."""

    def __init__(self, path: Path, column: str) -> None:
        super().__init__(path, {})
        self.column = column

    def scan(self, keys: Sequence[str], digest: Digest) -> Iterator[tuple[Place, Row | Refused]]:
        return self._each(Place(0), digest)

    def rows(self, place: Place, count: int) -> Iterator[Row | Refused]:
        return (row for _, row in islice(self._each(place, None), count))

    def _each(self, place: Place, digest: Digest | None) -> Iterator[tuple[Place, Row | Refused]]:
        for where, text in lines_of(self.path, self.signature, place, digest):
            if isinstance(text, Refused):
                yield where, text
            elif text.strip():
                yield where, {self.column: text}


def _table(file: Path, column: str) -> Table:
    suffix = file.suffix.lower()
    if suffix in LINES:
        return _Lines(file, column)
    if suffix in PARQUET:
        return ParquetTable(file, {"caption": column})
    if suffix in DELIMITERS or suffix in JSON_LINES:
        return TextTable(file, {"caption": column})
    known = " ".join((*LINES, *DELIMITERS, *JSON_LINES, *PARQUET))
    raise UserError(f"{file}: a file of captions ends in one of {known}; give one with --captions=FILE")
