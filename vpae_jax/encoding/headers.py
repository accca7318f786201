"""What a file's header says about its video: duration, frame rate and clock resolution; or that it is an image."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import av

LATE = 1.0  # seconds of a video's beginning that may be missing or out of order
TICK = 5e-3  # seconds: maximum tolerance for times that are rounded to a container's ticks
# The first bytes of image files.
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
HEAD = 4096  # bytes that are searched for an image's format
IMAGE_BRANDS = ("avif", "heic", "heix", "mif1")  # MP4 brands of files that hold an image


def beginning(path: Path) -> bytes:
    """Returns the first bytes of a file; none if it is not a regular file or cannot be read."""
    with suppress(OSError):
        if path.is_file():  # not a pipe, on which reading could block
            with path.open("rb") as file:
                return file.read(HEAD)
    return b""


def image_kind(head: bytes) -> str | None:
    """Returns the format of a still image that begins with these bytes; None for other files."""
    if b"acTL" in head or b"ANIM" in head:  # an animated PNG or WebP
        return None
    return next((kind for kind, start in IMAGES.items() if re.match(start, head, re.DOTALL)), None)


def seconds(container: Any, stream: Any) -> float | None:
    """Returns the duration in the header, None if it gives none. If the video does not begin at 0 on the file's clock,
    a duration in Matroska is ambiguous: FFmpeg writes the end time, mkvmerge the length. It is then ignored."""
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
    """Returns the time at which the video begins, in ticks of the file's clock. If its first packet or frame is far
    from FFmpeg's value, FFmpeg has not read that far and has taken the beginning of the file for that of the video."""
    said = stream.start_time or 0
    return said if first.pts is None or abs(first.pts - said) * stream.time_base < LATE else first.pts


def rate(stream: Any, length: float | None = None) -> float:
    """Returns the average number of frames per second, over `length` seconds if known; 25 if the file gives none."""
    if length and stream.frames > 1:
        return stream.frames / length
    return float(stream.average_rate or stream.guessed_rate or 25)


def duration(shown: Any, stream: Any) -> float:
    """Returns the seconds for which a frame, or a packet's frame, is shown; from the frame rate if the container's
    clock has rounded them."""
    even = 1 / rate(stream)
    said = float((shown.duration or 0) * stream.time_base)
    return max(said, even) if not said or abs(said - even) < min(stream.time_base, TICK) else said


def slack(stream: Any) -> float:
    """Returns the seconds by which the container's clock may have rounded a time."""
    return min(float(stream.time_base) / 2, TICK) + 1e-6
