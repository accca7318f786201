"""Which videos there are, and what they show: a folder with captions beside the videos, or a table that lists them.

A manifest is read once when it is made. What is kept of it does not depend on what its rows hold: where each unit
begins, and the numbers of the rows whose id came before. That takes about 30 bytes a row while it is read, and a
quarter of a byte afterwards.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt64

from vpae_jax.data.cells import plain, printable, shown, text_of, time_of, times_of
from vpae_jax.data.identity import Identity
from vpae_jax.data.listing import SUFFIXES, TIME_KEYS, FolderTable, is_video, regular_file
from vpae_jax.data.parquet import ParquetTable
from vpae_jax.data.source import Entry, Reject
from vpae_jax.data.tables import DELIMITERS, JSON_LINES, Place, Refused, Row, Table, TextTable
from vpae_jax.types import UserError

PARQUET = (".parquet", ".pq")


@dataclass(frozen=True)
class Columns:
    """Which column of a table says what.

    Attributes:
      path: the video's file, relative to the folder of the videos or absolute within it. A name without a video's
        suffix stands for the file of that name, or else for the first there is of NAME.mp4, NAME.mov, ...
      caption: what it shows.
      id: unique in the table; None for the path.
      start, end: the part that is meant, in seconds, or as 1:02:03.5; empty for the video's beginning and end.
      cuts: times of shot cuts: a list, or text as "[1.5, 0:03.2]" or "1.5 3.2".
      span: start and end in one column, written like cuts.
      stem: a regular expression that matches the whole of what `path` holds; its first group is the file's name.
    """

    path: str = "path"
    caption: str = "caption"
    id: str | None = None
    start: str | None = None
    end: str | None = None
    cuts: str | None = None
    span: str | None = None
    stem: str | None = None

    def __post_init__(self) -> None:
        if self.span is not None and (self.start is not None or self.end is not None):
            raise UserError(f"column {self.span!r} holds start and end; leave out start= and end= in --columns")

    def used(self) -> dict[str, str]:
        """The columns, by what they are used for."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "stem"}
        return {use: column for use, column in found.items() if column is not None}


_BESIDE = Columns(**{key: key for key in TIME_KEYS})


class Manifest:
    """Captioned videos in a fixed order, cut into units. Its identity is all that decides them but where they lie.

    Every row becomes one `Entry` or one `Reject`; its kinds are
      "row": it cannot be read, or has too few or too many fields;
      "path": no name, one that leads out of the folder (by .., as an absolute path, or over links), or no regular file;
      "missing": no such file;
      "id": none, or no text;
      "duplicate": a row before it has this id (ids are compared by 8 bytes of their hash: that one of a million is
        taken for another has a chance of 3e-8);
      "caption": none, empty, or no text that can be written as UTF-8;
      "time": start, end or cuts that are no times.

    Args:
      root: the folder of the videos.
      file: a table that lists them: .csv or .tsv with a header, .jsonl or .ndjson, .parquet or .pq; None for all videos
        in the folder, at any depth, with captions beside them (see `listing.FolderTable`).
      columns: of the table.
      unit_videos: rows of a unit.

    Raises:
      UserError: no such folder or file, an unknown suffix, a file that is empty, damaged or not UTF-8, a missing
        column.
    """

    def __init__(
        self, root: Path, file: Path | None = None, columns: Columns | None = None, unit_videos: int = 64
    ) -> None:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; give the folder of the videos with --videos=FOLDER")
        if unit_videos < 1:
            raise UserError(f"units of {unit_videos} videos; expected 1 or more")
        self.root, self.unit_videos = Path(os.path.realpath(root)), unit_videos
        self.columns = _BESIDE if file is None else columns or Columns()
        self._table = _table(self.root, file, self.columns)
        self._listed = file is not None
        self._stem = None if self.columns.stem is None else re.compile(self.columns.stem)
        digest = hashlib.sha256()
        places, hashes = array("Q"), array("Q")
        for place, row in self._table.scan([self.columns.id or self.columns.path], digest):
            if len(hashes) % unit_videos == 0:
                places.extend(place)
            hashes.append(self._hash(row))
        if not hashes:
            raise UserError(f"{file} has no rows; give another manifest with --manifest=FILE")
        self.rows = len(hashes)
        self.units = math.ceil(self.rows / unit_videos)
        self.digest = digest.hexdigest()[:16]
        self._places = np.array(places, np.uint64).reshape(self.units, 2)
        self._repeated = _repeated(np.frombuffer(hashes, np.uint64))

    @property
    def identity(self) -> Identity:
        columns = asdict(self.columns) if self._listed else None
        return {"digest": self.digest, "columns": columns, "unit": self.unit_videos}

    def rows_of(self, unit: int) -> int:
        """How many rows a unit has."""
        return min(self.unit_videos, self.rows - unit * self.unit_videos)

    def read(self, unit: int) -> Iterator[Entry | Reject]:
        """A unit's rows.

        Raises:
          IndexError: no such unit.
          UserError: the table was changed since it was scanned, or is gone.
        """
        if not 0 <= unit < self.units:
            raise IndexError(f"unit {unit} of {self.units}")
        first = unit * self.unit_videos
        count = self.rows_of(unit)
        low, high = np.searchsorted(self._repeated, [first, first + count])
        repeated = set(self._repeated[low:high].tolist())
        offset, line = self._places[unit].tolist()
        for number, row in enumerate(self._table.rows(Place(offset, line), count), first):
            yield self._judged(number, row, number in repeated)

    def _judged(self, number: int, row: Row | Refused, repeated: bool) -> Entry | Reject:
        name = f"row {number + 1}"
        try:
            if isinstance(row, Refused):
                raise row
            name = self._id(row)
            if repeated:
                raise Refused("duplicate", "a row before it has the same id")
            return self._entry(name, row)
        except Refused as refused:
            return Reject(name, refused.kind, printable(refused.reason))

    def _id(self, row: Row) -> str:
        """What a row is called. Raises `Refused` when it has no name."""
        if self.columns.id is None:
            return text_of(row, self.columns.path, "path")
        value = row.get(self.columns.id)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return text_of(row, self.columns.id, "id")

    def _hash(self, row: Row | Refused) -> int:
        """64 bits of a row's id; 0 for a row that has none."""
        if isinstance(row, Refused):
            return 0
        try:
            name = self._id(row)
        except Refused:
            return 0
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") or 1

    def _entry(self, name: str, row: Row) -> Entry:
        columns = self.columns
        path = self._path(text_of(row, columns.path, "path"))
        caption = text_of(row, columns.caption, "caption").strip()
        if columns.span is not None:
            times = times_of(row, columns.span)
            if len(times) not in (0, 2):
                raise Refused("time", f"{columns.span} {shown(row[columns.span])} is no start and end")
            start, end = times or (None, None)
        else:
            start, end = time_of(row, columns.start), time_of(row, columns.end)
        if end is not None and end <= (start or 0.0):
            raise Refused("time", f"ends at {end:g} s, begins at {start or 0.0:g} s")
        cuts = tuple(sorted(set(times_of(row, columns.cuts))))
        used = columns.used().values()
        rest = {plain(key): plain(value) for key, value in row.items() if key not in used}
        about = {str(key): value for key, value in rest.items() if key is not None and value is not None}
        return Entry(name, path, caption, start, end, cuts, about)

    def _path(self, name: str) -> Path:
        """The file that a table's name stands for. Raises `Refused` for none."""
        if self._stem is not None:
            match = self._stem.fullmatch(name)
            if match is None:
                raise Refused("path", f"{shown(name)} is not of the form {self.columns.stem}")
            name = match[1]
        first: Refused | None = None
        for candidate in (name,) if is_video(name) else (name, *(name + suffix for suffix in SUFFIXES)):
            try:
                regular_file(str(self.root), candidate)
                return self.root / candidate
            except Refused as refused:
                first = first or refused
        assert first is not None
        raise Refused(first.kind, f"{shown(name)} {first.reason}") from first


def _table(root: Path, file: Path | None, columns: Columns) -> Table:
    if file is None:
        return FolderTable(root)
    suffix = file.suffix.lower()
    if suffix in PARQUET:
        return ParquetTable(file, columns.used())
    if suffix in DELIMITERS or suffix in JSON_LINES:
        return TextTable(file, columns.used())
    known = " ".join((*DELIMITERS, *JSON_LINES, *PARQUET))
    raise UserError(
        f"{file}: a manifest's name ends in one of {known}; give one with --manifest=FILE, "
        f"or a folder of videos with --videos=FOLDER"
    )


def _repeated(hashes: UInt64[np.ndarray, "rows"]) -> Int[np.ndarray, "repeated"]:
    """Numbers of the rows whose hash came before, in order."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    return np.sort(order[1:][(ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)])
