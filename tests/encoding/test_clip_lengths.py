"""How long a video, a part of one or a shot must be: its last frame is to be shown when the clip's last one is due."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from test_videos import BUCKETS, Listed, entry, of_unit
from video_files import numbered, numbers, write

from vpae_jax.encoding.clip_source import Clip, Reject
from vpae_jax.encoding.cutting import clip_starts, shot_end
from vpae_jax.encoding.decoding import probe
from vpae_jax.encoding.videos import VideoClips

FRAMES, FPS = 81, 16.0
NTSC = 30000 / 1001
# Five seconds as cameras and data sets have them.
FIVE_SECONDS = [(24, 121), (30, 151), (NTSC, 151), (16, 80), (60, 300), (25, 126), (23.976, 120)]
CONTAINERS = {
    "clip.mp4": {},
    "clip.mov": {},
    "clip.mkv": {"bf": "2"},
    "clip.ts": {},
    "clip.avi": {"codec": "mpeg4"},
    "clip.webm": {"codec": "libvpx", "cpu-used": "8", "deadline": "realtime"},
    "clip.flv": {"codec": "flv"},
}


def shown(rate: float, first: int, end: int, start: float = 0.0) -> list[int]:
    """The numbers of 81 frames from `start` on, of those from `first` to `end`, the last of which stays."""
    due = start + np.arange(FRAMES) / FPS
    due[0] += 1e-3  # as exactly as manifests give times
    return [int(n) % 256 for n in np.clip(np.floor(due * rate + 5e-4), first, end - 1)]


def clips_of(*entries, **settings) -> list[Clip | Reject]:
    with VideoClips(Listed(*entries), BUCKETS, FRAMES, FPS, workers=0, **settings) as clips:
        return of_unit(clips, 0)


@pytest.mark.parametrize(
    ("rate", "count", "name"),
    [
        # Every rate, and every container.
        pytest.param(*length, name, marks=[] if name == "clip.mp4" or length == (NTSC, 151) else pytest.mark.long)
        for length in FIVE_SECONDS
        for name in CONTAINERS
    ],
)
def test_five_seconds_are_a_clip_of_81_frames_at_16(tmp_path, rate, count, name):
    path = write(tmp_path / name, numbered(count), fps=rate, g="24", **CONTAINERS[name])
    (found,) = clips_of(entry(path))
    assert isinstance(found, Clip), found
    assert 0 <= found.about["start"] <= 0.03
    exact = shown(rate, 0, count, found.about["start"])
    # Containers that round to milliseconds, and AVI whose B-frames come late, may be one frame off.
    assert max(abs(a - b) % 255 for a, b in zip(numbers(found.video), exact, strict=True)) <= (name[-2:] != "p4")


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts", "clip.avi", "clip.webm"])
def test_what_is_a_frame_too_short_is_refused_before_it_is_read(tmp_path, name):
    path = write(tmp_path / name, numbered(79), g="24", **CONTAINERS[name])
    (found,) = clips_of(entry(path))
    assert isinstance(found, Reject) and found.kind == "too short"
    assert "s; a clip needs 5.000 s" in found.reason


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(pair, id=f"{pair[0]:g}x{pair[1]}", marks=[] if pair == (NTSC, 151) else pytest.mark.long)
        for pair in FIVE_SECONDS[:5]
    ],
)
def three_shots(request, tmp_path_factory) -> tuple[Path, float, int]:
    """A video of three shots of five seconds; its name, frame rate, and frames of a shot."""
    rate, count = request.param
    path = tmp_path_factory.mktemp("shots") / "shots.mp4"
    return write(path, numbered(3 * count), fps=rate, g="24"), rate, count


def times(rate: float, count: int, rounding) -> list[float]:
    """Where the shots begin and end, as a manifest in milliseconds has it."""
    return [float(rounding(1000 * shot * count / rate)) / 1000 for shot in range(4)]


@pytest.mark.parametrize("rounding", [np.floor, np.ceil])
def test_parts_and_shots_of_five_seconds_are_clips_of_nothing_else(three_shots, rounding):
    path, rate, count = three_shots
    bounds = times(rate, count, rounding)
    parts = [entry(path, id=f"part {n}", start=bounds[n], end=bounds[n + 1]) for n in range(3)]
    whole = entry(path, id="shots", cuts=tuple(bounds[1:3]))
    found = clips_of(*parts, whole, clips_per_video=9)
    assert [item.id for item in found] == ["part 0#0", "part 1#0", "part 2#0", "shots#0", "shots#1", "shots#2"]
    for number, clip in enumerate(found):
        assert isinstance(clip, Clip), clip
        shot = number % 3
        assert numbers(clip.video) == shown(rate, shot * count, (shot + 1) * count, clip.about["start"])


def test_a_stride_counts_from_a_cut_that_was_rounded(tmp_path):
    """The frame before it, which is shown at that time, is of the other shot."""
    path = write(tmp_path / "clip.mp4", numbered(302), fps=NTSC, g="24")
    for cut in (5.038, 5.0384, 5.039):
        first, second = clips_of(entry(path, cuts=(cut,)), stride=7.0, clips_per_video=9)
        assert numbers(first.video)[0] == 0 and numbers(first.video)[-1] == 149
        assert numbers(second.video)[0] == 151


def test_clips_follow_one_another_without_sharing_a_frame(tmp_path):
    path = write(tmp_path / "clip.mp4", numbered(162), g="24")
    one, two = clips_of(entry(path), clips_per_video=9)
    assert numbers(one.video) == list(range(81)) and numbers(two.video) == list(range(81, 162))
    assert len(clips_of(entry(path, end=10.0), clips_per_video=9)) == 1
    assert len(clips_of(entry(path, end=10.0), clips_per_video=9, stride=5.0)) == 2


def test_a_single_frame_needs_no_time_but_a_frame(tmp_path):
    path = write(tmp_path / "clip.mp4", numbered(16))
    with VideoClips(Listed(entry(path), entry(path, id="end", start=1.0)), BUCKETS, 1, workers=0) as clips:
        clip, none = of_unit(clips, 0)
    assert isinstance(clip, Clip) and clip.video.shape == (1, 48, 64, 3)
    assert "motion" not in clip.about
    assert isinstance(none, Reject) and none.reason == "the selected part lasts 0.000 s; a clip needs a frame"


def test_where_shots_end():
    assert shot_end(1.0, None, ()) == float("inf")
    assert shot_end(1.0, 4.0, (0.5, 1.0, 2.5, 9.0)) == 2.5
    assert shot_end(2.5, 4.0, (0.5, 1.0, 2.5, 9.0)) == 4.0


@pytest.mark.parametrize("seconds", [1e7, 1e18])
def test_clips_of_years_are_counted_and_not_listed(seconds):
    starts = clip_starts(seconds, 1.0, stride=0.001, most=5)
    assert len(starts) == 5 and starts[0] == pytest.approx(seconds / 10, rel=1e-3)
    assert len(clip_starts(seconds, 1.0, cuts=(1.5, 700.0), last=0.01, most=1000)) == 1000


# --- Files whose first frame is not at 0


@pytest.mark.parametrize("first", [pytest.param(3, marks=pytest.mark.long), 600])
@pytest.mark.parametrize("name", ["clip.mkv", "clip.webm", "clip.mp4", "clip.ts", "clip.flv"])
def test_a_file_whose_clock_does_not_begin_at_0(tmp_path, name, first):
    settings = {**CONTAINERS[name], "bf": "0"}
    at = [round(1000 * (first + i / 16)) for i in range(176)]
    path = write(tmp_path / name, numbered(176), times=at, g="24", **settings)
    assert probe(path).seconds == pytest.approx(11.0, abs=0.07)
    one, two = clips_of(entry(path), clips_per_video=9)
    assert isinstance(one, Clip) and isinstance(two, Clip), (one, two)
    for clip in (one, two):
        begins = round(clip.about["start"] * 16)
        off = np.array(numbers(clip.video)) - np.arange(begins, begins + 81)
        assert np.abs(off).max() <= 1
    part, late = clips_of(entry(path, start=5.0), entry(path, id="late", start=6.5))
    assert isinstance(part, Clip) and isinstance(late, Reject) and late.kind == "too short"


@pytest.mark.parametrize(("said", "kind"), [("00:00:14.001000000", "end"), ("00:00:11.001000000", "length")])
def test_what_a_tag_of_matroska_means_does_not_matter(tmp_path, said, kind):
    """FFmpeg writes the end on the file's clock, mkvmerge the length."""
    at = [round(1000 * (3 + i / 16)) for i in range(176)]
    path = write(tmp_path / "clip.mkv", numbered(176), times=at, g="24", bf="0")
    tag = b"00:00:14.001000000"
    data = path.read_bytes()
    assert data.count(tag) == 1
    path.write_bytes(data.replace(tag, said.encode()))
    assert probe(path).seconds == pytest.approx(11.0, abs=0.002)
    assert len(clips_of(entry(path), clips_per_video=9)) == 2


def write_late(path, first, codec, sound):
    """A video of 11 s that begins after `first` seconds of sound, which goes on beside it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16, options={"g": "24", "cpu-used": "8", "deadline": "realtime"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        beside = container.add_stream(sound, rate=48000, layout="mono")
        packets = []
        for number, picture in enumerate(numbered(176)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = 16 * first + number, Fraction(1, 16)
            packets += stream.encode(frame)
        for number in range(50 * (first + 11)):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts, silence.time_base = 48000, 960 * number, Fraction(1, 48000)
            packets += beside.encode(silence)
        packets += stream.encode() + beside.encode()
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return path


@pytest.mark.parametrize(
    ("name", "codec", "sound", "first"),
    [
        ("clip.mkv", "libx264", "aac", 3),
        ("clip.mkv", "libx264", "aac", 30),
        ("clip.mkv", "libx264", "aac", 600),
        ("clip.webm", "libvpx", "libopus", 30),
        ("clip.mp4", "libx264", "aac", 30),
    ],
)
def test_a_video_that_begins_long_after_its_sound(tmp_path, first, name, codec, sound):
    """FFmpeg stops looking before it has come to the video, and gives the file's beginning and length for its own."""
    path = write_late(tmp_path / name, first, codec, sound)
    assert probe(path).seconds == pytest.approx(11.0, abs=0.01)
    one, two = clips_of(entry(path), clips_per_video=9)
    for clip in (one, two):
        assert isinstance(clip, Clip), clip
        begins = round(clip.about["start"] * 16)
        assert np.abs(np.array(numbers(clip.video)) - np.arange(begins, begins + 81)).max() <= 1
