"""Captions alone, unit by unit: what clips are made for, by a teacher (`encoding.synthetic`) or by the student that is
trained (`encoding.prompts`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vpae_jax.encoding.cells import id_of, printable, rest_of, shown, text_of
from vpae_jax.encoding.clip_source import Reject
from vpae_jax.encoding.filters import Filters
from vpae_jax.encoding.identity import Identity
from vpae_jax.encoding.pictures import Pictures
from vpae_jax.encoding.tables import FORMATS, OF_JSON, TABLES, Refused, RowUnits, TableFile, TableRow
from vpae_jax.media import Picture
from vpae_jax.types import UserError


@dataclass(frozen=True)
class Prompt:
    """A caption to make a clip for.

    Attributes:
      id: unique in its source.
      number: of its row, from 0.
      caption: what is to be shown.
      about: the other columns of its row, as plain JSON.
      image: file of the first frame that is given, relative to its folder; None where none is.
      picture: what that shows.
    """

    id: str
    number: int
    caption: str
    about: Mapping[str, Any] = field(default_factory=dict)
    image: str | None = None
    picture: Picture | None = None


class Captions:
    """The captions of a file in its order, cut into units. Its identity is all that decides them.

    Args:
      file: .txt with a caption a line, or a table as `Manifest` reads them.
      column: of a table, the one that holds captions.
      id: of a table, the one that holds ids, of equal ones of which the first is kept; None for `row 1`, `row 2`, ...
      unit: rows of a unit.
      filters: of which those of captions are used.
      flag: by which the file was given, for messages.
      pictures: where first frames are; None where none are given. Those of rows without ids are called by the row's
        number, from 1.

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
        flag: str = "--captions",
        pictures: Pictures | None = None,
    ) -> None:
        self.kind = flag.removeprefix("--")
        if unit < 1:
            raise UserError(f"units of {unit} {self.kind}; expected 1 or more")
        self.column, self.id, self.unit, self.filters = column, id, unit, filters or Filters()
        self.pictures = pictures
        if file.suffix.lower() not in FORMATS:
            raise UserError(
                f"{file}: a file of {self.kind} ends in one of {' '.join(FORMATS)}; give one with {flag}=FILE"
                f"{OF_JSON if file.suffix == '.json' else ''}"
            )
        uses = {"caption": column, "id": id, "image": None if pictures is None else pictures.column}
        self._used = {use: name for use, name in uses.items() if name is not None}
        for use in ("id", "image"):
            if use in self._used and file.suffix.lower() not in TABLES:
                what = f"{file} has a caption a line and no column {self._used[use]!r}"
                raise UserError(f"{what}; leave out {use}= in --columns")
        self._rows = RowUnits(TableFile(file, self._used, flag), unit, self._id)
        if not self._rows.count:
            raise UserError(f"{file} has no rows; give other {self.kind} with {flag}=FILE")
        self.rows, self.units, self.digest = self._rows.count, self._rows.units, self._rows.digest

    @property
    def identity(self) -> Identity:
        """All that decides them, by the names of the flags."""
        bounds = {"min_caption": self.filters.min_caption, "max_caption": self.filters.max_caption}
        columns: dict[str, Any] = {"column": self.column, "id": self.id}
        if self.pictures is not None:
            columns["images"] = {"column": self.pictures.column}
        return {"kind": self.kind, "digest": self.digest, **columns, "unit": self.unit, **bounds}

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
                    name = self._id(row)
                if repeated:
                    raise Refused("duplicate", f"a row before it has the same {self.id!r}, {shown(name)}")
                caption = text_of(row, self.column, "caption").strip()
                if refusal := self.filters.caption(caption):
                    raise Refused(*refusal)
                image = picture = None
                if self.pictures is not None:
                    image, picture = self.pictures.of(row, name if self.id is not None else str(number + 1))
                yield Prompt(name, number, caption, rest_of(row, self._used.values()), image, picture)
            except Refused as refused:
                yield Reject(name, refused.kind, printable(refused.reason))

    def _id(self, row: TableRow) -> str:
        """A row's id. Raises `Refused` when it has none."""
        if self.id is None:
            raise Refused("id", "no id")
        return id_of(row, self.id)
