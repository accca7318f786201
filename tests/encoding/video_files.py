"""Small videos of many kinds, each frame of which shows its number."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 8


def numbered(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames of 8 columns, white where the number's bit is set; the lower third moves smoothly."""
    video = np.zeros((count, height, width, 3), np.uint8)
    columns = np.arange(width) * BITS // width
    ramp = np.linspace(0, 120, width).astype(np.uint8)
    for i in range(count):
        video[i] = np.where((i >> columns) & 1, 230, 20)[None, :, None]
        video[i, 2 * height // 3 :] = np.roll(ramp, 3 * i)[None, :, None]
    return video


def numbers(video: np.ndarray) -> list[int]:
    """What `numbered` frames show, at any size."""
    _, height, width, _ = video.shape
    centres = ((np.arange(BITS) + 0.5) * width / BITS).astype(int)
    bits = video[:, height // 4][:, centres].mean(-1) > 125
    return [int(n) for n in (bits << np.arange(BITS)).sum(1)]


def write(
    path: Path,
    video: np.ndarray,
    codec: str = "libx264",
    fps: float = 16,
    pixels: str = "yuv420p",
    times: list[int] | None = None,
    rotation: float | None = None,
    mirrored: bool = False,
    audio: bool = False,
    aspect: Fraction | None = None,
    **options: str,
) -> Path:
    """Writes a video; its container is told by the file's name.

    `times` are of frames, in milliseconds, for a variable frame rate.
    """
    _, height, width, _ = video.shape
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation, hflip=mirrored)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        stream.options = options
        sound = container.add_stream("aac", rate=16000) if audio else None
        for i, picture in enumerate(video):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            _write_sound(container, sound, len(video) / fps)
    return path


def write_sound(path: Path, seconds: float = 1.0) -> Path:
    """A file with sound alone."""
    with av.open(str(path), "w") as container:
        _write_sound(container, container.add_stream("aac", rate=16000), seconds)
    return path


def _write_sound(container, stream, seconds: float) -> None:
    for i in range(int(seconds * 16000 / 1024)):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, i * 1024, Fraction(1, 16000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())
