"""Videos and images on disk: written whole or not at all, read as uint8 RGB."""

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
from vpae_jax.impostors import impostor_at
from vpae_jax.types import Note, UserError

Frames = UInt8[np.ndarray, "t height width 3"]
Picture = UInt8[np.ndarray, "height width 3"]

CRF = 14  # H.264 quality: visually lossless
# What images are read as, whatever they are called: not what hands them to another program, as EPS does.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MOST_PIXELS = 2**26  # 8192x8192, some 200 MB
# Tags of TIFF; of the first, 2 is for numbers with a sign, and of the second, 0 for white is zero.
SAMPLE_FORMAT, PHOTOMETRIC, BITS_PER_SAMPLE = 339, 262, 258
STRAIGHT = {"La": "LA", "RGBa": "RGBA"}  # colours that are multiplied with their transparency, and those that are not


def write_video(path: Path, frames: Frames, fps: float, crf: int = CRF) -> None:
    """Writes H.264 in yuv420p, which every browser plays.

    Args:
      path: ends in .mp4; its folder is made if need be, and an existing file is replaced.
      frames: at least one; height and width even.
      fps: frames a second.
      crf: H.264 quality, from 0 (lossless) to 51.

    Raises:
      UserError: sizes or a rate that the format cannot hold.
    """
    write_stream(path, [frames], fps, crf)


def write_stream(path: Path, chunks: Iterable[Frames], fps: float, crf: int = CRF) -> None:
    """Writes a video while its frames come, at least one chunk of them. Under its name it appears when it is whole.

    For arguments, and what it raises, see `write_video`.
    """
    coming = iter(chunks)
    first = next(coming)  # before anything is written: it may not come, or not fit
    _, height, width, _ = first.shape
    if height % 2 or width % 2:
        raise UserError(f"{path}: frames are {height}x{width}; H.264 needs an even height and width")
    if not fps > 0:
        raise UserError(f"{path}: {fps} frames a second; expected a positive number")

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
    """The frames of a video that `write_video` wrote, one after the other; `encoding.decoding` reads those of others.

    Raises:
      UserError: no such file, or one that FFmpeg does not decode.
    """
    try:
        with av.open(f"file:{path}") as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except FileNotFoundError as error:
        raise UserError(f"video {path}: no such file") from error
    except (FFmpegError, IndexError) as error:  # the second is PyAV's, of a file without a video stream
        raise UserError(f"video {path}: cannot be decoded; write it again") from error


def read_video(path: Path) -> Frames:
    """All frames of a video that `write_video` wrote. For what it raises, see `read_stream`."""
    return np.stack([*read_stream(path)])


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
    """An image as RGB, its first one where it has several, turned upright as its EXIF data say.

    Grey of 16 bits, and of floats from 0 to 1, is scaled to 8 bits. Transparent parts become black, as those of videos
    do; that is a `Note`.

    Raises:
      UserError: no such file, not an image that Pillow reads whole, another format, more than `MOST_PIXELS`, or numbers
        that do not say what is white.
    """
    try:
        # Given a path, Pillow turns TIFFs upright twice.
        with path.open("rb") as file, _opened(file) as image:
            if image.width * image.height > MOST_PIXELS:
                size = f"{image.width}x{image.height}"
                raise UserError(f"image {path}: has {size} pixels; make it smaller, {MOST_PIXELS} at most")
            white, negative = _white(image)
            upright = _in_8_bits(ImageOps.exif_transpose(image), white, negative)
            return np.array(_opaque(upright, path))
    except _Unclear as error:
        raise UserError(f"image {path}: {error}; save it as PNG with 8 bits a channel") from error
    except FileNotFoundError as error:
        raise UserError(f"image {path}: no such file") from error
    except UnidentifiedImageError as error:
        what = impostor_at(path) or f"not an image of a known format; expected {', '.join(IMAGE_FORMATS)}"
        raise UserError(f"image {path}: {what}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"image {path}: cannot be read: {error}") from error


def _opened(file: BinaryIO) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of larger ones than are allowed here
        return Image.open(file, formats=IMAGE_FORMATS)


class _Unclear(Exception):
    """Pixels of which nothing says what is white."""


def _white(image: Image.Image) -> tuple[float | None, bool]:
    """Which number stands for white in an image of more than 8 bits, and whether it stands for black instead; None for
    images that Pillow reads in 8 bits."""
    tags: Any = getattr(image, "tag_v2", {})  # a TIFF's
    if 2 in tags.get(SAMPLE_FORMAT, ()):
        raise _Unclear("holds numbers with a sign")
    if image.mode == "LAB":
        raise _Unclear("holds colours as LAB")
    if not image.mode.startswith(("I", "F")):
        return None, False
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]  # a PNG's and PPM's are scaled to 16
    if image.mode == "I" and bits > 16:
        raise _Unclear(f"holds integers of {bits} bits")
    return 1.0 if image.mode == "F" else 2.0**bits - 1, tags.get(PHOTOMETRIC) == 0


def _in_8_bits(image: Image.Image, white: float | None, negative: bool) -> Image.Image:
    """Grey that is scaled from 0 to `white`; other images as they are."""
    if white is None:
        return image
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= white:
        raise _Unclear(f"holds numbers from {low:g} to {high:g}, expected 0 to {white:g}")
    scaled = values.astype(np.float32)
    scaled *= 255 / white
    grey = np.rint(scaled, out=scaled).astype(np.uint8)
    result = Image.fromarray(255 - grey if negative else grey)
    if (clear := image.info.get("transparency")) is not None:
        result.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return result


def _opaque(image: Image.Image, path: Path) -> Image.Image:
    """RGB, transparent parts on black."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    plain = image.convert(STRAIGHT[image.mode]) if image.mode in STRAIGHT else image
    clear = plain.convert("RGBA")
    if np.asarray(clear.getchannel("A")).min() == 255:
        return clear.convert("RGB")
    warnings.warn(f"image {path}: what is transparent becomes black", Note, stacklevel=3)
    return Image.alpha_composite(Image.new("RGBA", clear.size, "black"), clear).convert("RGB")
