"""Reads frames of a video file at given times and of a given size.

Times are seconds after the stream's start, where its first frame begins. Frames are resampled at a constant rate: each
output time shows the last frame that has begun by then, as a player would. So variable frame rates are handled
correctly, and frames are dropped or repeated, never blended. Dropped frames are neither scaled nor converted.

Like everything that runs in the workers of `pool.py`, this module must not import JAX, directly or indirectly.
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
from vpae_jax.placeholders import placeholder_kind

# Containers with a single video in a single file. Playlists are excluded, since they refer to other files.
CONTAINERS = (
    "3g2,3gp,apng,asf,avi,dv,flv,gif,h264,hevc,ivf,live_flv,m4v,matroska,mj2,mov,mp4,mpeg,mpegts,mpegvideo,mxf,nut,ogg,"
    "rm,webm,yuv4mpegpipe"
)
# Metadata that is not UTF-8 must not be an error; from version 19 on, PyAV handles this itself.
READABLE: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
MAX_PIXELS = 2**25  # per frame, 8192 x 4096: 134 MB for a GIF; other decoders hold up to 16 frames of 50 MB
LONGEST = 1e7  # seconds, four months
SEEKS = (0.0, 2.0)  # seconds before the start to seek to; after that, the file is read from its beginning
FOR_SEEKING = {"damaged", "unreadable"}  # may only be because decoding began at a frame that depends on others
EXACT = Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND  # without it, greys are up to 2 of 255 too dark
HDR = {ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67}
UNSPECIFIED = 2  # FFmpeg's number for an unspecified colour matrix
LATEST = 2**62  # in ticks of the container's clock: later than any frame


class Unreadable(Exception):
    """A video that gives no clip.

    Attributes:
      kind: one or two words, by which rejects are counted.
      reason: one line.
      passing: whether the cause is a transient error of the system, which may be gone when the file is read again.
    """

    def __init__(self, kind: str, reason: str, passing: bool = False):
        super().__init__(kind, reason, passing)
        self.kind, self.reason, self.passing = kind, reason, passing


@dataclass(frozen=True)
class Probe:
    """Properties of a video file.

    Attributes:
      height, width: as displayed: rotated upright, with square pixels.
      seconds: from the first frame to the end of the last one.
      slack: seconds by which a clip's last frame may begin later than that and still be read.
      fps: average number of frames per second.
      codec: FFmpeg's name of the codec.
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
      Unreadable: there is no video that can be decoded, or its size or length is absurd.
    """
    try:
        return _probe(path)
    except Unreadable as error:
        if error.kind == "unreadable" and not error.passing:
            head = headers.beginning(path)
            if kind := headers.image_kind(head):
                raise Unreadable("image", f"is an image ({kind}), not a video") from error
            if what := placeholder_kind(head):
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
    """Reads `count` frames from `start` on, `1 / fps` seconds apart, scaled to cover `height` x `width` and
    centre-cropped.

    Args:
      path: a video.
      start: seconds after the stream's start.
      count: number of frames.
      fps: frames per second.
      height, width: size of the result.
      out: array to fill; by default a new one.
      until: end of the shot, in seconds after the stream's start: frames that begin there are not shown; the frame
        before stays on.

    Raises:
      Unreadable: the file does not have these frames, or they are damaged.
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
    """Fills `out`. Returns False if decoding began after `start`, or not at all, so that an earlier frame is missing.
    This can only happen after a seek, when the video's `origin` on the file's clock is given."""
    from_beginning = origin is None
    slack = headers.slack(stream)
    near = max(slack, SLACK)  # for times from a manifest: where the clip begins, and where the shot ends
    write = _Writer(out, _aspect(stream))
    held: VideoFrame | None = None
    end = 0.0
    due = 0

    def past(time: float) -> bool:
        """Whether the next output time lies before this time."""
        return start + due / fps + (slack if due else near) < time

    for time, frame in _frames(container, stream, origin):
        if held is None and time > start + slack and not from_beginning:
            return False
        if held is not None and time >= until - near:
            end = until
            break
        # The held frame is shown until this one begins. The first frame also stands for the times before it.
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
    """Converts the frames that are kept to upright RGB of one size; a repeated frame is converted only once."""

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
            raise Unreadable("damaged", "a frame cannot be decoded completely")
        self.last = frame
        # Looked up only once: this makes a frame refer to itself, so that it stays in memory until garbage collection.
        turn = self.turn = self.turn or _turn(frame)
        rows, columns = self.out.shape[1:3]
        shown_height, shown_width = _upright_size(frame, turn, self.aspect)
        scale = max(rows / shown_height, columns / shown_width)
        height, width = (max(math.ceil(n * scale - 1e-6), 1) for n in (shown_height, shown_width))
        if height * width > MAX_PIXELS:  # a very elongated frame
            raise Unreadable(
                "too large", f"has {width}x{height} pixels before cropping; at most {MAX_PIXELS} are supported"
            )
        picture = turn.apply(self.to_rgb(frame, *((width, height) if turn.swap else (height, width))))
        top, left = (height - rows) // 2, (width - columns) // 2
        self.out[index] = picture[top : top + rows, left : left + columns]


class _ToRGB:
    """Scales frames and converts them to RGB; transparent parts become black, and HDR is mapped to BT.709."""

    def __init__(self) -> None:
        # swscale reuses its tables as long as all frames are of one kind; for HDR they take seconds to build.
        self.scale, self.interleave = VideoReformatter(), VideoReformatter()

    def __call__(self, frame: VideoFrame, height: int, width: int) -> UInt8[np.ndarray, "{height} {width} 3"]:
        alpha = any(component.is_alpha for component in frame.format.components)
        settings: dict[str, Any] = {}
        if frame.color_trc in HDR:
            settings = {"dst_color_trc": ColorTrc.BT709, "dst_color_primaries": ColorPrimaries.BT709}
        elif frame.colorspace == UNSPECIFIED and not frame.format.is_rgb:
            # As players assume: high definition is BT.709, the rest BT.601.
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
        # Gives the same values as converting to rgb24 directly, in half the time.
        return _pixels(self.interleave.reformat(converted, format="rgb24", threads=1), 3)


def _pixels(frame: VideoFrame, channels: int) -> UInt8[np.ndarray, "h w {channels}"]:
    """Returns a view of the memory of a frame with interleaved channels."""
    plane = frame.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
    return rows[: frame.height, : frame.width * channels].reshape(frame.height, frame.width, channels)


@dataclass(frozen=True)
class _Turn:
    """How a decoded image is brought upright: transposed, then mirrored."""

    swap: bool = False
    left_right: bool = False
    up_down: bool = False

    def apply(self, picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
        if self.swap:
            picture = picture.transpose(1, 0, 2)
        return picture[:: -1 if self.up_down else 1, :: -1 if self.left_right else 1]


def _turn(frame: VideoFrame) -> _Turn:
    """Reads the display matrix, x' = a x + c y, y' = b x + d y, as quarter turns and reflections."""
    side = frame.side_data.get("DISPLAYMATRIX")
    if side is None:
        return _Turn()
    a, b, _, c, d = (int(n) for n in np.frombuffer(side, np.int32)[:5])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return _Turn(False, a < 0, d < 0)
    return _Turn(True, c < 0, b < 0)


def _aspect(stream: Any) -> Fraction:
    """Returns a pixel's width over its height; 1 if the file gives none, or an implausible one."""
    found = stream.sample_aspect_ratio
    # From version 19 on, PyAV has its own class for this.
    aspect = Fraction(found.numerator, found.denominator) if found else Fraction(1)
    return aspect if Fraction(1, 16) <= aspect <= 16 else Fraction(1)


def _upright_size(frame: VideoFrame, turn: _Turn, aspect: Fraction) -> tuple[int, int]:
    """Returns height and width as displayed; pixels that are not square are made so by stretching the width."""
    width = max(round(frame.width * aspect), 1)
    return (width, frame.height) if turn.swap else (frame.height, width)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Opens a file and its video stream. It is decoded by one thread, since parallelism comes from the workers."""
    with _decoding():
        if not path.is_file():
            raise Unreadable("unreadable", "is not a file" if path.exists() else "does not exist")
        container = av.open(
            f"file:{path}",
            **READABLE,
            options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"},
        )
    with container:
        pictures = [s for s in container.streams.video if not s.disposition & 0x400]  # excludes cover art of music
        if not pictures:
            raise Unreadable("no video", "has no video stream")
        stream = pictures[0]
        context = stream.codec_context
        if context is None:
            raise Unreadable("unreadable", "has a codec that FFmpeg cannot decode")
        if context.width * context.height > MAX_PIXELS:
            raise Unreadable(
                "too large", f"has {context.width}x{context.height} pixels; at most {MAX_PIXELS} are supported"
            )
        # Decoders round the number of columns up to a multiple of 64.
        context.options = {"max_pixels": str(MAX_PIXELS + 64 * 2**16)}
        context.thread_count = 1
        yield container, stream


@contextmanager
def _decoding() -> Iterator[None]:
    """Converts errors of FFmpeg and of the system to `Unreadable`."""
    try:
        yield
    except IndexError as error:  # PyAV raises this when a damaged file announces another stream midway
        raise Unreadable("unreadable", "cannot be decoded: its streams change") from error
    except (FFmpegError, OSError) as error:
        why = (error.strerror or str(error)).lower()
        # FFmpeg passes on the system's error numbers, but uses two of them itself: EPERM for any error, and EIO for a
        # file that ends too early. The latter cannot be told from the system's, and is treated as such.
        if isinstance(error, OSError | MemoryError) and error.errno != errno.EPERM:
            raise Unreadable("unreadable", f"cannot be read: {why}", passing=True) from error
        raise Unreadable("unreadable", f"cannot be decoded: {why}") from error


def _frames(container: Any, stream: Any, origin: int | None = None) -> Iterator[tuple[float, VideoFrame]]:
    """Yields frames with their times in seconds, which never decrease. `origin` is the beginning of the video on the
    file's clock, by default the time of the first packet."""
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
    """Returns the length of the video from the timestamps of its packets, which are read but not decoded: either all
    packets of the file, or those from the last keyframe on."""
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
            # In some formats few packets have a timestamp.
            return max(end, 0 if stream.duration else number / headers.rate(stream))
    return end if end else _seconds_of_packets(path, from_last_keyframe=False)
