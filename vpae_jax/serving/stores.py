"""What the server keeps for its pages, under random names and within bounds: clips as files, images in memory."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

from vpae_jax.media import Frames, Picture, write_video

MAX_CLIPS, MAX_CLIP_BYTES = 512, 2**30
MAX_IMAGES, MAX_PICTURE_BYTES = 64, 2**28

Item = TypeVar("Item")


class Store(Generic[Item]):
    """Keeps the newest items; the oldest ones leave when a bound is exceeded. The newest one always stays.

    Args:
      most: items.
      weight: their weights' sum at most.
      leaves: called with an item that is dropped.
    """

    def __init__(self, most: int, weight: int, leaves: Callable[[Item], object] = lambda item: None) -> None:
        self._most, self._bound, self._leaves = most, weight, leaves
        self._items: OrderedDict[str, tuple[Item, int]] = OrderedDict()
        self._lock = Lock()

    def add(self, item: Item, weight: int) -> str:
        """Keeps an item; returns its name."""
        name = secrets.token_urlsafe(16)
        with self._lock:
            self._items[name] = item, weight
            while len(self._items) > 1 and (len(self._items) > self._most or self._total() > self._bound):
                self._leaves(self._items.popitem(last=False)[1][0])
        return name

    def get(self, name: str) -> Item | None:
        """An item by its name; None for one that is unknown, or has left."""
        with self._lock:
            found = self._items.get(name)
        return None if found is None else found[0]

    def _total(self) -> int:
        return sum(weight for _, weight in self._items.values())


def picture_store() -> Store[Picture]:
    """Uploaded first frames."""
    return Store(MAX_IMAGES, MAX_PICTURE_BYTES)


class Clips:
    """Clips as .mp4 files in a folder.

    Args:
      folder: temporary, of this server alone.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: Store[Path] = Store(MAX_CLIPS, MAX_CLIP_BYTES, lambda path: path.unlink(missing_ok=True))

    def keep(self, frames: Frames, fps: float) -> str:
        """Writes a clip; returns its name. Raises `UserError` for sizes that H.264 cannot hold, and a full disk."""
        file = self._folder / f"{secrets.token_hex(8)}.mp4"
        write_video(file, frames, fps)
        return self._files.add(file, file.stat().st_size)

    def file(self, name: str) -> Path | None:
        """A clip's file; None for one that is unknown, or has left."""
        return self._files.get(name)
