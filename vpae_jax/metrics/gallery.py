"""The clips of a page, each stored once, in the page or in a folder next to it, with a poster image."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

from vpae_jax.files import refused_writes
from vpae_jax.media import read_stream
from vpae_jax.metrics.rows import Row
from vpae_jax.pages import jpeg

POSTER_SIDE = 640  # maximum length of a poster's longer side, in pixels
SMALL = 160  # clips with both sides below this many pixels are enlarged, without smoothing


def stems(rows: Sequence[Row]) -> dict[str, str]:
    """The stem of each row's file names, by row name; no two are equal."""
    found: dict[str, str] = {}
    for row in rows:
        plain = re.sub(r"[^\w.-]+", "_", row.name.replace(",", "")).lstrip(".") or "row"
        taken, number, stem = {one.lower() for one in found.values()}, 1, plain  # some file systems ignore case
        while stem.lower() in taken:
            number += 1
            stem = f"{plain}_{number}"
        found[row.name] = stem
    return found


class Gallery:
    """The clips that a page shows, by name.

    Args:
      rows: the rows that they belong to.
      frames: number of frames of a clip; the middle one is its poster.
    """

    def __init__(self, rows: Sequence[Row], frames: int) -> None:
        self._rows, self._stems, self._middle = {row.name: row for row in rows}, stems(rows), frames // 2
        self._files: dict[str, Path] = {}
        self._pictures: dict[str, str] = {}
        self.height = self.width = 0  # of the clips, once there is one

    def add(self, row: Row, half: str, index: int) -> str | None:
        """Adds a clip to the page and returns its name; None if the row does not have it.

        Raises:
          UserError: its file is missing, or cannot be decoded.
        """
        if index >= len(row.files.get(half, ())):
            return None
        name, file = f"{half}_{self._stems[row.name]}_{index}", row.files[half][index]
        if name not in self._files:
            self._files[name], self._pictures[name] = file, self._picture(file)
        return name

    @property
    def small(self) -> bool:
        """Whether the clips are shown enlarged."""
        return max(self.height, self.width) < SMALL

    @property
    def bytes(self) -> int:
        """Total size of all clips."""
        return sum(file.stat().st_size for file in self._files.values())

    def within(self) -> tuple[dict[str, str], dict[str, str]]:
        """Data URLs of clips and posters, which contain them."""
        clips = {name: base64.b64encode(file.read_bytes()).decode() for name, file in self._files.items()}
        return (
            {name: f"data:video/mp4;base64,{clip}" for name, clip in clips.items()},
            {name: f"data:image/jpeg;base64,{picture}" for name, picture in self._pictures.items()},
        )

    def write(self, folder: Path, called: str) -> tuple[dict[str, str], dict[str, str]]:
        """Writes clips and posters into a new folder, and returns their URLs relative to a page next to it, once the
        folder is renamed to `called`. Raises `UserError` if writing fails."""
        with refused_writes(folder):
            folder.mkdir()
            for name, file in self._files.items():
                shutil.copyfile(file, folder / f"{name}.mp4")
                (folder / f"{name}.jpg").write_bytes(base64.b64decode(self._pictures[name]))
        beside = {name: f"{quote(called)}/{quote(name)}" for name in self._files}
        return (
            {name: f"{address}.mp4" for name, address in beside.items()},
            {name: f"{address}.jpg" for name, address in beside.items()},
        )

    def _picture(self, file: Path) -> str:
        *_, frame = islice(read_stream(file), self._middle + 1)
        self.height, self.width = frame.shape[:2]
        picture = Image.fromarray(frame)
        picture.thumbnail((POSTER_SIDE, POSTER_SIDE))
        return jpeg(np.asarray(picture))
