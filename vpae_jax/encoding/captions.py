"""Captions alone, unit by unit. Clips are generated for them by a teacher (`encoding.synthetic`), or later by the
student in training (`encoding.prompts`)."""

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
    """A caption for which a clip is to be generated.

    Attributes:
      id: unique in its source.
      number: number of its row, from 0.
      caption: what the clip should show.
      about: the other columns of its row, as plain JSON.
      image: file of the first frame, relative to the folder of images; None if no first frame is given.
      picture: pixels of that frame.
    """

    id: str
    number: int
    caption: str
    about: Mapping[str, Any] = field(default_factory=dict)
    image: str | None = None
    picture: Picture | None = None


class Captions:
    """The captions of a file in order, divided into work units.

    Args:
      file: .txt with one caption per line, or a table as read by `Manifest`.
      column: for a table, the column with captions.
      id: for a table, the column with ids, the first of equal ones being kept; None for `row 1`, `row 2`, ...
      unit: rows per unit.
      filters: only those of captions are applied.
      flag: the flag that named the file, for messages.
      pictures: the first frames; None if there are none. For rows without ids they are looked up by the row's number,
        from 1.

    Raises:
      UserError: a unit size below 1, an unknown suffix, a file that is empty, damaged or not UTF-8, a missing column.
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
                f"{file}: a file of {self.kind} must end in one of {' '.join(FORMATS)}; give one with {flag}=FILE"
                f"{OF_JSON if file.suffix == '.json' else ''}"
            )
        uses = {"caption": column, "id": id, "image": None if pictures is None else pictures.column}
        self._used = {use: name for use, name in uses.items() if name is not None}
        for use in ("id", "image"):
            if use in self._used and file.suffix.lower() not in TABLES:
                what = f"{file} has one caption per line and no column {self._used[use]!r}"
                raise UserError(f"{what}; leave out {use}= in --columns")
        self._rows = RowUnits(TableFile(file, self._used, flag), unit, self._id)
        if not self._rows.count:
            raise UserError(f"{file} has no rows; give another file with {flag}=FILE")
        self.rows, self.units, self.digest = self._rows.count, self._rows.units, self._rows.digest

    @property
    def identity(self) -> Identity:
        """Everything that determines the captions, by the names of the flags."""
        bounds = {"min_caption": self.filters.min_caption, "max_caption": self.filters.max_caption}
        columns: dict[str, Any] = {"column": self.column, "id": self.id}
        if self.pictures is not None:
            columns["images"] = {"column": self.pictures.column}
        return {"kind": self.kind, "digest": self.digest, **columns, "unit": self.unit, **bounds}

    def rows_of(self, unit: int) -> int:
        """Returns the number of captions in a unit."""
        return self._rows.rows_of(unit)

    def read(self, unit: int) -> Iterator[Prompt | Reject]:
        """Yields a unit's captions and rejects. Raises `UserError` if the file has changed since it was scanned."""
        for number, row, repeated in self._rows.read(unit):
            name = f"row {number + 1}"
            try:
                if isinstance(row, Refused):
                    raise row
                if self.id is not None:
                    name = self._id(row)
                if repeated:
                    raise Refused("duplicate", f"an earlier row has the same {self.id!r}, {shown(name)}")
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
        """Returns a row's id. Raises `Refused` if it has none."""
        if self.id is None:
            raise Refused("id", "no id")
        return id_of(row, self.id)
