"""What clips are made of before they are encoded: entries of a manifest, clips, and what was refused with its reason.

A source is cut into units: a unit is read, encoded and written by one process, as a whole or not at all. What a unit
holds depends on nothing but the source, so that a run that was killed, on other numbers of processes too, ends with the
same records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from vpae_jax.encoding.identity import Identity

T = TypeVar("T")


@dataclass(frozen=True)
class CaptionedVideo:
    """A video with its caption, as a folder or a manifest lists it.

    Attributes:
      id: unique in its source.
      path: the file.
      caption: what it shows.
      start, end: the part of the video that is meant, in seconds; None for its beginning and its end.
      cuts: times of shot cuts in seconds, from the video's beginning; no clip crosses one.
      about: the manifest's other columns, as plain JSON.
    """

    id: str
    path: Path
    caption: str
    start: float | None = None
    end: float | None = None
    cuts: tuple[float, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Clip:
    """Frames to encode.

    Attributes:
      id: unique in its source.
      video: 1 + a multiple of 4 frames.
      caption: what they show.
      about: where they come from and what was measured of them, as plain JSON.
    """

    id: str
    video: UInt8[np.ndarray, "t height width 3"]
    caption: str
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reject:
    """A video or a clip that is not used.

    Attributes:
      id: of the entry or the clip; a manifest's row number where it has none.
      kind: one or two words, by which rejects are counted: "unreadable", "too short", "static".
      reason: one line.
      picture: a small frame of it for the summary, where one could be read.
    """

    id: str
    kind: str
    reason: str
    picture: UInt8[np.ndarray, "height width 3"] | None = None


@runtime_checkable
class RandomAccess(Protocol):
    """Clips by number, as mappings with `id`, `video` and `caption`. Its identity is all that decides them."""

    @property
    def identity(self) -> Identity: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


@runtime_checkable
class ClipSource(Protocol):
    """Clips in a fixed order, in units. Its identity is all that decides them."""

    @property
    def identity(self) -> Identity: ...

    @property
    def units(self) -> int: ...

    def expected(self, unit: int) -> int | None:
        """How many clips and rejects a unit has; None where that shows when it is read."""
        ...

    def read(self, units: Iterable[int]) -> Iterator[Clip | Reject | None]:
        """What units have, in order, and None after each. Those that come next may be prepared meanwhile."""
        ...


class InUnits:
    """Clips by number, as a `ClipSource`.

    Args:
      clips: what a mapping of it holds besides id, video and caption is kept, unless it is an array.
      size: clips of a unit.
    """

    def __init__(self, clips: RandomAccess, size: int = 256) -> None:
        self.clips, self.size = clips, size

    @property
    def identity(self) -> Identity:
        return {**self.clips.identity, "unit": self.size}

    @property
    def units(self) -> int:
        return -(-len(self.clips) // self.size)

    def expected(self, unit: int) -> int | None:
        return len(self._numbers(unit))

    def read(self, units: Iterable[int]) -> Iterator[Clip | Reject | None]:
        return in_turn(self._read, units)

    def _numbers(self, unit: int) -> range:
        return range(unit * self.size, min((unit + 1) * self.size, len(self.clips)))

    def _read(self, unit: int) -> Iterator[Clip | Reject]:
        for number in self._numbers(unit):
            rest = dict(self.clips[number])
            id, video, caption = (rest.pop(name) for name in ("id", "video", "caption"))
            about = {name: value for name, value in rest.items() if not isinstance(value, np.ndarray)}
            yield Clip(id, video, caption, about)


def in_turn(read: Callable[[int], Iterable[T]], units: Iterable[int]) -> Iterator[T | None]:
    """What units have, one after the other, and None after each."""
    for unit in units:
        yield from read(unit)
        yield None
