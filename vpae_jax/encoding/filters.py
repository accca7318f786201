"""Filters that reject videos and clips."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vpae_jax.encoding.buckets import Size
from vpae_jax.encoding.frame_statistics import Measures
from vpae_jax.types import UserError

Refusal = tuple[str, str]  # kind and reason of a `Reject`


@dataclass(frozen=True)
class Filters:
    """Inclusive bounds.

    Attributes:
      min_seconds: minimum length of the selected part of the video, in seconds.
      min_side: minimum length of the shorter side as displayed, in pixels.
      max_crop: maximum fraction of the image that is lost by cropping to the bucket.
      min_motion: minimum mean absolute difference of successive frames, on a scale of 0..255. The default rejects clips
        that are static except for compression noise; it does not apply to single frames.
      max_black: maximum fraction of a clip's frames that are black.
      min_caption, max_caption: minimum and maximum number of characters in the caption.
    """

    min_seconds: float = 0.0
    min_side: int = 0
    max_crop: float = 0.75
    min_motion: float = 0.1
    max_black: float = 0.5
    min_caption: int = 1
    max_caption: int = 10_000

    def __post_init__(self) -> None:
        for name in ("min_seconds", "min_side", "min_motion", "min_caption"):
            if not getattr(self, name) >= 0:
                raise UserError(f"filter {name} is {getattr(self, name)}; expected a number of at least 0")
        for name in ("max_crop", "max_black"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"filter {name} is {getattr(self, name)}; expected a fraction from 0 to 1")
        if self.max_caption < self.min_caption:
            raise UserError(
                f"filter max_caption is {self.max_caption}; expected at least min_caption, {self.min_caption}"
            )

    def caption(self, caption: str) -> Refusal | None:
        """Returns why a caption is rejected; None if it is not."""
        length = len(caption.strip())
        if length < self.min_caption:
            return "caption", f"caption has {length} characters, expected at least {self.min_caption} (--min_caption)"
        if length > self.max_caption:
            return "caption", f"caption has {length} characters, expected at most {self.max_caption} (--max_caption)"
        return None

    def video(self, seconds: float, height: int, width: int, bucket: Size) -> Refusal | None:
        """Returns why a video, or its selected part, is rejected before its frames are read; None if it is not."""
        if seconds < self.min_seconds:
            return "too short", f"lasts {seconds:.2f} s, expected at least {self.min_seconds:g} s (--min_seconds)"
        if min(height, width) < self.min_side:
            least = f"the shorter side must have at least {self.min_side} pixels (--min_side)"
            return "too small", f"is {width}x{height}; {least}"
        scale = max(bucket[0] / height, bucket[1] / width)
        crop = 1 - bucket[0] * bucket[1] / (height * width * scale * scale)
        if crop > self.max_crop:
            shape = f"{bucket[1]}x{bucket[0]}"
            return (
                "shape",
                f"is {width}x{height}; cropping to {shape} loses {crop:.1%}, allowed {self.max_crop:.0%} (--max_crop)",
            )
        return None

    def clip(self, measures: Measures) -> Refusal | None:
        """Returns why a clip is rejected; None if it is not."""
        return next(self._of_frames(measures), None)

    def _of_frames(self, measures: Measures) -> Iterator[Refusal]:
        black, motion = measures["black"], measures.get("motion")
        if black > self.max_black:
            yield "black", f"{black:.1%} of the frames are black, allowed {self.max_black:.0%} (--max_black)"
        if motion is not None and motion < self.min_motion:
            yield "static", f"motion is {motion:.3f}, expected at least {self.min_motion:g} (--min_motion)"
