"""First frames of prompts: which image file is whose, and what it shows."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vpae_jax.encoding.cells import shown, text_of
from vpae_jax.encoding.listing import regular_file
from vpae_jax.encoding.tables import Refused, TableRow
from vpae_jax.media import Picture, read_image
from vpae_jax.types import UserError

COLUMN = "image"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".PNG", ".JPG", ".JPEG", ".WEBP")


@dataclass(frozen=True)
class Pictures:
    """A folder of images, one a prompt.

    Attributes:
      folder: where they are; a file must lie in it, all links followed.
      column: of a table, the one that names files, relative to the folder. None: a row's column "image", if it has one;
        else the file that is called as the prompt is, with an image's suffix.

    Raises:
      UserError: no such folder.
    """

    folder: Path
    column: str | None = None

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder; give the folder of the first frames with --images=FOLDER")

    def of(self, row: TableRow, name: str) -> tuple[str, Picture]:
        """A prompt's file, relative to the folder, and its pixels.

        Args:
          row: the prompt's.
          name: what the file is called where the row does not name one: `name`.png or with another of `SUFFIXES`.

        Raises:
          Refused: "missing" where there is no such file, "path" for one that lies elsewhere or is none, "image" for one
            that cannot be read.
        """
        root = os.path.realpath(self.folder)
        column = self.column or (COLUMN if COLUMN in row else None)
        file = _called(root, name) if column is None else text_of(row, column, "image")
        try:
            regular_file(root, file, "the images")
        except Refused as refused:
            raise Refused(refused.kind, f"{shown(file)} {refused.reason}") from refused
        try:
            return file, read_image(Path(root, file))
        except UserError as error:
            raise Refused("image", str(error)) from error


def _called(root: str, name: str) -> str:
    """The image of a name. Raises `Refused` for none."""
    for suffix in SUFFIXES:
        if os.path.lexists(os.path.join(root, name + suffix)):
            return name + suffix
    raise Refused("missing", f"no image {shown(name)}, with .png or another suffix, in the folder of the images")
