"""How a causal model divides a clip: chunks of latent frames, generated one after the other, and what each one sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vpae_jax.types import UserError


@dataclass(frozen=True)
class Chunks:
    """Chunks of latent frames. A frame sees its own chunk and the chunks before it.

    Attributes:
      size: latent frames per chunk: 1 (frame-wise) or 3 (CausVid's and Self-Forcing's, 2412.07772 and 2506.08009).
      first: latent frames of the first chunk; 0 makes it like the others.
      window: number of most recent earlier frames that a chunk sees; 0 for all.
      sink: number of the clip's first frames that a chunk sees in addition to its window. They are placed directly
        before the window, however long the clip is.

    Raises:
      UserError: a chunk has less than one frame, or there is a sink without a window.
    """

    size: int = 3
    first: int = 0
    window: int = 0
    sink: int = 0

    def __post_init__(self) -> None:
        for name, low in {"size": 1, "first": 0, "window": 0, "sink": 0}.items():
            if getattr(self, name) < low:
                raise UserError(f"chunks.{name} is {getattr(self, name)}, expected {low} or more")
        if self.sink and not self.window:
            raise UserError(f"chunks.sink is {self.sink}, but there is no window; set chunks.window, or sink=0")

    def spans(self, frames: int) -> tuple[tuple[int, int], ...]:
        """The chunks of a clip, each as (first frame, one after its last frame).

        Raises:
          UserError: the clip is not a whole number of chunks.
        """
        first, near = self.first or self.size, self.nearest(frames)
        if near != frames:
            raise UserError(
                f"a clip of {frames} latent frames is not a whole number of chunks (first {first}, then {self.size} "
                f"each); make it {near}, or set chunks.size"
            )
        return tuple(self.walk(frames))

    def walk(self, frames: int) -> Iterator[tuple[int, int]]:
        """The same lazily, for clips of any length; an incomplete last chunk is left out."""
        start, stop = 0, self.first or self.size
        while stop <= frames:
            yield start, stop
            start, stop = stop, stop + self.size

    def nearest(self, frames: int) -> int:
        """The nearest clip length, in latent frames, that is a whole number of chunks."""
        first = self.first or self.size
        return first + max(0, round((frames - first) / self.size)) * self.size

    def remembered(self, start: int) -> tuple[tuple[int, int, int], ...]:
        """What a chunk sees of the frames before it, as runs of frames.

        Args:
          start: the chunk's first frame.

        Returns:
          Runs as (first frame, one after the last frame, places): the run is positioned that many places later than its
          own frames.
        """
        if not start:
            return ()
        if not self.window or start <= self.sink + self.window:
            return ((0, start, 0),)
        window = (start - self.window, start, 0)
        return ((0, self.sink, start - self.window - self.sink), window) if self.sink else (window,)

    def slots(self, frames: int) -> int:
        """Frames that the memory of a clip of `frames` has to hold: those that its chunks see, and the chunk's own."""
        if not self.window:
            return frames
        return min(frames, max(self.first, self.sink + self.window + self.size))
