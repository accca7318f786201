"""Per-clip measures of any content: plain functions of pixels.

Unless stated otherwise, each takes uint8 clips of one size and gives one number per clip. Brightness is in [0, 1].
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

from vpae_jax.metrics.base import Clips, Pictures, Scores

# What large clips are reduced to: at most FRAMES frames, and a shorter side of SIDE to twice SIDE pixels. The tiny
# model's clips are unchanged; one of 81x480x832 becomes 17x48x83.
FRAMES, SIDE = 17, 48


def reduced(clips: Clips, frames: int = FRAMES, side: int = SIDE) -> UInt8[np.ndarray, "b fewer rows columns 3"]:
    """Every n-th frame, each pixel the mean of a square block; rows and columns not filling a block are cut off."""
    stride = max(1, -(-(clips.shape[1] - 1) // (frames - 1)))
    clips = clips[:, ::stride]
    b, t, height, width, _ = clips.shape
    factor = max(1, min(height, width) // side)
    if factor == 1:
        return clips
    rows, columns = height // factor, width // factor
    blocks = clips[:, :, : rows * factor, : columns * factor].reshape(b, t, rows, factor, columns, factor, 3)
    return np.rint(blocks.mean((3, 5), dtype=np.float32)).astype(np.uint8)


def brightness(clips: Clips) -> Float[np.ndarray, "b t height width"]:
    """Mean of the colour channels, in [0, 1]."""
    return clips.mean(-1, dtype=np.float32) / np.float32(255)


def sharpness(clips: Clips) -> Scores:
    """Mean absolute Laplacian of brightness."""
    x = brightness(clips)
    inner = x[:, :, 1:-1, 1:-1]
    around = x[:, :, 2:, 1:-1] + x[:, :, :-2, 1:-1] + x[:, :, 1:-1, 2:] + x[:, :, 1:-1, :-2]
    return np.abs(4 * inner - around).mean((1, 2, 3)).astype(np.float64)


def color_drift(clips: Clips) -> Scores:
    """Change of a colour channel's mean from the first frame to the last, the largest over the channels.

    Relative to the mean of the first frame (at least one level of 255), so that it does not depend on how much of the
    frame is background.
    """
    mean = clips[:, [0, -1]].mean((2, 3), dtype=np.float64)
    return np.abs(mean[:, -1] - mean[:, 0]).max(-1) / np.maximum(mean[:, 0].mean(-1), 1)


def change(clips: Clips) -> Scores:
    """Mean absolute difference of successive frames, in levels of 255."""
    return np.abs(np.diff(clips.astype(np.float32), axis=1)).mean((1, 2, 3, 4)).astype(np.float64)


def speed(clips: Clips) -> Scores:
    """Speed of edges perpendicular to themselves, in pixels per frame: the root mean square of normal flow.

    Brightness that moves with v changes by dI/dt = -v . grad I, so sqrt(sum (dI/dt)^2 / sum |grad I|^2) is the speed,
    weighted by contrast. It saturates beyond about one pixel per frame. Unlike the mean difference of frames, it does
    not depend on contrast.
    """
    x = brightness(clips)
    middle = (x[:, 1:] + x[:, :-1]) / 2
    down, right = np.gradient(middle, axis=(2, 3))
    # The offset keeps a change of one level in a frame without edges from counting as motion.
    slope = (down**2 + right**2).mean((1, 2, 3)) + (1 / 255) ** 2
    return np.sqrt((np.diff(x, axis=1) ** 2).mean((1, 2, 3)) / slope).astype(np.float64)


def psnr(pictures: Pictures, expected: Pictures) -> Scores:
    """Peak signal-to-noise ratio of images in dB, capped at 60."""
    error = ((pictures.astype(np.float64) - expected) ** 2).mean((1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 255**2 / 1e6))


def difference(clips: Clips, others: Clips) -> Scores:
    """Mean absolute pixel difference of two clips, in levels of 255."""
    return np.abs(clips.astype(np.float32) - others).mean((1, 2, 3, 4)).astype(np.float64)
