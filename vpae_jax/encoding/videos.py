"""Makes clips from the videos of a manifest: probes, cuts, reads and filters them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from vpae_jax.encoding import worker_tasks
from vpae_jax.encoding.buckets import Size, choose
from vpae_jax.encoding.cells import printable
from vpae_jax.encoding.clip_source import CaptionedVideo, Clip, Reject, in_turn
from vpae_jax.encoding.cutting import clip_starts, shot_end
from vpae_jax.encoding.decoding import Probe, Unreadable
from vpae_jax.encoding.filters import Filters, Refusal
from vpae_jax.encoding.identity import Identity
from vpae_jax.encoding.pool import Lost, Pool
from vpae_jax.types import UserError

T = TypeVar("T")
LEAST_FPS, MOST_FPS, LONGEST_TIMEOUT = 0.01, 1000, 86400  # a day
PICTURE = 160  # approximate number of pixels of the longer side of a reject's picture


@runtime_checkable
class CaptionedVideos(Protocol):
    """A manifest: entries in a fixed order, in work units. `identity` is everything that determines them. All paths
    begin with `root`, the folder of videos."""

    @property
    def root(self) -> Path: ...
    @property
    def identity(self) -> Identity: ...

    @property
    def units(self) -> int: ...

    def rows_of(self, unit: int) -> int: ...

    def read(self, unit: int) -> Iterator[CaptionedVideo | Reject]: ...


@dataclass(frozen=True)
class _Cut:
    """A clip to be read."""

    id: str
    entry: CaptionedVideo
    probe: Probe
    bucket: Size
    start: float
    until: float


class VideoClips:
    """A `ClipSource` of clips from video files."""

    def __init__(
        self,
        manifest: CaptionedVideos,
        buckets: tuple[Size, ...],
        frames: int,
        fps: float = 16.0,
        filters: Filters | None = None,
        stride: float | None = None,
        clips_per_video: int = 1,
        workers: int = 2,
        timeout: float = 120.0,
        unfit: Callable[[str], Refusal | None] = lambda caption: None,
    ):
        """
        Args:
          manifest: videos with their captions.
          buckets: heights and widths; each video gets the one with the nearest aspect ratio.
          frames: frames per clip, 1 + a multiple of 4.
          fps: frames per second of a clip.
          filters: bounds for videos and clips.
          stride: seconds between the starts of a shot's clips; by default clips follow each other without overlap.
          clips_per_video: maximum number of clips per video.
          workers: processes that decode; 0 decodes in this process, without protection against crashes and hangs of
            the decoder.
          timeout: seconds after which a worker is considered to hang.
          unfit: returns why a caption is rejected, in addition to the filters; called before its video is probed. It
            is not part of the identity, so it must depend only on the encoders, whose identity is recorded separately.

        Raises:
          UserError: an invalid number.
        """
        if frames < 1 or frames % 4 != 1:
            raise UserError(f"clips of {frames} frames: expected 1 + a multiple of 4, such as 81")
        for name, value in {
            "fps": fps,
            "stride": stride,
            "clips_per_video": clips_per_video,
            "timeout": timeout,
        }.items():
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} is {value}; expected a positive number")
        if fps < LEAST_FPS:
            raise UserError(f"fps is {fps:g}; expected at least {LEAST_FPS}")
        if fps > MOST_FPS:
            raise UserError(f"fps is {fps:g}; expected at most {MOST_FPS}")
        if stride is not None and stride * fps < 1:
            raise UserError(f"stride is {stride:g} s, less than a frame; expected at least {1 / fps:g} s")
        if timeout > LONGEST_TIMEOUT:
            raise UserError(f"timeout is {timeout:g} s; expected at most {LONGEST_TIMEOUT}")
        if workers < 0:
            raise UserError(f"workers is {workers}; expected 0 or more")
        if not buckets:
            raise UserError("no buckets are given; expected at least one size, such as 480x832")
        self.manifest, self.buckets, self.frames, self.fps = manifest, buckets, frames, fps
        self.filters, self.stride, self.clips_per_video = filters or Filters(), stride, clips_per_video
        self.workers, self.timeout, self.unfit = workers, timeout, unfit
        self._pool: Pool | None = None
        self._running: list[Future[Any]] = []

    @property
    def identity(self) -> Identity:
        """Everything that determines the clips, by the names of the flags."""
        return {
            "kind": "videos",
            "manifest": self.manifest.identity,
            "buckets": [f"{height}x{width}" for height, width in self.buckets],
            "num_frames": self.frames,
            "fps": self.fps,
            **asdict(self.filters),
            "stride": self.stride,
            "clips_per_video": self.clips_per_video,
        }

    @property
    def units(self) -> int:
        return self.manifest.units

    def expected(self, unit: int) -> int | None:
        """Returns the number of clips and rejects in a unit; None if a video may give several clips."""
        return self.manifest.rows_of(unit) if self.clips_per_video == 1 else None

    def read(self, units: Iterable[int]) -> Iterator[Clip | Reject | None]:
        """Yields the clips and rejects of units, with None after each unit. A few clips are decoded ahead.

        A clip that kills its worker, or fails because of the system, is tried once more when nothing else is running.
        """
        looked = self._ahead(in_turn(self.manifest.read, units), self._look, max(self.workers, 1))
        cuts = chain.from_iterable(self._cut(entry, found) for entry, found in looked)
        for cut, found in self._ahead(cuts, self._read, 2 * self.workers):
            yield self._judged(cut, found)

    def close(self) -> None:
        """Ends the workers."""
        if self._pool:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> VideoClips:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look(self, entry: CaptionedVideo | Reject | None) -> Future[Any] | None:
        if not isinstance(entry, CaptionedVideo) or self._unused(entry.caption):
            return None
        return self._submit(worker_tasks.look, entry.path)

    def _unused(self, caption: str) -> Refusal | None:
        return self.filters.caption(caption) or self.unfit(caption)

    def _cut(
        self, entry: CaptionedVideo | Reject | None, found: Probe | Unreadable | Lost | None
    ) -> Iterator[_Cut | Reject | None]:
        if not isinstance(entry, CaptionedVideo):
            yield entry
            return
        if isinstance(found, Probe):
            bucket = choose(self.buckets, found.height, found.width)
            first, last = max(entry.start or 0.0, 0.0), found.seconds if entry.end is None else entry.end
            seconds = max(min(last, found.seconds) - first, 0.0)
            refusal = self.filters.video(seconds, found.height, found.width, bucket)
            if refusal is None:
                length = (self.frames - 1) / self.fps
                starts = clip_starts(
                    seconds=found.seconds,
                    length=length,
                    start=entry.start,
                    end=entry.end,
                    cuts=entry.cuts,
                    stride=self.stride,
                    most=self.clips_per_video,
                    last=1 / self.fps,
                    slack=found.slack,
                )
                for number, start in enumerate(starts):
                    until = shot_end(start, entry.end, entry.cuts)
                    yield _Cut(f"{entry.id}#{number}", entry, found, bucket, start, until)
                if starts:
                    return
                shot = " in one shot" if entry.cuts else ""
                part = "" if entry.start is None and entry.end is None else "the selected part "
                needed = f"{length:.3f} s" if length else "a frame"
                refusal = "too short", f"{part}lasts {seconds:.3f} s; a clip needs {needed}{shot}"
        elif found is None:
            refusal = self._unused(entry.caption)
            assert refusal is not None
        else:
            refusal = found.kind, _reason(entry, found)
        yield Reject(entry.id, *refusal)

    def _read(self, cut: _Cut | Reject | None) -> Future[Any] | None:
        if not isinstance(cut, _Cut):
            return None
        shape = (self.frames, *cut.bucket, 3)
        until = () if cut.until == math.inf else (cut.until,)
        return self._submit(worker_tasks.read, cut.entry.path, cut.start, self.fps, *until, shape=shape)

    def _judged(self, cut: _Cut | Reject | None, found: Any) -> Clip | Reject | None:
        if not isinstance(cut, _Cut):
            return cut
        if isinstance(found, Lost):
            return Reject(cut.id, found.kind, _reason(cut.entry, found))
        video, measures = found
        if isinstance(measures, Unreadable):
            return Reject(cut.id, measures.kind, _reason(cut.entry, measures))
        refusal = self.filters.clip(measures)
        if refusal:
            step = max(max(cut.bucket) // PICTURE, 1)
            return Reject(cut.id, *refusal, video[len(video) // 2, ::step, ::step].copy())
        probe = cut.probe
        about = {
            "video": cut.entry.path.relative_to(self.manifest.root).as_posix(),
            "start": cut.start,
            "source": {"height": probe.height, "width": probe.width, "fps": round(probe.fps, 3), "codec": probe.codec},
            "bucket": list(cut.bucket),
            "fps": self.fps,
            **measures,
        }
        if cut.entry.about:
            about["row"] = dict(cut.entry.about)  # nested, since a table may have columns of any name
        return Clip(cut.id, video, cut.entry.caption, about)

    def _submit(self, function: Callable[..., Any], *args: Any, shape: tuple[int, ...] | None = None) -> Future[Any]:
        if self.workers:
            self._pool = self._pool or Pool(self.workers, self.timeout)
            self._running.append(self._pool.submit(function, *args, shape=shape))
            return self._running[-1]
        done: Future[Any] = Future()
        if shape is None:
            done.set_result(function(*args))
        else:
            array = np.empty(shape, np.uint8)
            done.set_result((array, function(array, *args)))
        return done

    def _ahead(
        self, items: Iterable[T], submit: Callable[[T], Future[Any] | None], number: int
    ) -> Iterator[tuple[T, Any]]:
        """Yields items with their results, or with the `Lost` that was raised, in order; up to `number` more run in the
        meantime."""
        waiting: deque[tuple[T, Future[Any] | None]] = deque()
        try:
            for item in items:
                waiting.append((item, submit(item)))
                if len(waiting) > number:
                    yield self._result(*waiting.popleft(), submit)
            while waiting:
                yield self._result(*waiting.popleft(), submit)
        finally:
            for _, future in waiting:
                if future:
                    future.cancel()

    def _result(self, item: T, future: Future[Any] | None, submit: Callable[[T], Future[Any] | None]) -> tuple[T, Any]:
        """Returns an item and its result, from a second try if the first failed for a possibly transient reason."""
        found = _outcome(future)
        self._running = [other for other in self._running if not other.done()]  # finished futures would hold clips
        if _may_pass(found):
            wait(self._running)  # so that a worker that was killed for lack of memory has all of it
            found = _outcome(submit(item))
        return item, found


def _outcome(future: Future[Any] | None) -> Any:
    """Returns a task's result, or the `Lost` that it raised."""
    if future is None:
        return None
    try:
        return future.result()
    except Lost as lost:
        return lost


def _may_pass(found: Any) -> bool:
    """Whether a result is a failure that may not happen again."""
    last = found[1] if isinstance(found, tuple) else found  # a tuple has the clip's frames first
    return isinstance(last, Lost) or (isinstance(last, Unreadable) and last.passing)


def _reason(entry: CaptionedVideo, why: Unreadable | Lost) -> str:
    return printable(f"{entry.path.name} {why.reason}")
