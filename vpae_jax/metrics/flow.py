"""Measures of motion from dense optical flow: its speed, its smoothness, and changes that it does not explain.

The flow is OpenCV's DIS (Kroeger et al., "Fast Optical Flow using Dense Inverse Search", 1603.03590), which needs no
weights. OpenCV is optional (`metrics.extras`); only `measure` needs it. Every frame is used, at a shorter side of SIDE
to twice SIDE pixels; smaller clips are used as they are.

    magnitude      mean |F_i|, where F_i moves frame i onto frame i+1, in image widths per frame
    fastest        mean of the largest 5% of |F_i|, in shorter sides of the image per frame, as in VBench
    compensated    mean |x_i(p) - x_{i+1}(p + F_i(p))|: changes not explained by motion, in levels of 255
    interpolated   mean |x_i - m_i|, m_i(p) = (x_{i-1}(p - G_i(p) / 2) + x_{i+1}(p + G_i(p) / 2)) / 2, where G_i moves
                   frame i-1 onto i+1: the error of predicting the middle frame by uniform motion, in levels of 255

The last is VBench's motion smoothness, as an error and with flow instead of an interpolation network. Pixels that the
flow takes from outside the image are ignored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from vpae_jax.metrics.base import Clips, Scores
from vpae_jax.metrics.extras import opencv
from vpae_jax.metrics.frames import Curves
from vpae_jax.metrics.measures import reduced

SIDE = 128
LEAST = 16  # pixels of the shorter side, below which the search finds nothing
FASTEST = 0.05  # fraction of the pixels
# VBench's dynamic degree (`vbench/dynamic_degree.py`): flow beyond 6/256 of the shorter side between frames at 8 fps,
# in a quarter of the frames.
DYNAMIC, DYNAMIC_FPS, DYNAMIC_SHARE = 6 / 256, 8.0, 0.25
# A clip counts as still if its flow is below this fraction of the width per second.
STILL = 0.005


def measure(clips: Clips) -> dict[str, Float[np.ndarray, "b _"]]:
    """Computes the measures above: `magnitude`, `fastest` and `compensated` for the t - 1 pairs of frames,
    `interpolated` for the t - 2 triples. Needs OpenCV, and clips of at least 3 frames."""
    cv2 = opencv()
    assert cv2 is not None
    small = reduced(clips, clips.shape[1], SIDE)
    if (factor := -(-LEAST // min(small.shape[2:4]))) > 1:
        small = small.repeat(factor, 2).repeat(factor, 3)
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    found = [_clip(cv2, search, clip) for clip in small]
    return {name: np.array([one[name] for one in found], np.float64) for name in found[0]}


def dynamic(fastest: Curves, fps: float) -> Scores:
    """1 for clips that are dynamic by VBench's rule, applied to neighbouring frames at the clips' own rate; else 0."""
    moving = fastest * fps / DYNAMIC_FPS > DYNAMIC
    return (moving.mean(1) >= DYNAMIC_SHARE).astype(np.float64)


def still(magnitude: Curves, fps: float) -> Scores:
    """1 for clips with a mean flow below STILL; else 0."""
    return (magnitude.mean(1) * fps < STILL).astype(np.float64)


def _clip(cv2: Any, search: Any, clip: UInt8[np.ndarray, "t height width 3"]) -> dict[str, list[float]]:
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in np.ascontiguousarray(clip)]
    frames = clip.astype(np.float32)
    height, width = grey[0].shape
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float32)
    found: dict[str, list[float]] = {name: [] for name in ("magnitude", "fastest", "compensated", "interpolated")}
    for i in range(len(clip) - 1):
        flow = search.calc(grey[i], grey[i + 1], None)
        length = np.hypot(flow[..., 0], flow[..., 1]).ravel()
        count = max(1, round(FASTEST * length.size))
        found["magnitude"].append(float(length.mean()) / width)
        found["fastest"].append(float(np.partition(length, -count)[-count:].mean()) / min(height, width))
        moved, inside = _sampled(cv2, frames[i + 1], grid + flow)
        found["compensated"].append(_apart(frames[i], moved, inside))
    for i in range(1, len(clip) - 1):
        half = search.calc(grey[i - 1], grey[i + 1], None) / 2
        before, inside = _sampled(cv2, frames[i - 1], grid - half)
        after, also = _sampled(cv2, frames[i + 1], grid + half)
        found["interpolated"].append(_apart(frames[i], (before + after) / 2, inside & also))
    return found


def _sampled(
    cv2: Any, frame: Float[np.ndarray, "height width 3"], places: Float[np.ndarray, "height width 2"]
) -> tuple[Float[np.ndarray, "height width 3"], Any]:
    """A frame sampled at places (column, row), and which of these lie inside it."""
    height, width = frame.shape[:2]
    x, y = places[..., 0], places[..., 1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return cv2.remap(frame, places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), inside


def _apart(one: Float[np.ndarray, "height width 3"], other: Float[np.ndarray, "height width 3"], where: Any) -> float:
    """Mean absolute difference over the pixels in `where`; 0 if there are none."""
    return float(np.abs(one - other)[where].mean()) if where.any() else 0.0
