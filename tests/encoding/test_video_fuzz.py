"""Videos of many kinds, damaged in many ways: 1,184 cases, each a clip or a reject with its reason.

24 kinds of small real videos, each in 48 damaged versions and as it is, and 8 files that are no videos at all. They are
read as a user's are, by worker processes; what costs a worker its life is refused, and the rest go on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from video_files import numbered, write, write_sound

from vpae_jax.encoding.clip_source import CaptionedVideo, Clip, Reject
from vpae_jax.encoding.filters import Filters
from vpae_jax.encoding.videos import VideoClips

REALTIME = {"cpu-used": "8", "deadline": "realtime"}
KINDS = {
    "h264.mp4": dict(g="8", bf="2"),
    "h264.mkv": dict(g="8", bf="2"),
    "h264.ts": dict(g="8"),
    "h264.mov": dict(g="8", movflags="faststart"),
    "raw.h264": dict(g="8"),
    "ten.mp4": dict(pixels="yuv420p10le", g="8"),
    "chroma.mp4": dict(pixels="yuv444p", g="8"),
    "hevc.mp4": dict(codec="libx265", **{"x265-params": "log-level=none:keyint=8:pools=none"}),
    "vp8.webm": dict(codec="libvpx", **REALTIME),
    "vp9.webm": dict(codec="libvpx-vp9", **REALTIME),
    "alpha.webm": dict(codec="libvpx-vp9", pixels="yuva420p", **REALTIME),
    "mpeg4.avi": dict(codec="mpeg4", g="8"),
    "mpeg1.mpg": dict(codec="mpeg1video", fps=25, g="8"),
    "picture.gif": dict(codec="gif", pixels="rgb8"),
    "picture.apng": dict(codec="apng", pixels="rgb24"),
    "flash.flv": dict(codec="flv", g="8"),
    "windows.wmv": dict(codec="wmv2"),
    "motion.avi": dict(codec="mjpeg", pixels="yuvj420p"),
    "prores.mov": dict(codec="prores_ks", pixels="yuva444p10le"),
    "variable.mp4": dict(times=[i * 60 + 25 * (i % 3) for i in range(24)]),
    "turned.mp4": dict(rotation=90, g="8"),
    "sound.mp4": dict(audio=True, g="8"),
}


def make_videos(folder: Path) -> dict[str, bytes]:
    """One small video of each kind."""
    paths = [write(folder / name, numbered(24), **settings) for name, settings in KINDS.items()]
    paths.append(write(folder / "odd.mkv", numbered(24, 23, 17), codec="ffv1"))
    paths.append(write(folder / "still.mkv", numbered(3), times=[0, 100, 100_000_000], bf="0"))
    return {path.name: path.read_bytes() for path in paths}


def oddities(folder: Path) -> list[Path]:
    """What is no video, or one that nobody wants."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    (folder / "text.mp4").write_text("a text\n" * 500)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "noise.mkv").write_bytes(rng.bytes(5000))
    (folder / "folder.mp4").mkdir()
    write(folder / "one.mp4", numbered(1))
    write(folder / "wide.mp4", numbered(24, 16, 4000))
    write_sound(folder / "sound.mp4")
    return [*sorted(folder.iterdir()), folder / "none.mp4"]


def damaged(data: bytes, kind: int, rng: np.random.Generator) -> bytes:
    """A damaged version of a file; headers and contents are both hit."""
    out = bytearray(data)
    place = int(rng.integers(0, len(out) if kind % 2 else min(len(out), 600)))
    match kind % 6:
        case 0:
            return bytes(out[:place])
        case 1:
            for at in rng.integers(0, len(out), int(rng.integers(1, 40))):
                out[at] ^= 1 << int(rng.integers(8))
        case 2:
            out[place : place + int(rng.integers(1, 200))] = b"\0" * int(rng.integers(1, 200))
        case 3:
            run = int(rng.integers(1, 400))
            out[place : place + run] = rng.bytes(run)
        case 4:
            for at in rng.integers(0, min(len(out), 800), int(rng.integers(1, 6))):
                out[at] = int(rng.choice([0, 1, 127, 128, 255]))
        case 5:
            other = int(rng.integers(0, len(out)))
            out[place : place + 300], out[other : other + 300] = out[other : other + 300], out[place : place + 300]
    return bytes(out)


class Folder:
    """All files of a folder, as a manifest."""

    units = 1

    def __init__(self, root: Path, paths: list[Path]):
        self.root, self.paths = root, paths

    @property
    def identity(self) -> dict:
        return {"paths": list(map(str, self.paths))}

    def rows_of(self, unit: int) -> int:
        return len(self.paths)

    def read(self, unit: int):
        for path in self.paths:
            yield CaptionedVideo(path.name, path, "a caption", start=0.125)


def make_cases(folder: Path, kinds: int) -> list[Path]:
    rng = np.random.default_rng(0)
    (folder / "whole").mkdir()
    (folder / "damaged").mkdir()
    videos = make_videos(folder / "whole")
    names = list(videos)
    for index, (name, data) in enumerate(videos.items()):
        for kind in range(kinds):
            # One in eight is called what it is not.
            called = names[(index + 1 + kind) % len(names)] if kind % 8 == 7 else name
            stem, suffix = called.split(".")
            (folder / "damaged" / f"{index:02}-{kind:02}-{stem}.{suffix}").write_bytes(damaged(data, kind, rng))
    return [*sorted((folder / "whole").iterdir()), *sorted((folder / "damaged").iterdir()), *oddities(folder / "odd")]


@pytest.mark.parametrize("kinds", [16, pytest.param(48, marks=pytest.mark.long)])
def test_every_file_is_a_clip_or_a_reject(tmp_path, kinds):
    paths = make_cases(tmp_path, kinds)
    assert len(paths) == 24 * (1 + kinds) + 8
    with VideoClips(
        Folder(tmp_path, paths), ((48, 64), (64, 48)), 9, filters=Filters(min_motion=0.0), timeout=120.0
    ) as clips:
        found = [item for item in clips.read([0]) if item]
    assert [item.id.split("#")[0] for item in found] == [path.name for path in paths]
    for item in found:
        if isinstance(item, Reject):
            assert item.kind and item.reason and "\n" not in item.reason and len(item.reason) < 400
        else:
            assert isinstance(item, Clip) and item.video.shape in ((9, 48, 64, 3), (9, 64, 48, 3))
    whole, rest, odd = found[:24], found[24:-8], found[-8:]
    assert not [item for item in whole if isinstance(item, Reject)]
    assert not [item.id for item in odd if isinstance(item, Clip)]
    used = sum(isinstance(item, Clip) for item in rest)
    assert 0.2 < used / len(rest) < 0.8, used
    assert not [item for item in found if isinstance(item, Reject) and item.kind in ("timeout", "crashed")]
