"""Videos and images on disk."""

import struct
import zlib

import av
import numpy as np
import pytest
from PIL import Image

from vpae_jax.media import read_image, write_contact_sheet, write_video
from vpae_jax.types import UserError


def frames(t=9, height=48, width=64):
    """A bright square that moves to the right over a gradient."""
    clip = np.tile(np.linspace(20, 120, width).astype(np.uint8)[None, None, :, None], (t, height, 1, 3))
    for i in range(t):
        clip[i, 16:32, 4 * i : 4 * i + 16] = 220
    return clip


def test_video_reads_back(tmp_path):
    path = tmp_path / "new" / "folder" / "clip.mp4"
    write_video(path, frames(), 8.0)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 8
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert decoded.shape == frames().shape
    assert np.abs(decoded.astype(int) - frames()).mean() < 3
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]


def test_rates_that_are_not_whole(tmp_path):
    write_video(tmp_path / "clip.mp4", frames(), 24000 / 1001)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(23.976, abs=1e-3)


@pytest.mark.parametrize(
    "shape, fps, message", [((2, 47, 64), 8.0, "47x64"), ((2, 48, 64), 0.0, "0.0 frames a second")]
)
def test_what_h264_cannot_hold_leaves_the_old_file(tmp_path, shape, fps, message):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    with pytest.raises(UserError, match=message):
        write_video(path, frames(*shape), fps)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("columns, grid", [(None, (3, 3)), (9, (1, 9)), (2, (5, 2))])
def test_contact_sheet_shows_every_frame(tmp_path, columns, grid):
    write_contact_sheet(tmp_path / "sheet.png", frames(), columns)
    sheet = read_image(tmp_path / "sheet.png")
    rows, cols = grid
    assert sheet.shape == (rows * 49 - 1, cols * 65 - 1, 3)
    for i, frame in enumerate(frames()):
        top, left = i // cols * 49, i % cols * 65
        np.testing.assert_array_equal(sheet[top : top + 48, left : left + 64], frame)


def test_images_are_read_upright_and_in_colour(tmp_path):
    picture = np.zeros((10, 20, 3), np.uint8)
    picture[:, :10] = (255, 0, 0)
    turned = Image.Exif()
    turned[274] = 6  # orientation: turn by 90 degrees clockwise
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=turned)
    found = read_image(tmp_path / "turned.png")
    assert found.shape == (20, 10, 3)
    assert (found[:10] == (255, 0, 0)).all() and (found[10:] == 0).all()
    Image.fromarray(picture[..., 0]).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").shape == (10, 20, 3)


def test_bad_images_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none.png: no such file"):
        read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(UserError, match=r"text.png: not an image of a known format"):
        read_image(tmp_path / "text.png")
    with pytest.raises(UserError, match="cannot be read"):
        read_image(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    with pytest.raises(UserError, match=r"cut.png: cannot be read") as error:
        read_image(tmp_path / "cut.png")
    assert "\n" not in str(error.value)


def test_only_known_formats_are_opened_whatever_their_name(tmp_path):
    """An EPS would be handed to Ghostscript."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "eps.png").write_bytes(eps)
    Image.new("RGB", (4, 4)).save(tmp_path / "icon.png", format="ICO")
    for name in ("eps.png", "icon.png"):
        with pytest.raises(UserError, match=rf"{name}: not an image of a known format; expected BMP, .*, WEBP$"):
            read_image(tmp_path / name)
    for form in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"):
        Image.new("RGB", (4, 4), (255, 255, 255)).save(tmp_path / "picture", format=form)
        assert read_image(tmp_path / "picture").shape == (4, 4, 3)


@pytest.mark.parametrize("side", [8193, 13000, 30000])
def test_huge_images_are_refused_before_they_are_decoded(tmp_path, side):
    """A few bytes that say so are enough."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(
        UserError, match=rf"huge.png: has {side}x{side} pixels|huge.png: cannot be read: .* exceeds limit"
    ):
        read_image(tmp_path / "huge.png")
