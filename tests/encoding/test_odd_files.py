"""Files that are no videos, or claim what cannot be: each is a reject, and the others go on."""

import resource
import struct
import time

import pytest
from PIL import Image
from test_videos import BUCKETS, Listed, entry, of_unit
from video_files import numbered, write

from vpae_jax.encoding import decoding
from vpae_jax.encoding.clip_source import Clip, Reject
from vpae_jax.encoding.decoding import Unreadable, probe, read_frames
from vpae_jax.encoding.filters import Filters
from vpae_jax.encoding.videos import VideoClips

IMAGES = ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF"]


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("called", ["own name", "clip.mp4", "clip.webm"])
@pytest.mark.parametrize("frames", [1, 9])
def test_an_image_is_called_one(tmp_path, kind, called, frames):
    path = tmp_path / (called if "." in called else f"picture.{kind.lower()}")
    Image.fromarray(numbered(3)[2]).save(path, format=kind)
    with VideoClips(Listed(entry(path)), BUCKETS, frames, workers=0) as clips:
        (found,) = of_unit(clips, 0)
    said = "WebP" if kind == "WEBP" else kind
    assert (found.kind, found.reason) == ("image", f"{path.name} is an image ({said}), not a video")


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("SVG", b"<?xml version='1.0'?>\n<!-- a drawing -->\n<svg xmlns='http://www.w3.org/2000/svg'/>"),
        ("SVG", b"<svg/>"),
        ("PPM", b"P6\n8 8\n255\n" + bytes(192)),
        ("OpenEXR", b"\x76\x2f\x31\x01\2\0\0\0" + bytes(100)),
        ("JPEG 2000", b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100)),
        ("HEIC", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)),
    ],
)
def test_an_image_that_nobody_here_reads_is_called_one_too(tmp_path, kind, content):
    (tmp_path / "clip.mp4").write_bytes(content)
    with pytest.raises(Unreadable) as error:
        probe(tmp_path / "clip.mp4")
    assert (error.value.kind, error.value.reason) == ("image", f"is an image ({kind}), not a video")


def test_pictures_that_move_are_none(tmp_path):
    frames = [Image.fromarray(frame) for frame in numbered(20)]
    for kind in ("PNG", "GIF", "WEBP"):
        path = tmp_path / f"moving.{kind.lower()}"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=60)
        try:
            found = probe(path)
        except Unreadable as error:  # FFmpeg does not decode all WebPs that move
            assert kind == "WEBP" and error.kind == "unreadable"
        else:
            assert found.seconds == pytest.approx(1.2, abs=0.1)


def test_a_damaged_video_is_no_image(tmp_path):
    (tmp_path / "text.mp4").write_text("BMW, a film\n" * 100)
    for name in ("text.mp4", "none.mp4", "."):
        with pytest.raises(Unreadable) as error:
            probe(tmp_path / name)
        assert error.value.kind == "unreadable"


def test_a_filter_of_motion_does_not_apply_to_a_single_frame(tmp_path):
    path = write(tmp_path / "clip.mp4", numbered(16))
    black = write(tmp_path / "black.mp4", numbered(16) // 16)
    listed = Listed(entry(path), entry(black))
    with VideoClips(listed, BUCKETS, 1, filters=Filters(min_motion=5.0), workers=0) as clips:
        clip, dark = of_unit(clips, 0)
    assert isinstance(clip, Clip) and isinstance(dark, Reject) and dark.kind == "black"


# --- Lengths that cannot be

TAG = b"00:00:01.501000000"
CLAIMS = [
    "inf:00:00",
    "00:00:inf",
    "nan:00:00",
    "-1:00:00.0",
    "1000000000:00:00",
    "1e9:00:00",
    "1e999:0:0",
    "9" * 14 + ":0:0",
]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_length_that_cannot_be_is_a_reject_like_any_other(tmp_path, workers):
    data = write(tmp_path / "whole.mkv", numbered(24), g="8", bf="0").read_bytes()
    assert data.count(TAG) == 1
    paths = [tmp_path / f"{number}.mkv" for number in range(len(CLAIMS))]
    for path, claim in zip(paths, CLAIMS, strict=True):
        path.write_bytes(data.replace(TAG, claim.encode().ljust(len(TAG), b"\0")))
    listed = Listed(*map(entry, paths), entry(tmp_path / "whole.mkv"))
    with VideoClips(listed, BUCKETS, 9, stride=0.0625, clips_per_video=3, workers=workers) as clips:
        found = of_unit(clips, 0)
    bad, good = found[:-3], found[-3:]
    assert [item.id for item in bad] == [path.stem for path in paths]
    for item in bad:
        assert isinstance(item, Reject) and item.kind == "unreadable" and "claims to last " in item.reason
    assert all(isinstance(clip, Clip) for clip in good)


def test_a_length_that_can_be_and_is_not_is_found_when_it_is_read(tmp_path):
    path = write(tmp_path / "clip.mkv", numbered(24), g="8", bf="0")
    assert TAG in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(TAG, b"02:00:00.000000000"))
    with VideoClips(Listed(entry(path)), BUCKETS, 9, clips_per_video=3, workers=0) as clips:
        found = of_unit(clips, 0)
    assert [(item.id, getattr(item, "kind", "")) for item in found] == [(f"clip#{i}", "truncated") for i in range(3)]


def test_a_tag_that_is_no_time_says_nothing(tmp_path):
    path = write(tmp_path / "clip.mkv", numbered(24), g="8", bf="0")
    path.write_bytes(path.read_bytes().replace(TAG, b"a minute and a bit"))
    assert probe(path).seconds == pytest.approx(1.5, abs=0.002)


# --- Sizes that cannot be


def gif(path, width, height, frames=1):
    """An animated GIF of a large canvas, in a few bytes: each frame sets one of its points."""
    data = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    one = b"\x21\xf9\x04\0\x06\0\0\0" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    path.write_bytes(data + one * frames + b"\x3b")
    return path


def full_gif(path, side, frames):
    """An animated GIF every frame of which is large, and compresses well."""
    pictures = [Image.new("L", (side, side), 20 * i) for i in range(frames)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=60)
    return path


@pytest.mark.parametrize(("width", "height"), [(8190, 8190), (65535, 513)])
def test_a_huge_canvas_is_not_looked_at(tmp_path, width, height):
    path = gif(tmp_path / "huge.gif", width, height, 30)
    with VideoClips(Listed(entry(path)), BUCKETS, 9, workers=0) as clips:
        begun = time.process_time()
        (found,) = of_unit(clips, 0)
    assert isinstance(found, Reject) and found.kind == "too large"
    assert found.reason == f"huge.gif has {width}x{height} pixels; at most 33554432 are supported"
    assert time.process_time() - begun < 5


def test_frames_that_were_read_are_not_kept(tmp_path):
    """Each of them takes 134 MB."""
    path = full_gif(tmp_path / "large.gif", 5792, 9)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_frames(path, 0.0, 9, 16.0, 48, 64).shape == (9, 48, 64, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 800_000


def test_a_strip_is_not_blown_up(tmp_path):
    """Of 4000x16 points, the middle of 30720x122880 would be kept."""
    path = write(tmp_path / "strip.mkv", numbered(16, 16, 4000), codec="ffv1")
    with pytest.raises(Unreadable) as error:
        read_frames(path, 0.0, 9, 16.0, 480, 832)
    assert error.value.kind == "too large" and "120000x480 pixels before cropping" in error.value.reason


def test_a_worker_that_asks_for_too_much_memory_costs_one_video(tmp_path, monkeypatch):
    """As a decoder of hostile sizes may."""
    monkeypatch.setattr("vpae_jax.encoding.pool.MEMORY", 2**28)
    listed = Listed(entry(gif(tmp_path / "large.gif", 5792, 5792, 12)), entry(write(tmp_path / "b.mp4", numbered(24))))
    with VideoClips(listed, BUCKETS, 9, workers=1) as clips:
        bad, good = of_unit(clips, 0)
    assert isinstance(bad, Reject) and isinstance(good, Clip)
    assert (bad.kind, bad.reason) == ("unreadable", "large.gif cannot be read: cannot allocate memory")


def test_sizes_are_bounded_in_every_container(tmp_path, monkeypatch):
    path = write(tmp_path / "clip.gif", numbered(9), codec="gif", pixels="rgb8")
    others = [write(tmp_path / name, numbered(9)) for name in ("clip.mp4", "clip.mkv", "clip.ts", "raw.h264")]
    monkeypatch.setattr(decoding, "MAX_PIXELS", 1000)
    for each in (path, *others):
        with pytest.raises(Unreadable) as error:
            probe(each)
        assert error.value.kind == "too large", each
