"""The clips of an evaluation on disk, each with its measurements, so that none is generated twice.

    FOLDER/00012.latents.npz    the clip's latents, and its costs
    FOLDER/00012.mp4            the clip
    FOLDER/00012.measures.npz   its measurements, and the code that made them

Each file is complete or absent. Measurements by other code, such as with fewer packages, are ignored: the latents are
measured again.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from vpae_jax.files import atomically, put_aside, remove_leftovers
from vpae_jax.media import Frames, write_video

LATENTS, BY = "latents", "measured by"
COST = "cost: "
# Exceptions that the reader of such files raises for a damaged one.
DAMAGE = (ValueError, KeyError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Shelf:
    """Archives in one folder, identified by what their clips are made from.

    Attributes:
      folder: where they are.
      by: identifies the measuring code.
    """

    folder: Path
    by: str

    def archive(self, name: str, identity: Mapping[str, Any]) -> Archive:
        """The archive of a row, which may have had another name when it was started.

        Args:
          name: its name.
          identity: everything that determines its clips, as plain JSON.
        """
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        begun = sorted(self.folder.glob(f"*-{digest}"))
        return Archive(begun[0] if begun else self.folder / f"{file_name(name)}-{digest}", self.by)


class Archive:
    """A folder of clips by their index.

    Args:
      folder: created on the first write.
      by: identifies the measuring code; measurements by other code are ignored.
    """

    def __init__(self, folder: Path, by: str) -> None:
        self.folder, self.by = folder, by

    def video(self, index: int) -> Path:
        """The path of a clip, whether it exists or not."""
        return self._path(index, "mp4")

    def without_latents(self, indices: Iterable[int]) -> list[int]:
        """The clips that have not been generated."""
        return [index for index in indices if not self._path(index, "latents.npz").exists()]

    def without_measures(self, indices: Iterable[int]) -> list[int]:
        """The clips that have not been decoded and measured."""
        return [index for index in indices if self.measures(index) is None]

    def keep_latents(
        self, index: int, latents: Float[np.ndarray, "f h w c"], cost: Mapping[str, float] | None = None
    ) -> None:
        """Stores a clip's latents, and its costs by kind."""
        self._write(index, "latents.npz", {LATENTS: latents, **_costs(cost)})

    def latents(self, index: int) -> Float[np.ndarray, "f h w c"] | None:
        """A clip's latents; None if they are missing."""
        return (self._read(index, "latents.npz") or {}).get(LATENTS)

    def keep_video(self, index: int, frames: Frames, fps: float) -> None:
        """Stores a clip as a video file."""
        write_video(self.video(index), frames, fps)

    def keep(
        self, index: int, measures: Mapping[str, Shaped[np.ndarray, "..."]], cost: Mapping[str, float] | None = None
    ) -> None:
        """Stores the measurements of a clip, after its video; empty for a clip that is not finite."""
        self._write(index, "measures.npz", {**measures, BY: np.array(self.by), **_costs(cost)})

    def measures(self, index: int) -> dict[str, Shaped[np.ndarray, "..."]] | None:
        """The measurements of a clip; None if there are none, or if other code made them."""
        found = self._read(index, "measures.npz")
        if found is None or BY not in found or str(found.pop(BY)) != self.by:
            return None
        return {name: value for name, value in found.items() if not name.startswith(COST)}

    def all_measures(self, indices: Sequence[int]) -> dict[str, Shaped[np.ndarray, "n ..."]] | None:
        """The measurements of measured clips, as arrays with a row per clip; None if some are not finite."""
        rows = [self.measures(index) or {} for index in indices]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]} if all(rows) else None

    def costs(self, index: int) -> dict[str, float]:
        """The costs of a clip, as far as known."""
        found = {**(self._read(index, "latents.npz") or {}), **(self._read(index, "measures.npz") or {})}
        return {name.removeprefix(COST): float(found[name]) for name in found if name.startswith(COST)}

    def tidy(self) -> None:
        """Removes what killed processes have left behind; to be called when no process generates clips any more."""
        remove_leftovers(self.folder)
        for lock in self.folder.glob("*.lock"):
            lock.unlink(missing_ok=True)

    def _path(self, index: int, ending: str) -> Path:
        return self.folder / f"{index:05d}.{ending}"

    def _write(self, index: int, ending: str, arrays: Mapping[str, Any]) -> None:
        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, **arrays)

        atomically(self._path(index, ending), write)

    def _read(self, index: int, ending: str) -> dict[str, np.ndarray] | None:
        """A file's arrays; None if it is missing. A damaged file is moved aside."""
        path = self._path(index, ending)
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                return dict(file)
        except FileNotFoundError:
            return None
        except DAMAGE:
            put_aside(path)
            return None


def file_name(name: str) -> str:
    """A row's name, made fit for file names."""
    return re.sub(r"[^\w.+-]+", "_", name.replace(",", ""))


def _costs(cost: Mapping[str, float] | None) -> dict[str, np.float64]:
    return {COST + name: np.float64(value) for name, value in (cost or {}).items()}
