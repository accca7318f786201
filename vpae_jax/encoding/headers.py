"""What a file says of its video before it is decoded: how long it is, how fast, how exactly; or that it is an image."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import av

LATE = 1.0  # seconds: so long a video's first frames may be missing, or come in another order
TICK = 5e-3  # seconds: times are rounded to a container's ticks, but no more than this is forgiven
# How files begin that hold one picture.
IMAGES = {
    "PNG": rb"\x89PNG",
    "JPEG": rb"\xff\xd8\xff",
    "WebP": rb"RIFF....WEBP",
    "TIFF": rb"II\*\0|MM\0\*",
    "BMP": rb"BM....\0\0\0\0",
    "AVIF": rb"....ftypavif",
    "HEIC": rb"....ftyp(hei[cx]|mif1)",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "PSD": rb"8BPS",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "OpenEXR": rb"\x76\x2f\x31\x01",
    "PPM": rb"P[1-6]\s",
    "SVG": rb"\s*(?:<\?xml[^>]*>\s*)?(?:<![^>]*>\s*)*<svg\b",
}
HEAD = 4096  # bytes in which an image's kind is looked for
IMAGE_BRANDS = ("avif", "heic", "heix", "mif1")  # what MP4s are called that hold one


def beginning(path: Path) -> bytes:
    """The first bytes of a file; none of what is none, or cannot be read."""
    with suppress(OSError):
        if path.is_file():  # and no pipe, which nobody may write to
            with path.open("rb") as file:
                return file.read(HEAD)
    return b""


def image_kind(head: bytes) -> str | None:
    """The format of a file that begins so and holds one picture; None for other files."""
    if b"acTL" in head or b"ANIM" in head:  # a PNG or WebP that moves
        return None
    return next((kind for kind, start in IMAGES.items() if re.match(start, head, re.DOTALL)), None)


def seconds(container: Any, stream: Any) -> float | None:
    """How long the video is, as far as the header says. Where it does not begin at 0 on the file's clock, that may be
    the end on this clock, as FFmpeg writes it into Matroska, or the length, as mkvmerge does: then it says nothing."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if stream.start_time:
        return None
    tag = stream.metadata.get("DURATION", "").split(":")  # Matroska: 00:01:02.345000000
    if len(tag) == 3:
        try:
            return sum(float(part) * unit for part, unit in zip(tag, (3600, 60, 1), strict=True))
        except ValueError:
            return None
    return container.duration / av.time_base if container.duration else None


def origin(stream: Any, first: Any) -> int:
    """When the video begins, in ticks of the file's clock. Where its first packet, or frame, is far from what FFmpeg
    says, FFmpeg has not read so far, and taken the file's beginning for that of the video."""
    said = stream.start_time or 0
    return said if first.pts is None or abs(first.pts - said) * stream.time_base < LATE else first.pts


def rate(stream: Any, length: float | None = None) -> float:
    """Frames a second on average, of `length` seconds where these are known; 25 where nothing says it."""
    if length and stream.frames > 1:
        return stream.frames / length
    return float(stream.average_rate or stream.guessed_rate or 25)


def duration(shown: Any, stream: Any) -> float:
    """Seconds for which a frame, or a packet's, is shown; by the rate where the container's clock has rounded them."""
    even = 1 / rate(stream)
    said = float((shown.duration or 0) * stream.time_base)
    return max(said, even) if not said or abs(said - even) < min(stream.time_base, TICK) else said


def slack(stream: Any) -> float:
    """Seconds by which the container's clock may have rounded a time."""
    return min(float(stream.time_base) / 2, TICK) + 1e-6
