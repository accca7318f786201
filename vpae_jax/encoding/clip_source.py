"""The inputs of an encoding: entries of a manifest, clips, and rejects with their reasons.

A source is divided into work units: one process reads, encodes and writes a unit, completely or not at all. The content
of a unit depends only on the source, so an interrupted run ends with the same records, on any number of processes.
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
    """A video with its caption, as listed by a folder or a manifest.

    Attributes:
      id: unique in its source.
      path: the file.
      caption: what it shows.
      start, end: the part of the video to use, in seconds; None for its beginning and its end.
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
    """A clip to encode.

    Attributes:
      id: unique in its source.
      video: its frames, 1 + a multiple of 4.
      caption: what they show.
      about: their origin and measurements, as plain JSON.
    """

    id: str
    video: UInt8[np.ndarray, "t height width 3"]
    caption: str
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reject:
    """A video or a clip that is not used.

    Attributes:
      id: id of the entry or the clip, or the number of its row in the manifest if it has none.
      kind: one or two words, by which rejects are counted: "unreadable", "too short", "static".
      reason: one line.
      picture: a small frame for the summary, if one could be read.
    """

    id: str
    kind: str
    reason: str
    picture: UInt8[np.ndarray, "height width 3"] | None = None


@runtime_checkable
class RandomAccess(Protocol):
    """Clips by number, as mappings with `id`, `video` and `caption`. `identity` is everything that determines them."""

    @property
    def identity(self) -> Identity: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


@runtime_checkable
class ClipSource(Protocol):
    """Clips in a fixed order, in work units. `identity` is everything that determines them."""

    @property
    def identity(self) -> Identity: ...

    @property
    def units(self) -> int: ...

    def expected(self, unit: int) -> int | None:
        """Returns the number of clips and rejects in a unit; None if this is known only after reading it."""
        ...

    def read(self, units: Iterable[int]) -> Iterator[Clip | Reject | None]:
        """Yields the clips and rejects of units in order, with None after each unit. Later units may be prepared in the
        meantime."""
        ...


class InUnits:
    """Turns clips by number into a `ClipSource`.

    Args:
      clips: the clips; whatever their mappings contain besides id, video and caption is kept, except arrays.
      size: clips per unit.
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
    """Yields the items of units, one unit after the other, with None after each."""
    for unit in units:
        yield from read(unit)
        yield None
