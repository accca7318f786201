"""Clips of smooth random patterns that move, in colour and of any size: what no test of digits is needed for."""

import numpy as np
from scipy.ndimage import gaussian_filter, shift


def patterns(count: int, seed: int = 0, frames: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 clips [count, frames, height, width, 3]; each pattern moves by 0.4 to 1.2 pixels a frame its own way."""
    rng = np.random.default_rng(seed)
    clips = np.empty((count, frames, height, width, 3), np.uint8)
    for clip in clips:
        still = gaussian_filter(rng.standard_normal((height, width, 3)), (2, 2, 0), mode="wrap")
        picture = np.clip(rng.uniform(90, 160, 3) + 45 * still / still.std(), 0, 255)
        angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.4, 1.2)
        for t, frame in enumerate(clip):
            way = (t * speed * np.sin(angle), t * speed * np.cos(angle), 0)
            frame[:] = np.clip(np.rint(shift(picture, way, order=1, mode="grid-wrap")), 0, 255)
    return clips


def blurred(clips: np.ndarray, sigma: float = 1.5) -> np.ndarray:
    soft = gaussian_filter(clips.astype(np.float32), (0, 0, sigma, sigma, 0))
    return np.clip(np.rint(soft), 0, 255).astype(np.uint8)


def frozen(clips: np.ndarray) -> np.ndarray:
    return np.repeat(clips[:, :1], clips.shape[1], 1)


def noisy(clips: np.ndarray, deviation: float = 12.0) -> np.ndarray:
    noise = np.random.default_rng(9).normal(0, deviation, clips.shape)
    return np.clip(np.rint(clips + noise), 0, 255).astype(np.uint8)


def fading(clips: np.ndarray, last: float = 0.5) -> np.ndarray:
    """Red goes down to `last` of itself from the first frame to the last."""
    gain = np.ones((clips.shape[1], 1, 1, 3))
    gain[:, 0, 0, 0] = np.linspace(1, last, clips.shape[1])
    return np.rint(clips * gain).astype(np.uint8)
