"""Videos and images on disk: written atomically, read as uint8 RGB."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.error import FFmpegError
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from vpae_jax.files import atomically
from vpae_jax.placeholders import placeholder_at
from vpae_jax.types import Note, UserError

Frames = UInt8[np.ndarray, "t height width 3"]
Picture = UInt8[np.ndarray, "height width 3"]

CRF = 14  # H.264 quality: visually lossless
# Formats as which images are read, whatever their names; not EPS, for example, which Pillow passes to another program.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MOST_PIXELS = 2**26  # 8192x8192, about 200 MB
# Tags of TIFF. For the first, the value 2 means signed numbers; for the second, 0 means that zero is white.
SAMPLE_FORMAT, PHOTOMETRIC, BITS_PER_SAMPLE = 339, 262, 258
STRAIGHT = {"La": "LA", "RGBa": "RGBA"}  # modes with premultiplied alpha, and their counterparts without


def write_video(path: Path, frames: Frames, fps: float, crf: int = CRF) -> None:
    """Writes H.264 in yuv420p, which every browser plays.

    Args:
      path: ends in .mp4; its folder is created if necessary, and an existing file is replaced.
      frames: at least one; height and width must be even.
      fps: frames per second.
      crf: H.264 quality, from 0 (lossless) to 51.

    Raises:
      UserError: a size or a frame rate that the format does not support, or the file cannot be written.
    """
    write_stream(path, [frames], fps, crf)


def write_stream(path: Path, chunks: Iterable[Frames], fps: float, crf: int = CRF) -> None:
    """Writes a video while its frames arrive in chunks, at least one. The file appears when it is complete.

    For the other arguments and errors, see `write_video`.
    """
    coming = iter(chunks)
    first = next(coming)  # before anything is written: producing it may fail, or its size may not fit
    _, height, width, _ = first.shape
    if height % 2 or width % 2:
        raise UserError(f"{path}: frames are {height}x{width}; H.264 needs an even height and width")
    if not fps > 0:
        raise UserError(f"{path}: {fps} frames per second; expected a positive number")

    def write(temporary: Path) -> None:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.options = {"crf": str(crf)}
            for frames in chain([first], coming):
                for picture in frames:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())

    atomically(path, write)


def read_stream(path: Path) -> Iterator[Picture]:
    """Yields the frames of a video written by `write_video`, one by one; for other videos use `encoding.decoding`.

    Raises:
      UserError: the file does not exist, or FFmpeg cannot decode it.
    """
    try:
        with av.open(f"file:{path}") as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except FileNotFoundError as error:
        raise UserError(f"video {path}: no such file") from error
    except (FFmpegError, IndexError) as error:  # PyAV raises the second for a file without a video stream
        raise UserError(f"video {path}: cannot be decoded; write it again") from error


def read_video(path: Path) -> Frames:
    """Returns all frames of a video written by `write_video`. Raises as `read_stream`."""
    return np.stack([*read_stream(path)])


def write_contact_sheet(path: Path, frames: Frames, columns: int | None = None) -> None:
    """Writes all frames into one PNG, row by row, separated by white lines.

    Args:
      path: ends in .png; its folder is created if necessary, and an existing file is replaced.
      frames: at least one.
      columns: frames per row; by default chosen to make the sheet about square.
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
    """Reads an image as RGB (the first if the file has several), rotated upright according to its EXIF data.

    Grey images of 16 bits, or of floats from 0 to 1, are scaled to 8 bits. Transparent parts become black, as in
    videos; this emits a `Note`.

    Raises:
      UserError: the file does not exist, is damaged, has another format or more than `MOST_PIXELS`, or its pixel values
        do not define what white is.
    """
    try:
        # Given a path, Pillow would rotate TIFFs upright twice.
        with path.open("rb") as file, _opened(file) as image:
            if image.width * image.height > MOST_PIXELS:
                size = f"{image.width}x{image.height}"
                raise UserError(f"image {path}: has {size} pixels; reduce it to at most {MOST_PIXELS}")
            white, negative = _white(image)
            upright = _in_8_bits(ImageOps.exif_transpose(image), white, negative)
            return np.array(_opaque(upright, path))
    except _Unclear as error:
        raise UserError(f"image {path}: {error}; save it as PNG with 8 bits per channel") from error
    except FileNotFoundError as error:
        raise UserError(f"image {path}: no such file") from error
    except UnidentifiedImageError as error:
        what = placeholder_at(path) or f"not an image of a known format; expected {', '.join(IMAGE_FORMATS)}"
        raise UserError(f"image {path}: {what}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"image {path}: cannot be read: {error}") from error


def _opened(file: BinaryIO) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked separately
        return Image.open(file, formats=IMAGE_FORMATS)


class _Unclear(Exception):
    """Pixel values for which the file does not say what white is."""


def _white(image: Image.Image) -> tuple[float | None, bool]:
    """Returns the value of white in an image of more than 8 bits, and whether the image is negative, so that this value
    means black; None for images that Pillow reads in 8 bits."""
    tags: Any = getattr(image, "tag_v2", {})  # of a TIFF
    if 2 in tags.get(SAMPLE_FORMAT, ()):
        raise _Unclear("contains signed numbers")
    if image.mode == "LAB":
        raise _Unclear("contains LAB colours")
    if not image.mode.startswith(("I", "F")):
        return None, False
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]  # PNG and PPM are scaled to 16 bits
    if image.mode == "I" and bits > 16:
        raise _Unclear(f"contains integers of {bits} bits")
    return 1.0 if image.mode == "F" else 2.0**bits - 1, tags.get(PHOTOMETRIC) == 0


def _in_8_bits(image: Image.Image, white: float | None, negative: bool) -> Image.Image:
    """Converts grey values from 0 to `white` to 8 bits; returns other images unchanged."""
    if white is None:
        return image
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= white:
        raise _Unclear(f"contains numbers from {low:g} to {high:g}, expected 0 to {white:g}")
    scaled = values.astype(np.float32)
    scaled *= 255 / white
    grey = np.rint(scaled, out=scaled).astype(np.uint8)
    result = Image.fromarray(255 - grey if negative else grey)
    if (clear := image.info.get("transparency")) is not None:
        result.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return result


def _opaque(image: Image.Image, path: Path) -> Image.Image:
    """Converts an image to RGB, with transparent parts on black."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    plain = image.convert(STRAIGHT[image.mode]) if image.mode in STRAIGHT else image
    clear = plain.convert("RGBA")
    if np.asarray(clear.getchannel("A")).min() == 255:
        return clear.convert("RGB")
    warnings.warn(f"image {path}: transparent parts become black", Note, stacklevel=3)
    return Image.alpha_composite(Image.new("RGBA", clear.size, "black"), clear).convert("RGB")
