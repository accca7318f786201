"""Measurements of a clip's frames, on small grey copies."""

from __future__ import annotations

from typing import NotRequired, TypedDict

import numpy as np
from jaxtyping import Float32, UInt8

SMALL = 60  # minimum number of pixels of the shorter side
BLACK = 24  # mean grey value, in 0..255, below which a frame is black


class Measures(TypedDict):
    """Measurements as plain numbers, which are stored with a clip.

    motion: mean absolute difference of successive frames, 0..255; absent for a single frame.
    brightness: mean grey value, 0..255.
    contrast: standard deviation of grey values over pixels, averaged over frames.
    black: fraction of frames that are black.
    """

    motion: NotRequired[float]
    brightness: float
    contrast: float
    black: float


def measure(video: UInt8[np.ndarray, "t height width 3"]) -> Measures:
    """Measures a clip."""
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
    """Returns small grey copies: every nth pixel, averaged over squares of four."""
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
