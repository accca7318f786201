"""Measurements of single clips of one digit, as plain functions of pixels.

Each takes uint8 clips and returns one number per clip. Brightness is in 0..1, lengths are in pixels.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from vpae_jax.metrics.base import Clips, Scores
from vpae_jax.metrics.measures import brightness
from vpae_jax.tasks.digits.clips import DIRECTIONS, FREE_FRAMES

# Pixels darker than this are background, so that coding noise far from the digit does not shift the centroid.
INK = 32


def centroids(clips: Clips) -> Float[np.ndarray, "b t 2"]:
    """Returns the centre (row, column) of the pixels brighter than INK in each frame; the frame's middle if there are
    none."""
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
    """Returns the distance that the centroid moves in the frames before any bounce, the first FREE_FRAMES."""
    centre = centroids(clips[:, :FREE_FRAMES])
    return np.linalg.norm(centre[:, -1] - centre[:, 0], axis=-1)


def directions(clips: Clips) -> Int[np.ndarray, "b"]:
    """Returns the direction of that motion as an index into DIRECTIONS; -1 if it is shorter than half a pixel."""
    centre = centroids(clips[:, :FREE_FRAMES])
    down, right = np.moveaxis(centre[:, -1] - centre[:, 0], -1, 0)
    eighth = np.round(np.arctan2(-down, right) / (2 * np.pi / len(DIRECTIONS))).astype(int) % len(DIRECTIONS)
    return np.where(np.hypot(down, right) < 0.5, -1, eighth)


def difference(clips: Clips, others: Clips) -> Scores:
    """Returns the mean absolute difference of brightness, 0..1, between two clips, where either has ink."""
    x, y = brightness(clips), brightness(others)
    ink = np.maximum(x, y) > INK / 255
    total = np.maximum(ink.sum((1, 2, 3)), 1)
    return ((np.abs(x - y) * ink).sum((1, 2, 3)) / total).astype(np.float64)
