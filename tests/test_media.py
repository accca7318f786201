"""Videos and images on disk."""

import struct
import warnings
import zlib

import av
import numpy as np
import pytest
from PIL import Image

from vpae_jax.media import read_image, read_stream, read_video, write_contact_sheet, write_stream, write_video
from vpae_jax.types import Note, UserError


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


def test_frames_come_one_after_the_other(tmp_path):
    write_video(tmp_path / "clip.mp4", frames(), 8.0)
    whole = read_video(tmp_path / "clip.mp4")
    assert whole.shape == frames().shape and whole.dtype == np.uint8
    assert np.abs(whole.astype(int) - frames()).mean() < 3
    coming = read_stream(tmp_path / "clip.mp4")
    np.testing.assert_array_equal(next(coming), whole[0])
    np.testing.assert_array_equal(np.stack([*coming]), whole[1:])


def test_what_is_no_video_is_one_line(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    write_video(tmp_path / "clip.mp4", frames(), 8.0)
    (tmp_path / "half.mp4").write_bytes((tmp_path / "clip.mp4").read_bytes()[:800])
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    reasons = dict.fromkeys(("text", "half", "sound"), "cannot be decoded; write it again") | {"none": "no such file"}
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=rf"^video .*{name}\.mp4: {reason}$"):
            read_video(tmp_path / f"{name}.mp4")


def test_rates_that_are_not_whole(tmp_path):
    write_video(tmp_path / "clip.mp4", frames(), 24000 / 1001)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(23.976, abs=1e-3)


@pytest.mark.parametrize(
    "shape, fps, message", [((2, 47, 64), 8.0, "47x64"), ((2, 48, 64), 0.0, "0.0 frames per second")]
)
def test_what_h264_cannot_hold_leaves_the_old_file(tmp_path, shape, fps, message):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    with pytest.raises(UserError, match=message):
        write_video(path, frames(*shape), fps)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_video_is_written_while_its_frames_come(tmp_path):
    path, sizes = tmp_path / "clip.mp4", []
    path.write_bytes(b"old")
    clip = np.random.default_rng(0).integers(0, 256, (160, 48, 64, 3), np.uint8)  # the encoder looks some 60 ahead

    def chunks():
        yield clip[:1]
        for start in range(1, len(clip)):
            (temporary,) = set(tmp_path.iterdir()) - {path}
            sizes.append(temporary.stat().st_size)
            assert path.read_bytes() == b"old"
            yield clip[start : start + 1]

    write_stream(path, chunks(), 8.0)
    assert sizes[-1] > 100_000
    write_video(tmp_path / "whole.mp4", clip, 8.0)
    assert path.read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_a_video_whose_frames_end_too_early_is_not_there(tmp_path):
    def chunks(after):
        yield from frames()[:after, None]
        raise KeyboardInterrupt

    for after in (0, 1, 3):
        with pytest.raises(KeyboardInterrupt):
            write_stream(tmp_path / "clip.mp4", chunks(after), 8.0)
        assert not list(tmp_path.iterdir())


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


RAMP = np.arange(256, dtype=np.uint8).reshape(8, 32)


def tiff(path, values, bits, sample_format=1, photometric=1):
    """A TIFF of one channel as no library of ours writes it."""
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    tags = [
        (256, 3, 1, values.shape[1] if bits != 12 else values.shape[1] * 2 // 3),
        (257, 3, 1, values.shape[0]),
        (258, 3, 1, bits),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
        (278, 3, 1, values.shape[0]),
        (279, 4, 1, len(data)),
        (339, 3, 1, sample_format),
    ]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    ifd = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + ifd)
    return path


def deep(name, values, tmp_path):
    path = tmp_path / name
    Image.fromarray(values).save(path)
    return path


def test_grey_of_16_bits_is_scaled(tmp_path):
    wide = RAMP.astype(np.uint16) * 257
    for path in (
        deep("grey.png", wide, tmp_path),
        deep("grey.tif", wide, tmp_path),
        deep("grey.pgm", wide, tmp_path),
        deep("big.tif", wide.astype(">u2"), tmp_path),
        tiff(tmp_path / "own.tif", wide, 16),
    ):
        with Image.open(path) as opened:
            assert opened.mode.startswith("I"), path
        np.testing.assert_array_equal(read_image(path), RAMP[..., None].repeat(3, -1), err_msg=path.name)
    np.testing.assert_array_equal(
        read_image(tiff(tmp_path / "negative.tif", wide, 16, photometric=0))[..., 0], 255 - RAMP
    )


def test_grey_of_12_bits_is_scaled_by_what_12_bits_hold(tmp_path):
    packed = np.tile(np.array([0xFF, 0xF8, 0x00], np.uint8), (2, 8))  # 4095, 2048
    found = read_image(tiff(tmp_path / "twelve.tif", packed, 12))[..., 0]
    assert found.shape == (2, 16) and set(found[:, ::2].flat) == {255} and set(found[:, 1::2].flat) == {128}


def test_floats_from_0_to_1_are_scaled(tmp_path):
    values = RAMP.astype(np.float32) / 255
    for path in (deep("float.tif", values, tmp_path), deep("float.pfm", values, tmp_path)):
        np.testing.assert_array_equal(read_image(path), RAMP[..., None].repeat(3, -1), err_msg=path.name)
    assert (read_image(tiff(tmp_path / "negative.tif", values, 32, 3, photometric=0))[..., 0] == 255 - RAMP).all()


@pytest.mark.parametrize(
    ("values", "bits", "kind", "reason"),
    [
        (RAMP.astype(np.float32), 32, 3, "contains numbers from 0 to 255, expected 0 to 1"),
        (RAMP.astype(np.float32) - 1, 32, 3, "contains numbers from -1 to 254, expected 0 to 1"),
        (np.full((2, 2), np.nan, np.float32), 32, 3, "contains numbers from nan to nan"),
        (np.full((2, 2), np.inf, np.float32), 32, 3, "contains numbers from inf to inf"),
        (RAMP.astype(np.uint32), 32, 1, "contains integers of 32 bits"),
        (RAMP.astype(np.int32), 32, 2, "contains signed numbers"),
        (RAMP.astype(np.int16), 16, 2, "contains signed numbers"),
        (RAMP.astype(np.int8), 8, 2, "contains signed numbers"),
    ],
)
def test_numbers_that_do_not_say_what_is_white_are_refused(tmp_path, values, bits, kind, reason):
    with pytest.raises(UserError, match=f"^image .*odd.tif: {reason}.*; save it as PNG with 8 bits per channel$"):
        read_image(tiff(tmp_path / "odd.tif", values, bits, kind))


def test_colours_as_lab_are_refused(tmp_path):
    Image.new("LAB", (4, 4), (200, 10, 10)).save(tmp_path / "lab.tif")
    with pytest.raises(UserError, match=r"lab.tif: contains LAB colours; save it as PNG with 8 bits per channel"):
        read_image(tmp_path / "lab.tif")


def test_images_of_every_mode_are_what_they_show(tmp_path):
    """Half of each is white, half a colour that the mode can hold."""
    for mode, kinds in {
        "1": ("PNG", "TIFF", "BMP", "PPM"),
        "L": ("PNG", "TIFF", "BMP", "PPM", "JPEG", "WEBP", "GIF"),
        "P": ("PNG", "TIFF", "BMP", "GIF"),
        "RGB": ("PNG", "TIFF", "BMP", "PPM", "JPEG", "WEBP"),
        "CMYK": ("TIFF", "JPEG"),
        "YCbCr": ("TIFF", "JPEG"),
    }.items():
        shown = Image.new("RGB", (32, 16), "white")
        shown.paste((0, 0, 0) if mode in ("1", "L") else (200, 40, 40), (0, 0, 16, 16))
        for kind in kinds:
            path = tmp_path / f"{mode}.{kind.lower()}"
            kept = shown.quantize(8) if mode == "P" else shown.convert(mode)
            kept.save(path, format=kind, **({"lossless": True} if kind == "WEBP" else {}))
            off = np.abs(read_image(path).astype(int) - np.asarray(shown))
            assert off[:, :12].max() <= 12 and off[:, 20:].max() <= 12, (mode, kind, off.max())


def clear_half(mode):
    """An opaque red half, and a clear white one."""
    picture = Image.new("RGBA", (32, 16), (255, 255, 255, 0))
    picture.paste((200, 40, 40, 255), (0, 0, 16, 16))
    return picture.convert(mode)


def keyed(mode, key):
    picture = Image.new(mode, (32, 16), key)
    if mode == "P":
        picture.putpalette([value for grey in range(256) for value in (grey, 128, 255 - grey)])
    picture.paste(80 if mode != "RGB" else (80, 80, 80), (0, 0, 16, 16))
    return picture


TRANSPARENT = {
    "rgba.png": lambda path: clear_half("RGBA").save(path),
    "rgba.webp": lambda path: clear_half("RGBA").save(path, lossless=True),
    "rgba.tif": lambda path: clear_half("RGBA").save(path),
    "la.png": lambda path: clear_half("LA").save(path),
    "la.tif": lambda path: clear_half("LA").save(path),
    "pa.png": lambda path: clear_half("RGBA").quantize(8).save(path),
    "p.png": lambda path: keyed("P", 3).save(path, transparency=3),
    "p.gif": lambda path: keyed("P", 3).save(path, transparency=3),
    "pa.tif": lambda path: clear_half("RGBA").convert("PA").save(path),
    "l.png": lambda path: keyed("L", 250).save(path, transparency=250),
    "rgb.png": lambda path: keyed("RGB", (250, 250, 250)).save(path, transparency=(250, 250, 250)),
    "deep.png": lambda path: keyed("I;16", 65000).save(path, transparency=65000),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_is_transparent_becomes_black_and_that_is_said(tmp_path, name):
    path = tmp_path / name
    TRANSPARENT[name](path)
    with pytest.warns(Note, match=f"^image {path}: transparent parts become black$"):
        found = read_image(path)
    assert (found[:, 16:] == 0).all()
    if name != "deep.png":
        assert found[:, :16].any()


def test_half_transparent_parts_are_half_as_bright(tmp_path):
    Image.new("RGBA", (4, 4), (200, 100, 50, 128)).save(tmp_path / "half.png")
    with pytest.warns(Note):
        assert np.abs(read_image(tmp_path / "half.png").astype(int) - (100, 50, 25)).max() <= 1
    Image.new("RGBA", (4, 4), (200, 100, 50, 255)).save(tmp_path / "whole.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (read_image(tmp_path / "whole.png") == (200, 100, 50)).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_tiffs_and_deep_images_are_turned_upright_too(tmp_path, dtype):
    turned = Image.Exif()
    turned[274] = 6
    values = np.zeros((10, 20), dtype)
    values[:, :10] = {np.uint8: 255, np.uint16: 65535, np.float32: 1}[dtype]
    for kind in ("png", "tif") if dtype is not np.float32 else ("tif",):
        Image.fromarray(values).save(tmp_path / f"turned.{kind}", exif=turned)
        found = read_image(tmp_path / f"turned.{kind}")
        assert found.shape == (20, 10, 3) and (found[:10] == 255).all() and (found[10:] == 0).all()


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
