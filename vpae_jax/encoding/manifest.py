"""Which videos there are, and what they show: a folder with captions beside the videos, or a table that lists them."""

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
    """Which column of a table says what.

    Attributes:
      path: the video's file, relative to the folder of the videos or absolute within it. A name without a video's
        suffix stands for the file of that name, or else for the first there is of NAME.mp4, NAME.mov, ...
      caption: what it shows.
      id: unique in the table; None for the path, with the times where the table gives some: v.mp4@1.5-3.2.
      start, end: the part that is meant, in seconds, or as 1:02:03.5; empty for the video's beginning and end.
      cuts: times of shot cuts: a list, or text as "[1.5, 0:03.2]" or "1.5 3.2".
      span: start and end in one column, written like cuts.
      stem: a regular expression that matches the whole of what `path` holds; its first group is the file's name.
      image: of prompts, the file of the first frame (`encoding.pictures`); videos have their own.
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
            raise UserError(f"column {self.span!r} holds start and end; leave out start= and end= in --columns")

    def used(self) -> dict[str, str]:
        """The columns, by what they are used for."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "stem"}
        return {use: column for use, column in found.items() if column is not None}


_BESIDE = Columns(**{key: key for key in TIME_KEYS})


class Manifest:
    """Captioned videos in a fixed order, cut into units. Its identity is all that decides them but where they lie.

    A table is read once when the manifest is made, and once more for its units in ascending order. Every
    row becomes one `CaptionedVideo` or one `Reject`; its kinds are
      "row": it cannot be read, or has too few or too many fields;
      "path": no name, one that leads out of the folder (by .., as an absolute path, or over links), or no regular file;
      "missing": no such file;
      "id": none, or no text;
      "duplicate": a row before it has this id;
      "caption": none, empty, or no text that can be written as UTF-8;
      "time": start, end or cuts that are no times.

    Args:
      root: the folder of the videos.
      file: a table that lists them: .csv or .tsv with a header, .jsonl or .ndjson, .parquet or .pq; None for all videos
        in the folder, at any depth, with captions beside them (see `listing.FolderTable`).
      columns: of the table.
      unit_videos: rows of a unit.
      flag: by which the folder was given, for messages.

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
            raise UserError(f"{root}: {what}; give the folder of the videos with {flag}=FOLDER")
        if unit_videos < 1:
            raise UserError(f"units of {unit_videos} videos; expected 1 or more")
        self.root, self.unit_videos = Path(os.path.realpath(root)), unit_videos
        self._roots = (str(self.root), os.path.abspath(root))
        self.columns = columns = _BESIDE if file is None else columns or Columns()
        self._listed = file is not None
        self._stem = None if columns.stem is None else re.compile(columns.stem)
        times = [column for column in (columns.start, columns.end, columns.span) if column is not None]
        # A video of a folder is there once. Rows of a table may be parts of one.
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
        """How many rows a unit has."""
        return self._rows.rows_of(unit)

    def read(self, unit: int) -> Iterator[CaptionedVideo | Reject]:
        """A unit's rows.

        Raises:
          IndexError: no such unit.
          UserError: the table was changed since it was scanned, or is gone.
        """
        for number, row, repeated in self._rows.read(unit):
            yield self._judged(number, row, repeated)

    def _judged(self, number: int, row: TableRow | Refused, repeated: bool) -> CaptionedVideo | Reject:
        name = f"row {number + 1}"
        try:
            if isinstance(row, Refused):
                raise row
            name = self._name(row)  # for a reject whose times are none
            name = self._id(row)
            if repeated:
                raise Refused("duplicate", self._same(name))
            return self._entry(name, row)
        except Refused as refused:
            return Reject(name, refused.kind, printable(refused.reason))

    def _name(self, row: TableRow) -> str:
        """What a row says it is called. Raises `Refused` when it has no name."""
        if self.columns.id is not None:
            return id_of(row, self.columns.id)
        name = text_of(row, self.columns.path, "path")
        for root in self._roots:  # ./v.mp4 is v.mp4, and so is FOLDER/v.mp4
            whole = os.path.normpath(os.path.join(root, name))
            if whole.startswith(root + "/"):
                return whole.removeprefix(root + "/")
        return PurePath(name).as_posix()

    def _id(self, row: TableRow) -> str:
        """A row's name, and the part of a video that it is, where that tells it from others. Raises `Refused`."""
        name = self._name(row)
        start, end = self._part(row) if self._parts else (None, None)
        if not start and end is None:
            return name
        return f"{name}@{start or 0.0:.15g}-" + ("" if end is None else f"{end:.15g}")

    def _same(self, name: str) -> str:
        """Why a row is a duplicate, and the remedy where its id may not be meant."""
        if self.columns.id is not None:
            return f"a row before it has the same {self.columns.id!r}, {shown(name)}"
        what = "path and times" if self._parts else "path"
        return f"a row before it has the same {what}, {shown(name)}; give rows ids with --columns=...,id=COLUMN"

    def _part(self, row: TableRow) -> tuple[float | None, float | None]:
        """The part of the video that is meant, in seconds. Raises `Refused` for times that are none."""
        columns = self.columns
        if columns.span is not None:
            times = times_of(row, columns.span)
            if len(times) not in (0, 2):
                raise Refused("time", f"{columns.span} {shown(row[columns.span])} is no start and end")
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
        """The file that a table's name stands for. Raises `Refused` for none."""
        if self._stem is not None:
            match = self._stem.fullmatch(name)
            if match is None:
                raise Refused("path", f"{shown(name)} is not of the form {self.columns.stem}")
            name = match[1]
        refusals: list[Refused] = []
        for candidate in (name,) if is_video(name) else (name, *(name + suffix for suffix in SUFFIXES)):
            try:
                regular_file(str(self.root), candidate)
                # An absolute one may get here by another way than the root does.
                return Path(os.path.realpath(candidate)) if os.path.isabs(candidate) else self.root / candidate
            except Refused as refused:
                refusals.append(refused)
        # Of several names that it may stand for, what is wrong with one that is there.
        why = next((one for one in refusals if one.kind != "missing" or isinstance(one, Linked)), refusals[0])
        raise Refused(why.kind, f"{shown(name)} {why.reason}") from why


def _table(root: Path, file: Path | None, columns: Columns, flag: str) -> Table:
    if file is None:
        return FolderTable(root, flag)
    if file.suffix.lower() not in TABLES:
        raise UserError(
            f"{file}: a manifest's name ends in one of {' '.join(TABLES)}; give one with --manifest=FILE, "
            f"or a folder of videos with --videos=FOLDER{OF_JSON if file.suffix == '.json' else ''}"
        )
    return TableFile(file, columns.used())
