"""Captions alone, unit by unit: what a teacher makes clips for (`encoding.synthetic`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from vpae_jax.encoding.cells import id_of, printable, rest_of, shown, text_of
from vpae_jax.encoding.clip_source import Reject
from vpae_jax.encoding.filters import Filters
from vpae_jax.encoding.identity import Identity
from vpae_jax.encoding.rows import TABLES, Rows, open_table
from vpae_jax.encoding.tables import Digest, Place, Refused, Table, TableRow, lines_of, signature
from vpae_jax.types import UserError

LINES = (".txt",)


@dataclass(frozen=True)
class Prompt:
    """A caption to make a clip for.

    Attributes:
      id: unique in its source.
      number: of its row, from 0.
      caption: what is to be shown.
      about: the other columns of its row, as plain JSON.
    """

    id: str
    number: int
    caption: str
    about: Mapping[str, Any] = field(default_factory=dict)


class Captions:
    """The captions of a file in its order, cut into units. Its identity is all that decides them.

    Args:
      file: .txt with a caption a line, or a table as `Manifest` reads them.
      column: of a table, the one that holds captions.
      id: of a table, the one that holds ids, of equal ones of which the first is kept; None for `row 1`, `row 2`, ...
      unit: rows of a unit.
      filters: of which those of captions are used.

    Raises:
      UserError: an empty unit, an unknown suffix, a file that is empty, damaged or not UTF-8, a missing column.
    """

    def __init__(
        self,
        file: Path,
        column: str = "caption",
        id: str | None = None,
        unit: int = 4,
        filters: Filters | None = None,
    ) -> None:
        if unit < 1:
            raise UserError(f"units of {unit} captions; expected 1 or more")
        self.column, self.id, self.unit, self.filters = column, id, unit, filters or Filters()
        self._used = {"caption": column} if id is None else {"caption": column, "id": id}
        name = None if id is None else lambda row: id_of(row, id)
        self._rows = Rows(_table(file, self._used), [id or column], unit, name)
        if not self._rows.count:
            raise UserError(f"{file} has no rows; give other captions with --captions=FILE")
        self.rows, self.units, self.digest = self._rows.count, self._rows.units, self._rows.digest

    @property
    def identity(self) -> Identity:
        """All that decides them, by the names of the flags."""
        bounds = {"min_caption": self.filters.min_caption, "max_caption": self.filters.max_caption}
        columns = {"column": self.column, "id": self.id}
        return {"kind": "captions", "digest": self.digest, **columns, "unit": self.unit, **bounds}

    def rows_of(self, unit: int) -> int:
        """How many captions a unit has."""
        return self._rows.rows_of(unit)

    def read(self, unit: int) -> Iterator[Prompt | Reject]:
        """A unit's captions. Raises `UserError` when the file was changed since it was scanned."""
        for number, row, repeated in self._rows.read(unit):
            name = f"row {number + 1}"
            try:
                if isinstance(row, Refused):
                    raise row
                if self.id is not None:
                    name = id_of(row, self.id)
                if repeated:
                    raise Refused("duplicate", f"a row before it has the same {self.id!r}, {shown(name)}")
                caption = text_of(row, self.column, "caption").strip()
                if refusal := self.filters.caption(caption):
                    raise Refused(*refusal)
                yield Prompt(name, number, caption, rest_of(row, self._used.values()))
            except Refused as refused:
                yield Reject(name, refused.kind, printable(refused.reason))


class _OneALine:
    """A table of one column, a caption a line; empty lines are left out. Raises `UserError` as `TextTable`."""

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.column, self.signature = path, column, signature(path)

    def scan(self, keys: Sequence[str], digest: Digest) -> Iterator[tuple[Place, TableRow | Refused]]:
        return self._each(Place(0), digest)

    def rows(self, place: Place, count: int) -> Iterator[TableRow | Refused]:
        return (row for _, row in islice(self._each(place, None), count))

    def _each(self, place: Place, digest: Digest | None) -> Iterator[tuple[Place, TableRow | Refused]]:
        for where, text in lines_of(self.path, self.signature, place, digest):
            if isinstance(text, Refused):
                yield where, text
            elif text.strip():
                yield where, {self.column: text}


def _table(file: Path, used: Mapping[str, str]) -> Table:
    suffix = file.suffix.lower()
    if suffix in TABLES:
        return open_table(file, used)
    if suffix not in LINES:
        known = " ".join((*LINES, *TABLES))
        raise UserError(f"{file}: a file of captions ends in one of {known}; give one with --captions=FILE")
    if "id" in used:
        raise UserError(f"{file} has a caption a line and no column {used['id']!r}; leave out id= in --columns")
    return _OneALine(file, used["caption"])
