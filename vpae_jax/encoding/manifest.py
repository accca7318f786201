"""Manifests list videos and their captions: a folder with caption files next to the videos, or a table."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePath

from vpae_jax.encoding.cells import id_of, printable, rest_of, shown, text_of, time_of, times_of
from vpae_jax.encoding.clip_source import CaptionedVideo, Reject
from vpae_jax.encoding.identity import Identity
from vpae_jax.encoding.listing import SUFFIXES, TIME_KEYS, FolderTable, Linked, is_video, regular_file
from vpae_jax.encoding.tables import OF_JSON, TABLES, Refused, RowUnits, Table, TableFile, TableRow
from vpae_jax.types import UserError


@dataclass(frozen=True)
class Columns:
    """The names of a table's columns, by use.

    Attributes:
      path: the video's file, relative to the folder of videos, or an absolute path within it. A name without a video
        suffix stands for the file of that name, or else for the first that exists of NAME.mp4, NAME.mov, ...
      caption: what the video shows.
      id: unique in the table; None to use the path, with the times if the table has any: v.mp4@1.5-3.2.
      start, end: the part of the video to use, in seconds or as 1:02:03.5; empty for its beginning and end.
      cuts: times of shot cuts: a list, or text such as "[1.5, 0:03.2]" or "1.5 3.2".
      span: start and end in one column, written like cuts.
      stem: a regular expression that must match the whole value of `path`; its first group is the file name.
      image: for prompts, the file of the first frame (`encoding.pictures`); not used for videos.
    """

    path: str = "path"
    caption: str = "caption"
    id: str | None = None
    start: str | None = None
    end: str | None = None
    cuts: str | None = None
    span: str | None = None
    stem: str | None = None
    image: str | None = None

    def __post_init__(self) -> None:
        if self.span is not None and (self.start is not None or self.end is not None):
            raise UserError(f"column {self.span!r} contains start and end; leave out start= and end= in --columns")

    def used(self) -> dict[str, str]:
        """Returns the columns in use, by use."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "stem"}
        return {use: column for use, column in found.items() if column is not None}


_BESIDE = Columns(**{key: key for key in TIME_KEYS})


class Manifest:
    """Captioned videos in a fixed order, divided into work units. Its identity is everything that determines them,
    except their location.

    A table is read once when the manifest is created, and once more for its units in ascending order. Every row becomes
    a `CaptionedVideo` or a `Reject`, of one of these kinds:
      "row": it cannot be read, or has too few or too many fields;
      "path": no name, one that leads out of the folder (by .., as an absolute path, or through links), or not a regular
        file;
      "missing": no such file;
      "id": missing, or not text;
      "duplicate": an earlier row has the same id;
      "caption": missing, empty, or not text that can be encoded as UTF-8;
      "time": start, end or cuts that are not times.

    Args:
      root: the folder of videos.
      file: a table that lists them: .csv or .tsv with a header, .jsonl or .ndjson, .parquet or .pq; None for all videos
        in the folder, at any depth, with caption files next to them (see `listing.FolderTable`).
      columns: columns of the table.
      unit_videos: rows per unit.
      flag: the flag that named the folder, for messages.

    Raises:
      UserError: no such folder or file, an unknown suffix, a file that is empty, damaged or not UTF-8, a missing
        column.
    """

    def __init__(
        self,
        root: Path,
        file: Path | None = None,
        columns: Columns | None = None,
        unit_videos: int = 64,
        flag: str = "--videos",
    ) -> None:
        if not root.is_dir():
            what = "is a file" if root.exists() else "no such folder"
            raise UserError(f"{root}: {what}; give the folder of videos with {flag}=FOLDER")
        if unit_videos < 1:
            raise UserError(f"units of {unit_videos} videos; expected 1 or more")
        self.root, self.unit_videos = Path(os.path.realpath(root)), unit_videos
        self._roots = (str(self.root), os.path.abspath(root))
        self.columns = columns = _BESIDE if file is None else columns or Columns()
        self._listed = file is not None
        self._stem = None if columns.stem is None else re.compile(columns.stem)
        times = [column for column in (columns.start, columns.end, columns.span) if column is not None]
        # In a folder, each video occurs once. In a table, several rows may be parts of the same video.
        self._parts = self._listed and columns.id is None and bool(times)
        self._rows = RowUnits(_table(self.root, file, columns, flag), unit_videos, self._id)
        if not self._rows.count:
            raise UserError(f"{file} has no rows; give another manifest with --manifest=FILE")
        self.rows, self.units, self.digest = self._rows.count, self._rows.units, self._rows.digest

    @property
    def identity(self) -> Identity:
        columns = {use: name for use, name in asdict(self.columns).items() if use != "image"} if self._listed else None
        return {"digest": self.digest, "columns": columns, "unit": self.unit_videos}

    def rows_of(self, unit: int) -> int:
        """Returns the number of rows in a unit."""
        return self._rows.rows_of(unit)

    def read(self, unit: int) -> Iterator[CaptionedVideo | Reject]:
        """Yields a unit's rows.

        Raises:
          IndexError: no such unit.
          UserError: the table has changed since it was scanned, or is gone.
        """
        for number, row, repeated in self._rows.read(unit):
            yield self._judged(number, row, repeated)

    def _judged(self, number: int, row: TableRow | Refused, repeated: bool) -> CaptionedVideo | Reject:
        name = f"row {number + 1}"
        try:
            if isinstance(row, Refused):
                raise row
            name = self._name(row)  # for a reject with invalid times
            name = self._id(row)
            if repeated:
                raise Refused("duplicate", self._same(name))
            return self._entry(name, row)
        except Refused as refused:
            return Reject(name, refused.kind, printable(refused.reason))

    def _name(self, row: TableRow) -> str:
        """Returns the name that a row gives. Raises `Refused` if it has none."""
        if self.columns.id is not None:
            return id_of(row, self.columns.id)
        name = text_of(row, self.columns.path, "path")
        for root in self._roots:  # ./v.mp4 and FOLDER/v.mp4 become v.mp4
            whole = os.path.normpath(os.path.join(root, name))
            if whole.startswith(root + "/"):
                return whole.removeprefix(root + "/")
        return PurePath(name).as_posix()

    def _id(self, row: TableRow) -> str:
        """Returns a row's name, with the part of the video if rows can differ in it. Raises `Refused`."""
        name = self._name(row)
        start, end = self._part(row) if self._parts else (None, None)
        if not start and end is None:
            return name
        return f"{name}@{start or 0.0:.15g}-" + ("" if end is None else f"{end:.15g}")

    def _same(self, name: str) -> str:
        """Returns why a row is a duplicate, with the remedy if its id is only inferred."""
        if self.columns.id is not None:
            return f"an earlier row has the same {self.columns.id!r}, {shown(name)}"
        what = "path and times" if self._parts else "path"
        return f"an earlier row has the same {what}, {shown(name)}; give rows ids with --columns=...,id=COLUMN"

    def _part(self, row: TableRow) -> tuple[float | None, float | None]:
        """Returns the selected part of the video, in seconds. Raises `Refused` for invalid times."""
        columns = self.columns
        if columns.span is not None:
            times = times_of(row, columns.span)
            if len(times) not in (0, 2):
                raise Refused("time", f"{columns.span} {shown(row[columns.span])} is not a start and an end")
            start, end = times or (None, None)
        else:
            start, end = time_of(row, columns.start), time_of(row, columns.end)
        if end is not None and end <= (start or 0.0):
            raise Refused("time", f"ends at {end:g} s, begins at {start or 0.0:g} s")
        return start, end

    def _entry(self, name: str, row: TableRow) -> CaptionedVideo:
        columns = self.columns
        path = self._path(text_of(row, columns.path, "path"))
        caption = text_of(row, columns.caption, "caption").strip()
        start, end = self._part(row)
        cuts = tuple(sorted(set(times_of(row, columns.cuts))))
        about = rest_of(row, columns.used().values())
        return CaptionedVideo(name, path, caption, start, end, cuts, about)

    def _path(self, name: str) -> Path:
        """Returns the file that a name in the table stands for. Raises `Refused` if there is none."""
        if self._stem is not None:
            match = self._stem.fullmatch(name)
            if match is None:
                raise Refused("path", f"{shown(name)} does not match {self.columns.stem}")
            name = match[1]
        refusals: list[Refused] = []
        for candidate in (name,) if is_video(name) else (name, *(name + suffix for suffix in SUFFIXES)):
            try:
                regular_file(str(self.root), candidate)
                # An absolute path may reach the folder through other links than the root.
                return Path(os.path.realpath(candidate)) if os.path.isabs(candidate) else self.root / candidate
            except Refused as refused:
                refusals.append(refused)
        # Of several candidates, report the error of one that exists.
        why = next((one for one in refusals if one.kind != "missing" or isinstance(one, Linked)), refusals[0])
        raise Refused(why.kind, f"{shown(name)} {why.reason}") from why


def _table(root: Path, file: Path | None, columns: Columns, flag: str) -> Table:
    if file is None:
        return FolderTable(root, flag)
    if file.suffix.lower() not in TABLES:
        raise UserError(
            f"{file}: a manifest's name must end in one of {' '.join(TABLES)}; give one with --manifest=FILE, "
            f"or a folder of videos with --videos=FOLDER{OF_JSON if file.suffix == '.json' else ''}"
        )
    return TableFile(file, columns.used())
