"""What stands in the place of a file that was to be fetched is named for what it is, whatever it was to be."""

import pytest
from record_files import SMALL, write_folder

from vpae_jax.data.records import LatentRecords
from vpae_jax.encoding.captions import Captions
from vpae_jax.encoding.clip_source import Reject
from vpae_jax.encoding.decoding import Unreadable, probe
from vpae_jax.encoding.manifest import Manifest
from vpae_jax.media import read_image
from vpae_jax.types import UserError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 135\n"
KINDS = {
    POINTER: "is a Git LFS pointer, not the file itself; run `git lfs pull`",
    b"<!doctype html>\n<html><body>Not found": "is a web page (HTML), which sites send",
    b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>": "is XML, which stores send",
    b"\x1f\x8b\x08" + bytes(50): "is an archive; unpack it",
}


@pytest.fixture(params=KINDS, ids=lambda content: KINDS[content].split(",")[0].split(";")[0])
def content(request):
    return request.param


def test_of_a_video(tmp_path, content):
    (tmp_path / "clip.mp4").write_bytes(content)
    with pytest.raises(Unreadable) as error:
        probe(tmp_path / "clip.mp4")
    assert error.value.kind == "unreadable" and error.value.reason.startswith(KINDS[content])


def test_of_an_image(tmp_path, content):
    (tmp_path / "first.png").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_image(tmp_path / "first.png")
    assert str(error.value).startswith(f"image {tmp_path / 'first.png'}: {KINDS[content]}")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_of_a_table(tmp_path, content, suffix):
    (file := tmp_path / f"table.{suffix}").write_bytes(content)
    with pytest.raises(UserError) as error:
        Manifest(tmp_path, file)
    assert str(error.value).startswith(f"{file}: {KINDS[content]}")


def test_of_a_text_of_captions(tmp_path, content):
    (file := tmp_path / "captions.txt").write_bytes(content)
    with pytest.raises(UserError) as error:
        Captions(file)
    assert str(error.value).startswith(f"{file}: {KINDS[content]}")


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_of_a_caption_beside_a_video(tmp_path, content, suffix):
    for name, data in (("a.mp4", b""), (f"a.{suffix}", content), ("b.mp4", b""), ("b.txt", b"a caption")):
        (tmp_path / name).write_bytes(data)
    manifest = Manifest(tmp_path)
    first, second = manifest.read(0)
    assert isinstance(first, Reject) and first.kind == "caption"
    assert first.reason.startswith(f"'a.{suffix}' {KINDS[content]}") and second.caption == "a caption"


@pytest.mark.parametrize("name", ["index.json", "null.safetensors", "shards/*"])
def test_of_a_file_of_records(tmp_path, content, name):
    folder = write_folder(tmp_path / "records", [[(0, SMALL)]])
    (file,) = folder.glob(name)
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        LatentRecords(folder)
    assert str(error.value).startswith(f"{file}: {KINDS[content]}")
