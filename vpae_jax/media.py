"""Videos and images on disk: written whole or not at all, read as uint8 RGB."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from vpae_jax.files import atomically
from vpae_jax.types import UserError

Frames = UInt8[np.ndarray, "t height width 3"]
Picture = UInt8[np.ndarray, "height width 3"]

CRF = 14  # H.264 quality: visually lossless
# What images are read as, whatever they are called: not what hands them to another program, as EPS does.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MOST_PIXELS = 2**26  # 8192x8192, some 200 MB


def write_video(path: Path, frames: Frames, fps: float) -> None:
    """Writes H.264 in yuv420p, which every browser plays.

    Args:
      path: ends in .mp4; its folder is made if need be, and an existing file is replaced.
      frames: at least one; height and width even.
      fps: frames a second.

    Raises:
      UserError: sizes or a rate that the format cannot hold.
    """
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise UserError(f"{path}: frames are {height}x{width}; H.264 needs an even height and width")
    if not fps > 0:
        raise UserError(f"{path}: {fps} frames a second; expected a positive number")

    def write(temporary: Path) -> None:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.options = {"crf": str(CRF)}
            for picture in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())

    atomically(path, write)


def write_contact_sheet(path: Path, frames: Frames, columns: int | None = None) -> None:
    """Writes all frames into one PNG, row by row, with a white line between them.

    Args:
      path: ends in .png; its folder is made if need be, and an existing file is replaced.
      frames: at least one.
      columns: frames a row; by default as many as make the sheet about square.
    """
    t, height, width, _ = frames.shape
    columns = columns or math.ceil(math.sqrt(t))
    rows = math.ceil(t / columns)
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, np.uint8)
    for i, picture in enumerate(frames):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        sheet[top : top + height, left : left + width] = picture
    atomically(path, lambda temporary: Image.fromarray(sheet).save(temporary, format="png"))


def read_image(path: Path) -> Picture:
    """An image as RGB, turned upright as its EXIF data say.

    Raises:
      UserError: no such file, not an image that Pillow reads whole, another format, or more than `MOST_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of larger ones than are allowed here
            opened = Image.open(path, formats=IMAGE_FORMATS)
        with opened as image:
            if image.width * image.height > MOST_PIXELS:
                raise UserError(
                    f"image {path}: has {image.width}x{image.height} pixels; make it smaller, {MOST_PIXELS} at most"
                )
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError as error:
        raise UserError(f"image {path}: no such file") from error
    except UnidentifiedImageError as error:
        raise UserError(f"image {path}: not an image of a known format; expected {', '.join(IMAGE_FORMATS)}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"image {path}: cannot be read: {error}") from error
