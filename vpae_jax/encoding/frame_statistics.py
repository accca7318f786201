"""What is measured of a clip's frames, on small grey copies."""

from __future__ import annotations

from typing import NotRequired, TypedDict

import numpy as np
from jaxtyping import Float32, UInt8

SMALL = 60  # pixels of the shorter side, at least
BLACK = 24  # a frame's mean grey value below which it is black, of 0..255


class Measures(TypedDict):
    """Plain numbers, as they are kept with a clip.

    motion: mean absolute difference of successive frames, 0..255; not there for a single frame.
    brightness: mean grey value, 0..255.
    contrast: standard deviation of grey values over pixels, averaged over frames.
    black: share of frames that are black.
    """

    motion: NotRequired[float]
    brightness: float
    contrast: float
    black: float


def measure(video: UInt8[np.ndarray, "t height width 3"]) -> Measures:
    """A clip's measures."""
    grey = small_grey(video)
    means = grey.mean((1, 2))
    found = Measures(
        brightness=round(float(means.mean()), 3),
        contrast=round(float(grey.std((1, 2)).mean()), 3),
        black=round(float((means < BLACK).mean()), 3),
    )
    if len(grey) > 1:
        found["motion"] = round(float(np.abs(np.diff(grey, axis=0)).mean()), 3)
    return found


def small_grey(video: UInt8[np.ndarray, "t height width 3"]) -> Float32[np.ndarray, "t h w"]:
    """Grey copies of every nth pixel, averaged by four."""
    step = max(min(video.shape[1:3]) // (2 * SMALL), 1)
    picked = video[:, ::step, ::step]
    rows = picked[..., 0].astype(np.uint16) + picked[..., 1] + picked[..., 2]
    height, width = (n - n % 2 if n > 1 else 1 for n in rows.shape[1:])
    rows = rows[:, :height, :width]
    if height > 1:
        rows = rows[:, ::2] + rows[:, 1::2]
    if width > 1:
        rows = rows[:, :, ::2] + rows[:, :, 1::2]
    parts = 3 * (2 if height > 1 else 1) * (2 if width > 1 else 1)
    return rows.astype(np.float32) / parts
