"""The tasks of the workers of `videos.py`. Nothing here, or imported from here, may import JAX."""

from __future__ import annotations

import gc
import math
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from vpae_jax.encoding.decoding import Probe, Unreadable, probe, read_frames
from vpae_jax.encoding.frame_statistics import Measures, measure


def look(path: Path) -> Probe | Unreadable:
    """Probes a video file; returns its properties, or why it cannot be read."""
    try:
        return probe(path)
    except Unreadable as error:
        return error


def read(
    out: UInt8[np.ndarray, "t height width 3"], path: Path, start: float, fps: float, until: float = math.inf
) -> Measures | Unreadable:
    """Fills `out` with a clip's frames and returns their measurements, or why they cannot be read."""
    count, height, width, _ = out.shape
    try:
        return measure(read_frames(path, start, count, fps, height, width, out, until))
    except Unreadable as error:
        return error
    finally:
        gc.collect()  # a decoder and its container form a reference cycle that holds tens of frames
