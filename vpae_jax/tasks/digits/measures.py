"""Measures of single clips: plain functions of pixels.

Each takes uint8 clips and gives one number a clip. Brightness is in 0..1, lengths in pixels.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from vpae_jax.metrics.base import Clips, Pictures, Scores
from vpae_jax.tasks.digits.clips import DIRECTIONS, FREE_FRAMES

# Darker pixels are background: coding noise far from the digit must not pull the centroid.
INK = 32


def brightness(clips: Clips) -> Float[np.ndarray, "b t height width"]:
    """Mean of the colours, 0..1."""
    return clips.astype(np.float32).mean(-1) / 255


def sharpness(clips: Clips) -> Scores:
    """Mean absolute Laplacian of brightness."""
    x = brightness(clips)
    inner = x[:, :, 1:-1, 1:-1]
    around = x[:, :, 2:, 1:-1] + x[:, :, :-2, 1:-1] + x[:, :, 1:-1, 2:] + x[:, :, 1:-1, :-2]
    return np.abs(4 * inner - around).mean((1, 2, 3)).astype(np.float64)


def centroids(clips: Clips) -> Float[np.ndarray, "b t 2"]:
    """Centre (row, column) of what is brighter than INK in each frame; the frame's middle when nothing is."""
    ink = np.maximum(brightness(clips).astype(np.float64) - INK / 255, 0)
    total = ink.sum((2, 3))
    height, width = ink.shape[2:]
    rows = (ink.sum(3) * np.arange(height)).sum(2)
    columns = (ink.sum(2) * np.arange(width)).sum(2)
    empty = total < 1e-9
    total = np.where(empty, 1, total)
    return np.stack(
        [
            np.where(empty, (height - 1) / 2, rows / total),
            np.where(empty, (width - 1) / 2, columns / total),
        ],
        axis=-1,
    )


def displacement(clips: Clips) -> Scores:
    """Distance that the centroid moves in the frames before any bounce: the first FREE_FRAMES."""
    centre = centroids(clips[:, :FREE_FRAMES])
    return np.linalg.norm(centre[:, -1] - centre[:, 0], axis=-1)


def directions(clips: Clips) -> Int[np.ndarray, "b"]:
    """The direction of that motion as an index into DIRECTIONS; -1 for less than half a pixel."""
    centre = centroids(clips[:, :FREE_FRAMES])
    down, right = np.moveaxis(centre[:, -1] - centre[:, 0], -1, 0)
    eighth = np.round(np.arctan2(-down, right) / (2 * np.pi / len(DIRECTIONS))).astype(int) % len(DIRECTIONS)
    return np.where(np.hypot(down, right) < 0.5, -1, eighth)


def color_drift(clips: Clips) -> Scores:
    """Change of a colour channel's mean from the first frame to the last, the largest over the channels.

    Relative to the mean of the first frame (at least one level of 255), so that it does not depend on how much of the
    frame is background.
    """
    mean = clips.astype(np.float64).mean((2, 3))
    return np.abs(mean[:, -1] - mean[:, 0]).max(-1) / np.maximum(mean[:, 0].mean(-1), 1)


def psnr(pictures: Pictures, expected: Pictures) -> Scores:
    """Peak signal-to-noise ratio in decibels, at most 60."""
    error = ((pictures.astype(np.float64) - expected) ** 2).mean((1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 255**2 / 1e6))


def difference(clips: Clips, others: Clips) -> Scores:
    """Mean absolute difference of brightness between two clips, over where either has ink, 0..1."""
    x, y = brightness(clips), brightness(others)
    ink = np.maximum(x, y) > INK / 255
    total = np.maximum(ink.sum((1, 2, 3)), 1)
    return ((np.abs(x - y) * ink).sum((1, 2, 3)) / total).astype(np.float64)
