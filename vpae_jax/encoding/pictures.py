"""First frames of prompts: which image file belongs to which prompt, and its pixels."""

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
    """A folder of images, one per prompt.

    Attributes:
      folder: the folder; files must lie in it after following all links.
      column: the table's column with file names, relative to the folder. If None, a row's column "image" is used if it
        has one; else the file named after the prompt's id, with the suffix of an image.

    Raises:
      UserError: no such folder.
    """

    folder: Path
    column: str | None = None

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder; give the folder of the first frames with --images=FOLDER")

    def of(self, row: TableRow, name: str) -> tuple[str, Picture]:
        """Returns a prompt's file, relative to the folder, and its pixels.

        Args:
          row: the prompt's row.
          name: name of the file, without suffix, if the row does not give one: `name`.png or with another of
            `SUFFIXES`.

        Raises:
          Refused: "missing" if there is no such file, "path" if it lies elsewhere or is not a file, "image" if it
            cannot be read as an image.
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
    """Returns the image file with this name. Raises `Refused` if there is none."""
    for suffix in SUFFIXES:
        if os.path.lexists(os.path.join(root, name + suffix)):
            return name + suffix
    raise Refused("missing", f"no image {shown(name)}, with .png or another suffix, in the folder of the images")
