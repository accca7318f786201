"""Which videos and clips are not used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vpae_jax.encoding.buckets import Size
from vpae_jax.encoding.frame_statistics import Measures
from vpae_jax.types import UserError

Refusal = tuple[str, str]  # kind and reason of a `Reject`


@dataclass(frozen=True)
class Filters:
    """Bounds; what lies on a bound is used.

    Attributes:
      min_seconds: of the part of the video that is meant.
      min_side: pixels of the shorter side as shown.
      max_crop: share of the picture that is lost when it is cropped to its bucket.
      min_motion: mean absolute difference of successive frames, on a scale of 0..255. The default refuses what stands
        still but for noise of compression; a single frame has none.
      max_black: share of a clip's frames that are black.
      min_caption, max_caption: characters of the caption.
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
                raise UserError(f"filter {name} is {getattr(self, name)}; expected a number from 0 on")
        for name in ("max_crop", "max_black"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"filter {name} is {getattr(self, name)}; expected a share from 0 to 1")
        if self.max_caption < self.min_caption:
            raise UserError(
                f"filter max_caption is {self.max_caption}; expected at least min_caption, {self.min_caption}"
            )

    def caption(self, caption: str) -> Refusal | None:
        """Why a caption is not used."""
        length = len(caption.strip())
        if length < self.min_caption:
            return "caption", f"caption has {length} characters; at least {self.min_caption} are asked for"
        if length > self.max_caption:
            return "caption", f"caption has {length} characters; at most {self.max_caption} are asked for"
        return None

    def video(self, seconds: float, height: int, width: int, bucket: Size) -> Refusal | None:
        """Why a video, or the part that is meant, is not used, before its frames are read."""
        if seconds < self.min_seconds:
            return "too short", f"lasts {seconds:.2f} s; at least {self.min_seconds:g} s are asked for"
        if min(height, width) < self.min_side:
            return "too small", f"is {width}x{height}; the shorter side must have {self.min_side} pixels"
        scale = max(bucket[0] / height, bucket[1] / width)
        crop = 1 - bucket[0] * bucket[1] / (height * width * scale * scale)
        if crop > self.max_crop:
            shape = f"{bucket[1]}x{bucket[0]}"
            return "shape", f"is {width}x{height}; {crop:.1%} are lost in {shape}, at most {self.max_crop:.0%} may be"
        return None

    def clip(self, measures: Measures) -> Refusal | None:
        """Why a clip is not used."""
        return next(self._of_frames(measures), None)

    def _of_frames(self, measures: Measures) -> Iterator[Refusal]:
        black, motion = measures["black"], measures.get("motion")
        if black > self.max_black:
            yield "black", f"{black:.1%} of the frames are black; at most {self.max_black:.0%} may be"
        if motion is not None and motion < self.min_motion:
            yield "static", f"motion is {motion:.3f}; at least {self.min_motion:g} is asked for"
