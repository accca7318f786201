"""Frames of a video file at given times and of a given size.

Times are seconds after the stream's start, where its first frame begins. Frames are resampled at a constant rate: each
output time shows the last frame that has begun by then, as a player would. So a variable frame rate is right, and
frames are dropped or repeated, never blended. Frames that are dropped are neither scaled nor converted.

This module, like all that runs in the workers of `pool.py`, imports neither JAX nor anything that does.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc, Interpolation, VideoReformatter
from jaxtyping import UInt8

from vpae_jax.encoding import headers
from vpae_jax.encoding.cutting import SLACK
from vpae_jax.impostors import impostor

# Containers of one video in one file. Playlists are not among them: they name other files.
CONTAINERS = (
    "3g2,3gp,apng,asf,avi,dv,flv,gif,h264,hevc,ivf,live_flv,m4v,matroska,mj2,mov,mp4,mpeg,mpegts,mpegvideo,mxf,nut,ogg,"
    "rm,webm,yuv4mpegpipe"
)
# Metadata that is no UTF-8 is to be no error; from version 19 on PyAV reads it so by itself.
READABLE: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
MAX_PIXELS = 2**25  # of a frame, 8192 x 4096: of a GIF it takes 134 MB, and other decoders hold up to 16 of 50 MB
LONGEST = 1e7  # seconds, four months
SEEKS = (0.0, 2.0)  # seconds before the start; then the file is read from its beginning
FOR_SEEKING = {"damaged", "unreadable"}  # what may be so because decoding began at a frame that depends on others
EXACT = Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND  # without it greys come out 2 of 255 too dark
HDR = {ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67}
UNSPECIFIED = 2  # FFmpeg's number for a matrix of colours that the file does not say
LATEST = 2**62  # of a container's ticks: later than any frame


class Unreadable(Exception):
    """A video that gives no clip.

    Attributes:
      kind: one or two words, by which rejects are counted.
      reason: one line.
      passing: whether it is the system's trouble, and may be gone when the file is read again.
    """

    def __init__(self, kind: str, reason: str, passing: bool = False):
        super().__init__(kind, reason, passing)
        self.kind, self.reason, self.passing = kind, reason, passing


@dataclass(frozen=True)
class Probe:
    """What a file says of its video.

    Attributes:
      height, width: as shown: turned upright, pixels made square.
      seconds: from the first frame to the last one's end.
      slack: seconds by which a clip's last frame may begin later than that, and yet be read.
      fps: frames a second on average.
      codec: FFmpeg's name.
    """

    height: int
    width: int
    seconds: float
    slack: float
    fps: float
    codec: str


def probe(path: Path) -> Probe:
    """Reads a file's header and decodes its first frame.

    Raises:
      Unreadable: no video that can be decoded, or an absurd size or length.
    """
    try:
        return _probe(path)
    except Unreadable as error:
        if error.kind == "unreadable" and not error.passing:
            head = headers.beginning(path)
            if kind := headers.image_kind(head):
                raise Unreadable("image", f"is an image ({kind}), not a video") from error
            if what := impostor(head):
                raise Unreadable("unreadable", what) from error
        raise


def _probe(path: Path) -> Probe:
    with _opened(path) as (container, stream), _decoding():
        if container.metadata.get("major_brand") in headers.IMAGE_BRANDS:
            raise Unreadable("unreadable", "has no more than one frame")
        for _, frame in _frames(container, stream):
            height, width = _upright_size(frame, _turn(frame), _aspect(stream))
            seconds, origin = headers.seconds(container, stream), headers.origin(stream, frame)
            if seconds is None or origin != (stream.start_time or 0) or container.format.name == "mpeg":
                seconds = _seconds_of_packets(path, from_last_keyframe=origin != 0)
            if not 0 <= seconds <= LONGEST:
                raise Unreadable("unreadable", f"claims to last {seconds:g} s; at most {LONGEST:g} s are read")
            slack = max(headers.slack(stream), SLACK)
            return Probe(height, width, seconds, slack, headers.rate(stream, seconds), stream.codec_context.name)
    raise Unreadable("unreadable", "has no frame that can be decoded")


def read_frames(
    path: Path,
    start: float,
    count: int,
    fps: float,
    height: int,
    width: int,
    out: UInt8[np.ndarray, "{count} {height} {width} 3"] | None = None,
    until: float = math.inf,
) -> UInt8[np.ndarray, "{count} {height} {width} 3"]:
    """`count` frames from `start` on, `1 / fps` seconds apart, scaled to cover `height` x `width` and cropped to it.

    Args:
      path: a video.
      start: seconds after the stream's start.
      count: frames.
      fps: frames a second.
      height, width: of the result; the centre of what is shown is kept.
      out: where the frames go; new memory by default.
      until: seconds after the stream's start, where the shot ends: what begins then is not shown, and what is shown
        then stays.

    Raises:
      Unreadable: the file has no such frames, or they are damaged.
    """
    if out is None:
        out = np.empty((count, height, width, 3), np.uint8)
    for back in SEEKS:
        target = start - back
        if target > 0:
            try:
                with _opened(path) as (container, stream), _decoding():
                    origin = headers.origin(stream, next(container.demux(stream)))
                    container.seek(math.floor(target / stream.time_base) + origin, stream=stream)
                    if _fill(out, container, stream, start, fps, until, origin):
                        return out
            except Unreadable as error:
                if error.kind not in FOR_SEEKING:
                    raise
    with _opened(path) as (container, stream), _decoding():
        _fill(out, container, stream, start, fps, until)
    return out


def _fill(
    out: UInt8[np.ndarray, "count height width 3"],
    container: Any,
    stream: Any,
    start: float,
    fps: float,
    until: float,
    origin: int | None = None,
) -> bool:
    """Fills `out`; False when decoding began after `start`, or nowhere, so that a frame is missing before it. It may do
    so where the video's origin on the file's clock is given; else the file is at its beginning."""
    from_beginning = origin is None
    slack = headers.slack(stream)
    near = max(slack, SLACK)  # of times that a manifest gave: where the clip begins, and where the shot ends
    write = _Writer(out, _aspect(stream))
    held: VideoFrame | None = None
    end = 0.0
    due = 0

    def past(time: float) -> bool:
        """Whether something that begins at this time is no longer due."""
        return start + due / fps + (slack if due else near) < time

    for time, frame in _frames(container, stream, origin):
        if held is None and time > start + slack and not from_beginning:
            return False
        if held is not None and time >= until - near:
            end = until
            break
        # What is held shows until this frame begins. The first frame also stands for the times before it.
        while held is not None and due < len(out) and past(time):
            write(held, due)
            due += 1
        if due == len(out):
            return True
        held = frame
        end = time + headers.duration(frame, stream)
    if held is None and not from_beginning:
        return False
    while held is not None and due < len(out) and start + due / fps < end + near:
        write(held, due)
        due += 1
    if due < len(out):
        needed, said = start + (len(out) - 1) / fps, headers.seconds(container, stream)
        if said is not None and said > needed:
            raise Unreadable("truncated", f"should last {said:.2f} s, but its frames end at {end:.2f} s")
        raise Unreadable("too short", f"ends at {end:.2f} s; the clip needs {needed:.2f} s")
    return True


class _Writer:
    """Converts kept frames to upright RGB of one size, a frame that is shown twice only once."""

    def __init__(self, out: UInt8[np.ndarray, "count height width 3"], aspect: Fraction):
        self.out = out
        self.aspect = aspect
        self.to_rgb = _ToRGB()
        self.last: VideoFrame | None = None
        self.turn: _Turn | None = None

    def __call__(self, frame: VideoFrame, index: int) -> None:
        if frame is self.last:
            self.out[index] = self.out[index - 1]
            return
        if frame.is_corrupt:
            raise Unreadable("damaged", "a frame cannot be decoded whole")
        self.last = frame
        # Asked once: a frame that was asked for it refers to itself, and stays until Python looks for such.
        turn = self.turn = self.turn or _turn(frame)
        rows, columns = self.out.shape[1:3]
        shown_height, shown_width = _upright_size(frame, turn, self.aspect)
        scale = max(rows / shown_height, columns / shown_width)
        height, width = (max(math.ceil(n * scale - 1e-6), 1) for n in (shown_height, shown_width))
        if height * width > MAX_PIXELS:  # of one that is very long
            raise Unreadable(
                "too large", f"has {width}x{height} pixels before it is cropped; at most {MAX_PIXELS} are made"
            )
        picture = turn.apply(self.to_rgb(frame, *((width, height) if turn.swap else (height, width))))
        top, left = (height - rows) // 2, (width - columns) // 2
        self.out[index] = picture[top : top + rows, left : left + columns]


class _ToRGB:
    """Scales frames and converts them to RGB; transparent parts become black, and HDR is mapped to BT.709."""

    def __init__(self) -> None:
        # swscale keeps its tables as long as it is given frames of one kind; for HDR they take seconds to make.
        self.scale, self.interleave = VideoReformatter(), VideoReformatter()

    def __call__(self, frame: VideoFrame, height: int, width: int) -> UInt8[np.ndarray, "{height} {width} 3"]:
        alpha = any(component.is_alpha for component in frame.format.components)
        settings: dict[str, Any] = {}
        if frame.color_trc in HDR:
            settings = {"dst_color_trc": ColorTrc.BT709, "dst_color_primaries": ColorPrimaries.BT709}
        elif frame.colorspace == UNSPECIFIED and not frame.format.is_rgb:
            # As players guess: high definition is BT.709, the rest BT.601.
            large = frame.width >= 1280 or frame.height > 576
            settings = {"src_colorspace": Colorspace.ITU709 if large else Colorspace.ITU601}
        converted = self.scale.reformat(
            frame,
            width=width,
            height=height,
            format="rgba" if alpha else "gbrp",
            interpolation=(Interpolation.AREA if height < frame.height else Interpolation.BICUBIC) | EXACT,
            threads=1,
            **settings,
        )
        if alpha:
            picture = _pixels(converted, 4)
            return (picture[..., :3].astype(np.uint16) * picture[..., 3:] // 255).astype(np.uint8)
        # The same numbers as straight to rgb24, in half of the time.
        return _pixels(self.interleave.reformat(converted, format="rgb24", threads=1), 3)


def _pixels(frame: VideoFrame, channels: int) -> UInt8[np.ndarray, "h w {channels}"]:
    """The memory of a frame whose channels lie beside one another."""
    plane = frame.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
    return rows[: frame.height, : frame.width * channels].reshape(frame.height, frame.width, channels)


@dataclass(frozen=True)
class _Turn:
    """How a decoded picture is brought upright: transposed, then mirrored."""

    swap: bool = False
    left_right: bool = False
    up_down: bool = False

    def apply(self, picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
        if self.swap:
            picture = picture.transpose(1, 0, 2)
        return picture[:: -1 if self.up_down else 1, :: -1 if self.left_right else 1]


def _turn(frame: VideoFrame) -> _Turn:
    """From the display matrix: x' = a x + c y, y' = b x + d y, here in quarter turns."""
    side = frame.side_data.get("DISPLAYMATRIX")
    if side is None:
        return _Turn()
    a, b, _, c, d = (int(n) for n in np.frombuffer(side, np.int32)[:5])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return _Turn(False, a < 0, d < 0)
    return _Turn(True, c < 0, b < 0)


def _aspect(stream: Any) -> Fraction:
    """A pixel's width over its height, where the file says something that can be meant."""
    found = stream.sample_aspect_ratio
    # From PyAV 19 on it is of a class of its own.
    aspect = Fraction(found.numerator, found.denominator) if found else Fraction(1)
    return aspect if Fraction(1, 16) <= aspect <= 16 else Fraction(1)


def _upright_size(frame: VideoFrame, turn: _Turn, aspect: Fraction) -> tuple[int, int]:
    """Height and width as shown: pixels that are not square are made so by stretching the width."""
    width = max(round(frame.width * aspect), 1)
    return (width, frame.height) if turn.swap else (frame.height, width)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """A file and its video stream, decoded by one thread: there are as many workers as there is work for."""
    with _decoding():
        if not path.is_file():
            raise Unreadable("unreadable", "is no file" if path.exists() else "does not exist")
        container = av.open(
            f"file:{path}",
            **READABLE,
            options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"},
        )
    with container:
        pictures = [s for s in container.streams.video if not s.disposition & 0x400]  # no cover of a piece of music
        if not pictures:
            raise Unreadable("no video", "has no video stream")
        stream = pictures[0]
        context = stream.codec_context
        if context is None:
            raise Unreadable("unreadable", "is of a codec that FFmpeg does not decode")
        if context.width * context.height > MAX_PIXELS:
            raise Unreadable(
                "too large", f"has {context.width}x{context.height} pixels; at most {MAX_PIXELS} are decoded"
            )
        # Decoders count columns in multiples of 64.
        context.options = {"max_pixels": str(MAX_PIXELS + 64 * 2**16)}
        context.thread_count = 1
        yield container, stream


@contextmanager
def _decoding() -> Iterator[None]:
    """FFmpeg's errors and the system's become `Unreadable`."""
    try:
        yield
    except IndexError as error:  # PyAV's, when a damaged file announces another stream in its middle
        raise Unreadable("unreadable", "cannot be decoded: its streams change") from error
    except (FFmpegError, OSError) as error:
        why = (error.strerror or str(error)).lower()
        # FFmpeg passes on the system's numbers, and uses two of them as its own: EPERM for anything, and EIO for a file
        # that ends too early, which is taken for the system's.
        if isinstance(error, OSError | MemoryError) and error.errno != errno.EPERM:
            raise Unreadable("unreadable", f"cannot be read: {why}", passing=True) from error
        raise Unreadable("unreadable", f"cannot be decoded: {why}") from error


def _frames(container: Any, stream: Any, origin: int | None = None) -> Iterator[tuple[float, VideoFrame]]:
    """Frames with their times in seconds, which never run backwards. The video begins at `origin` on the file's clock,
    by default where the first packet says."""
    step = 1 / headers.rate(stream)
    last = -math.inf
    for packet in container.demux(stream):
        origin = headers.origin(stream, packet) if origin is None else origin
        for frame in packet.decode():
            if frame.pts is None:
                time = 0.0 if last == -math.inf else last + step
            else:
                time = float((frame.pts - origin) * stream.time_base)
            last = max(time, last)
            yield last, frame


def _seconds_of_packets(path: Path, from_last_keyframe: bool) -> float:
    """How long the video is, from the times of its packets, which are read but not decoded: those of the whole file, or
    the last ones."""
    end, number = 0.0, 0
    with _opened(path) as (container, stream):
        packets = container.demux(stream)
        first = next(packets)
        origin = headers.origin(stream, first)
        if from_last_keyframe:
            with suppress(FFmpegError):
                container.seek(LATEST, stream=stream)
        for packet in container.demux(stream) if from_last_keyframe else chain([first], packets):
            number += packet.size > 0
            if packet.pts is not None:
                end = max(end, float((packet.pts - origin) * stream.time_base) + headers.duration(packet, stream))
        if not from_last_keyframe:
            # Some formats give few packets a time.
            return max(end, 0 if stream.duration else number / headers.rate(stream))
    return end if end else _seconds_of_packets(path, from_last_keyframe=False)
