"""Frames of a file at given times."""

import errno
import pickle
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.error import err_check
from video_files import numbered, numbers, write, write_sound

from vpae_jax.encoding import decoding
from vpae_jax.encoding.decoding import Unreadable, probe, read_frames

KINDS = {
    "gops.mp4": dict(g="12", bf="3"),
    "open.mp4": dict(g="12", bf="3", **{"x264-params": "open-gop=1:scenecut=0"}),
    "gops.mkv": dict(g="12", bf="2"),
    "gops.ts": dict(g="12", bf="2"),
    "mpeg4.avi": dict(codec="mpeg4", g="12"),
    "hevc.mp4": dict(codec="libx265", **{"x265-params": "log-level=none:keyint=12"}),
    "vp9.webm": dict(codec="libvpx-vp9", g="12", **{"cpu-used": "8", "deadline": "realtime"}),
    "picture.gif": dict(codec="gif", pixels="rgb8"),
    "flash.flv": dict(codec="flv", g="12"),
    "ten.mp4": dict(pixels="yuv420p10le", g="12"),
    "sound.mp4": dict(audio=True, g="12"),
    "raw.h264": dict(g="12", bf="2", fps=25),
}


@pytest.fixture
def decoded(monkeypatch):
    """How many frames have been decoded."""
    count = [0]
    original = decoding._frames

    def counting(*args):
        for item in original(*args):
            count[0] += 1
            yield item

    monkeypatch.setattr(decoding, "_frames", counting)
    return count


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_of_decoding_from_the_start(tmp_path, name):
    path = write(tmp_path / name, numbered(60), **KINDS[name])
    fps = float(KINDS[name].get("fps", 16))
    whole = read_frames(path, 0.0, 60, fps, 48, 64)
    assert numbers(whole) == list(range(60))
    for first in (0, 1, 11, 12, 13, 23, 30, 37, 47, 51):
        part = read_frames(path, first / fps, 9, fps, 48, 64)
        np.testing.assert_array_equal(part, whole[first : first + 9])


def test_seeking_saves_decoding(tmp_path, decoded):
    path = write(tmp_path / "long.mp4", numbered(240), g="12", bf="2")
    read_frames(path, 200 / 16, 5, 16.0, 48, 64)
    assert decoded[0] < 30


def test_where_seeking_misleads_the_file_is_read_from_its_start(tmp_path, monkeypatch):
    path = write(tmp_path / "clip.mp4", numbered(60), g="12")
    whole = read_frames(path, 0.0, 60, 16.0, 48, 64)
    opened = []
    original = decoding.av.open

    class Misled:
        """A container that goes to a later keyframe than it is asked for."""

        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.container.close()

        def seek(self, offset, stream):
            self.container.seek(offset + 40 * 1024, stream=stream)

    monkeypatch.setattr(decoding.av, "open", lambda *a, **k: opened.append(1) or Misled(original(*a, **k)))
    np.testing.assert_array_equal(read_frames(path, 20 / 16, 5, 16.0, 48, 64), whole[20:25])
    assert len(opened) == 2  # at the start less 2 s lies the beginning


def test_a_wrong_list_of_keyframes_does_no_harm(tmp_path, decoded):
    """The container calls a frame a keyframe that is none: decoding from there is damaged, and begins earlier."""
    path = write(tmp_path / "clip.mp4", numbered(60), g="12", bf="0", **{"x264-params": "scenecut=0"})
    whole = read_frames(path, 0.0, 60, 16.0, 48, 64)
    data = bytearray(path.read_bytes())
    table = data.index(b"stss") + 12  # after its name, flags and count: numbers of frames, from 1
    entries = np.frombuffer(bytes(data[table : table + 20]), ">u4")
    assert entries.tolist() == [1, 13, 25, 37, 49]
    data[table + 8 : table + 12] = (31).to_bytes(4, "big")
    path.write_bytes(data)
    decoded[0] = 0
    np.testing.assert_array_equal(read_frames(path, 32 / 16, 4, 16.0, 48, 64), whole[32:36])
    assert decoded[0] > 4 + 2  # those from the false keyframe on did not do


@pytest.mark.parametrize("fps, expected", [(8.0, [4, 6, 8, 10, 12]), (16.0, [4, 5, 6, 7, 8]), (32.0, [4, 4, 5, 5, 6])])
def test_rates(tmp_path, fps, expected):
    path = write(tmp_path / "clip.mp4", numbered(24))
    assert numbers(read_frames(path, 0.25, 5, fps, 48, 64)) == expected


def test_uneven_rates(tmp_path):
    # 24 to 16: every third frame is dropped. 29.97 to 16: the last frame at or before each time.
    film = write(tmp_path / "film.mp4", numbered(48), fps=24)
    assert numbers(read_frames(film, 0.0, 9, 16.0, 48, 64)) == [0, 1, 3, 4, 6, 7, 9, 10, 12]
    ntsc = write(tmp_path / "ntsc.mp4", numbered(60), fps=30000 / 1001)
    expected = [int(i / 16 * 30000 / 1001 + 1e-3) for i in range(25)]
    assert numbers(read_frames(ntsc, 0.0, 25, 16.0, 48, 64)) == expected


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_variable_frame_rate(tmp_path, name):
    times = [0, 40, 80, 500, 510, 520, 530, 1000, 1500, 1510, 1990]
    path = write(tmp_path / name, numbered(len(times)), times=times, bf="0")
    grid = np.arange(25) * 1000 / 16
    expected = [sum(t <= g for t in times) - 1 for g in grid]
    assert numbers(read_frames(path, 0.0, 25, 16.0, 48, 64)) == expected
    assert numbers(read_frames(path, 0.75, 9, 16.0, 48, 64)) == expected[12:21]


def test_a_long_still_is_shown_until_its_end(tmp_path):
    path = write(tmp_path / "still.mkv", numbered(3), times=[0, 100, 60_000], bf="0")
    assert numbers(read_frames(path, 30.0, 5, 16.0, 48, 64)) == [1] * 5


def corners(height=48, width=64):
    """Red, green over blue, white: which way up it is."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = (220, 0, 0)
    picture[: height // 2, width // 2 :] = (0, 220, 0)
    picture[height // 2 :, : width // 2] = (0, 0, 220)
    picture[height // 2 :, width // 2 :] = (220, 220, 220)
    return picture


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_the_display_matrix_is_followed(tmp_path, rotation, mirrored):
    picture = corners()
    path = write(tmp_path / "clip.mp4", np.stack([picture] * 5), rotation=rotation, mirrored=mirrored)
    expected = np.rot90(picture, rotation // 90)
    if mirrored:
        expected = expected[:, ::-1]
    found = probe(path)
    assert (found.height, found.width) == expected.shape[:2]
    video = read_frames(path, 0.0, 5, 16.0, *expected.shape[:2])
    assert np.abs(video.astype(int) - expected).mean() < 8


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    path = write(tmp_path / "clip.mp4", np.stack([corners()] * 5), aspect=Fraction(3, 2))
    assert (probe(path).height, probe(path).width) == (48, 96)
    video = read_frames(path, 0.0, 1, 16.0, 48, 96)
    assert np.abs(video[0].astype(int) - corners(48, 96)).mean() < 8


@pytest.mark.parametrize("size", [(96, 128), (24, 32), (32, 64), (48, 32), (16, 16), (112, 48)])
def test_scaled_to_cover_and_cropped_at_the_centre(tmp_path, size):
    """A disc stays round, and in the middle."""
    y, x = np.mgrid[:48, :64] - np.array([23.5, 31.5])[:, None, None]
    disc = np.where((x * x + y * y < 100)[..., None], 230, 20).astype(np.uint8).repeat(3, -1)
    path = write(tmp_path / "clip.mp4", np.stack([disc] * 5))
    video = read_frames(path, 0.0, 1, 16.0, *size)[0, ..., 1].astype(float)
    weight = (video - video.min()).clip(30) - 30
    rows, columns = weight.sum(1), weight.sum(0)

    def centre_and_spread(line):
        place = np.arange(len(line))
        mean = (line * place).sum() / line.sum()
        return mean, np.sqrt((line * (place - mean) ** 2).sum() / line.sum())

    (top, high), (left, wide) = centre_and_spread(rows), centre_and_spread(columns)
    assert abs(top - (size[0] - 1) / 2) < 0.6 and abs(left - (size[1] - 1) / 2) < 0.6
    scale = max(size[0] / 48, size[1] / 64)
    if 20 * scale < min(size):
        assert high == pytest.approx(wide, rel=0.05) and wide == pytest.approx(5 * scale, rel=0.08)


def frame_of(pixels, values, **settings):
    frame = av.VideoFrame(64, 48, pixels)
    for plane, value in zip(frame.planes, values, strict=True):
        np.frombuffer(memoryview(plane), np.uint16 if "10" in pixels else np.uint8)[:] = value
    for name, value in settings.items():
        setattr(frame, name, value)
    return frame


@pytest.mark.parametrize("size", [(48, 64), (20, 30), (96, 128)])
@pytest.mark.parametrize(
    "pixels, values, settings, expected",
    [
        ("yuv420p", (235, 128, 128), {"color_range": 1}, (255, 255, 255)),
        ("yuv420p", (16, 128, 128), {}, (0, 0, 0)),
        ("yuv420p", (126, 128, 128), {}, (128, 128, 128)),
        ("yuv420p", (235, 128, 128), {"color_range": 2}, (235, 235, 235)),
        ("yuvj420p", (255, 128, 128), {}, (255, 255, 255)),
        ("yuv420p10le", (940, 512, 512), {"color_range": 1}, (255, 255, 255)),
        ("yuv420p", (173, 42, 26), {"colorspace": 1, "color_range": 1}, (0, 255, 0)),
        ("yuv420p", (145, 54, 34), {"colorspace": 6, "color_range": 1}, (0, 255, 0)),
        ("yuv420p", (145, 54, 34), {}, (0, 255, 0)),
        ("gray", (200,), {"color_range": 2}, (200, 200, 200)),
    ],
)
def test_colours(pixels, values, settings, expected, size):
    picture = decoding._ToRGB()(frame_of(pixels, values, **settings), *size)
    assert picture.shape == (*size, 3)
    np.testing.assert_allclose(picture[size[0] // 2, size[1] // 2], expected, atol=2)


def test_unsaid_matrices_are_guessed_by_size():
    """Green in BT.709 numbers: right in a large frame, off in a small one."""
    frame = av.VideoFrame(1280, 720, "yuv420p")
    for plane, value in zip(frame.planes, (173, 42, 26), strict=True):
        np.frombuffer(memoryview(plane), np.uint8)[:] = value
    assert decoding._ToRGB()(frame, 48, 64)[20, 20].tolist() == pytest.approx([0, 255, 0], abs=2)


@pytest.mark.parametrize("transfer, reference", [(16, 0.58), pytest.param(18, 0.75, marks=pytest.mark.long)])
def test_high_dynamic_range_is_mapped_to_what_screens_show(transfer, reference):
    """HDR's reference white (203 nits: 58 % of PQ's signal, 75 % of HLG's) becomes white, and greys stay grey."""
    to_rgb = decoding._ToRGB()  # takes 2.5 s to make its table, once

    def grey(signal):
        luma = round(64 + 876 * signal)
        settings = {"color_range": 1, "colorspace": 9, "color_primaries": 9, "color_trc": transfer}
        return to_rgb(frame_of("yuv420p10le", (luma, 512, 512), **settings), 20, 30)

    white, middle = grey(reference)[10, 10].astype(int), grey(0.6 * reference)[10, 10].astype(int)
    assert white.min() >= 250 and np.ptp(white) <= 1 and np.ptp(middle) <= 1
    assert 60 < middle.mean() < 180


def test_what_is_transparent_is_black(tmp_path):
    frame = av.VideoFrame.from_ndarray(np.full((48, 64, 4), (200, 100, 50, 0), np.uint8), format="rgba")
    assert (decoding._ToRGB()(frame, 48, 64) == 0).all()
    frame = av.VideoFrame.from_ndarray(np.full((48, 64, 4), (200, 100, 50, 255), np.uint8), format="rgba")
    assert (decoding._ToRGB()(frame, 48, 64) == (200, 100, 50)).all()
    path = write(tmp_path / "alpha.mov", numbered(9), codec="prores_ks", pixels="yuva444p10le")
    assert numbers(read_frames(path, 0.0, 9, 16.0, 48, 64)) == list(range(9))


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.gif"])
def test_probe(tmp_path, name):
    settings = {"codec": "gif", "pixels": "rgb8"} if name.endswith("gif") else {}
    found = probe(
        write(tmp_path / name, numbered(40, 17, 23) if settings else numbered(40, 18, 22), fps=20, **settings)
    )
    assert (found.height, found.width) == ((17, 23) if settings else (18, 22))
    assert found.seconds == pytest.approx(2.0, abs=0.01) and found.fps == pytest.approx(20)


def test_lengths_that_no_header_says_are_those_of_the_packets(tmp_path):
    found = probe(write(tmp_path / "raw.h264", numbered(50), fps=25))
    assert found.seconds == pytest.approx(2.0, abs=0.1)


def test_a_video_shorter_than_its_sound_has_its_own_length(tmp_path):
    for name in ("clip.mp4", "clip.mkv"):
        path = write(tmp_path / name, numbered(16), audio=True)
        assert probe(path).seconds == pytest.approx(1.0, abs=0.01)


def refusal(function, *args):
    with pytest.raises(Unreadable) as error:
        function(*args)
    assert "\n" not in error.value.reason
    return error.value.kind, error.value.reason


def test_what_gives_no_frames_says_why(tmp_path):
    (tmp_path / "text.mp4").write_text("no video at all\n" * 100)
    (tmp_path / "empty.mp4").write_bytes(b"")
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path}/clip.mp4\n#EXT-X-ENDLIST\n")
    write(tmp_path / "clip.mp4", numbered(16))
    for name in ("text.mp4", "empty.mp4", "list.mp4"):
        kind, reason = refusal(probe, tmp_path / name)
        assert kind == "unreadable" and "cannot be decoded" in reason
    assert refusal(probe, tmp_path / "none.mp4") == ("unreadable", "does not exist")
    assert refusal(probe, tmp_path) == ("unreadable", "is not a file")
    assert refusal(probe, write_sound(tmp_path / "sound.m4a"))[0] == "no video"


@pytest.mark.parametrize(("number", "passing"), [("EIO", True), ("ESTALE", True), ("ENOMEM", True), ("EPERM", False)])
def test_trouble_of_the_system_is_told_from_that_of_a_file(tmp_path, monkeypatch, number, passing):
    path = write(tmp_path / "clip.mp4", numbered(16))
    monkeypatch.setattr(decoding.av, "open", lambda *args, **options: err_check(-getattr(errno, number)))
    with pytest.raises(Unreadable) as error:
        probe(path)
    assert error.value.kind == "unreadable" and error.value.passing == passing
    assert error.value.reason.startswith("cannot be read: " if passing else "cannot be decoded: ")
    assert pickle.loads(pickle.dumps(error.value)).passing == passing


def test_a_file_whose_folder_the_system_does_not_show(tmp_path, monkeypatch):
    def is_file(path):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "is_file", is_file)
    assert refusal(probe, tmp_path / "clip.mp4") == ("unreadable", "cannot be read: stale file handle")


def test_the_system_refuses_to_read():
    with pytest.raises(Unreadable) as error:
        probe(Path("/proc/self/mem"))
    assert error.value.passing and error.value.reason == "cannot be read: input/output error"


def test_what_ends_too_early(tmp_path):
    path = write(tmp_path / "clip.mp4", numbered(48), movflags="faststart", g="8")
    kind, reason = refusal(read_frames, path, 2.0, 81, 16.0, 48, 64)
    assert kind == "too short" and "ends at 3.00 s" in reason and "needs 7.00 s" in reason
    cut = tmp_path / "cut.mkv"
    whole = write(tmp_path / "whole.mkv", np.random.default_rng(0).integers(0, 256, (64, 48, 64, 3), np.uint8))
    data = whole.read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    kind, reason = refusal(read_frames, cut, 1.0, 33, 16.0, 48, 64)
    assert kind in ("truncated", "unreadable", "damaged")


def test_damage_is_not_passed_on(tmp_path):
    """Bytes in the middle are overwritten: what does not need them is read, the rest refused."""
    rng = np.random.default_rng(0)
    path = write(tmp_path / "clip.mp4", rng.integers(0, 256, (48, 96, 128, 3), np.uint8), g="12", bf="0")
    whole = read_frames(path, 0.0, 48, 16.0, 96, 128)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = rng.integers(0, 256, 2000, np.uint8).tobytes()
    path.write_bytes(data)
    np.testing.assert_array_equal(read_frames(path, 0.0, 9, 16.0, 96, 128), whole[:9])
    assert refusal(read_frames, path, 0.5, 33, 16.0, 96, 128)[0] in ("damaged", "unreadable")
    np.testing.assert_array_equal(read_frames(path, 38 / 16, 9, 16.0, 96, 128), whole[38:47])


def test_absurd_sizes_are_not_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 1000)
    assert refusal(probe, write(tmp_path / "clip.mp4", numbered(4)))[0] == "too large"
