"""The clips of an evaluation on disk, each with what was measured of it, so that none is made twice.

    FOLDER/00012.latents.npz    the clip's latents, and what making it took
    FOLDER/00012.mp4            the clip
    FOLDER/00012.measures.npz   what was measured of it, and by what

Each file is there whole or not at all. Measures that something else has measured, as with fewer packages, are as good
as absent: they are taken anew from the latents.
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
# What the reader of such files raises of one that is damaged.
DAMAGE = (ValueError, KeyError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Shelf:
    """Archives in one folder, each for what its clips are made from.

    Attributes:
      folder: where they lie.
      by: what measures.
    """

    folder: Path
    by: str

    def archive(self, name: str, identity: Mapping[str, Any]) -> Archive:
        """The archive of a row, which may have been called something else when it was begun.

        Args:
          name: what people call it.
          identity: all that decides its clips, as plain JSON.
        """
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        begun = sorted(self.folder.glob(f"*-{digest}"))
        return Archive(begun[0] if begun else self.folder / f"{file_name(name)}-{digest}", self.by)


class Archive:
    """A folder of clips by their index.

    Args:
      folder: made when something is kept.
      by: what measures. Measures by something else count for nothing.
    """

    def __init__(self, folder: Path, by: str) -> None:
        self.folder, self.by = folder, by

    def video(self, index: int) -> Path:
        """Where a clip lies, if it is there."""
        return self._path(index, "mp4")

    def without_latents(self, indices: Iterable[int]) -> list[int]:
        """Those of the clips that have not been made."""
        return [index for index in indices if not self._path(index, "latents.npz").exists()]

    def without_measures(self, indices: Iterable[int]) -> list[int]:
        """Those of the clips that have not been decoded and measured."""
        return [index for index in indices if self.measures(index) is None]

    def keep_latents(
        self, index: int, latents: Float[np.ndarray, "f h w c"], cost: Mapping[str, float] | None = None
    ) -> None:
        """Keeps what a clip is decoded from, and what making it took, by what was done."""
        self._write(index, "latents.npz", {LATENTS: latents, **_costs(cost)})

    def latents(self, index: int) -> Float[np.ndarray, "f h w c"] | None:
        """What a clip is decoded from; None where it is not there."""
        return (self._read(index, "latents.npz") or {}).get(LATENTS)

    def keep_video(self, index: int, frames: Frames, fps: float) -> None:
        """Keeps a clip as people see it."""
        write_video(self.video(index), frames, fps)

    def keep(
        self, index: int, measures: Mapping[str, Shaped[np.ndarray, "..."]], cost: Mapping[str, float] | None = None
    ) -> None:
        """Keeps what was measured of a clip, whose video is kept before: nothing of one that is not finite."""
        self._write(index, "measures.npz", {**measures, BY: np.array(self.by), **_costs(cost)})

    def measures(self, index: int) -> dict[str, Shaped[np.ndarray, "..."]] | None:
        """What was measured of a clip; None where nothing has been, or something else has measured it."""
        found = self._read(index, "measures.npz")
        if found is None or BY not in found or str(found.pop(BY)) != self.by:
            return None
        return {name: value for name, value in found.items() if not name.startswith(COST)}

    def all_measures(self, indices: Sequence[int]) -> dict[str, Shaped[np.ndarray, "n ..."]] | None:
        """Of clips that have all been measured: arrays with a row for each; None if some are not finite."""
        rows = [self.measures(index) or {} for index in indices]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]} if all(rows) else None

    def costs(self, index: int) -> dict[str, float]:
        """What a clip took, as far as it is known."""
        found = {**(self._read(index, "latents.npz") or {}), **(self._read(index, "measures.npz") or {})}
        return {name.removeprefix(COST): float(found[name]) for name in found if name.startswith(COST)}

    def tidy(self) -> None:
        """Removes what killed processes have left; nobody makes clips any more."""
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
        """A file's arrays. One that a fault of the disk has damaged is put aside."""
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
    """What a row's files are called."""
    return re.sub(r"[^\w.+-]+", "_", name.replace(",", ""))


def _costs(cost: Mapping[str, float] | None) -> dict[str, np.float64]:
    return {COST + name: np.float64(value) for name, value in (cost or {}).items()}
