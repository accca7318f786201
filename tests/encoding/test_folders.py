"""Folders of videos with captions beside them."""

import errno
import inspect
import json
import os
import shutil
import sys

import pytest
from manifests import read, refusal

from vpae_jax.encoding.clip_source import CaptionedVideo, Reject
from vpae_jax.encoding.listing import _walk
from vpae_jax.encoding.manifest import Manifest


def folder(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def test_a_folder_is_read_in_the_order_of_names_with_captions_beside(tmp_path):
    about = {"prompt": "from json", "start": 1, "end": "0:03", "cuts": [2.5], "camera": "static", "path": "ignored"}
    root = folder(
        tmp_path / "root",
        {
            "b.mp4": "",
            "b.txt": "\ufeff  a caption\n",
            "a/z.MKV": "",
            "a/z.txt": "deep",
            "a/b/c.webm": "",
            "a/b/c.json": json.dumps(about),
            "a/b/c.txt": "not used",
            "no caption.mov": "",
            "notes.txt": "no video of this name",
            ".hidden.mp4": "",
            ".cache/d.mp4": "",
        },
    )
    manifest = Manifest(root, unit_videos=2)
    assert (manifest.rows, manifest.units) == (4, 2)
    deep, upper, plain, none = read(manifest)
    assert deep == CaptionedVideo(
        "a/b/c.webm", root / "a/b/c.webm", "from json", 1.0, 3.0, (2.5,), {"camera": "static"}
    )
    assert (upper.id, upper.caption, upper.path) == ("a/z.MKV", "deep", root / "a/z.MKV")
    assert (plain.id, plain.caption) == ("b.mp4", "a caption")
    assert (none.id, none.kind) == ("no caption.mov", "caption")
    assert list(manifest.read(1)) == [plain, none]


@pytest.mark.parametrize(
    ("sidecar", "content", "hint"),
    [
        ("a.txt", b"", "no caption"),
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("a.txt", b"x" * 200_000, "at most"),
        ("a.json", b"", "JSON"),
        ("a.json", b"[" * 100_000, "JSON"),
        ("a.json", b"[]", "object"),
        ("a.json", b'{"title": "x"}', "caption, text, prompt"),
        ("a.json", b'{"caption": null, "text": "x"}', "caption, text, prompt"),
        ("a.json", b'{"caption": ["x"]}', "not text"),
        ("a.json", b'{"caption": "\\ud800"}', "UTF-8"),
    ],
)
def test_bad_captions_beside_a_video(tmp_path, sidecar, content, hint):
    files = {"a.mp4": "", sidecar: content, "b.mp4": "", "b.txt": "c"}
    found, _ = read(Manifest(folder(tmp_path, files)))
    assert (found.id, found.kind) == ("a.mp4", "caption") and hint in found.reason
    assert len(found.reason) < 200


@pytest.mark.parametrize("caption", [{}, {"caption": None}, {"text": " "}])
def test_times_in_json_and_the_caption_in_text(tmp_path, caption):
    about = json.dumps({"start": 1.5, "end": 3, "camera": "static", **caption})
    (found,) = read(Manifest(folder(tmp_path, {"a.mp4": "", "a.json": about, "a.txt": "from text"})))
    assert isinstance(found, CaptionedVideo)
    assert (found.caption, found.start, found.end, found.about) == ("from text", 1.5, 3.0, {"camera": "static"})


@pytest.mark.parametrize(
    ("beside", "why"),
    [
        ({}, "'a.mp4': no .txt or .json file of the same name next to it"),
        ({"captions.txt": "all of them"}, "'a.mp4': no .txt or .json"),
        ({"b.json": '{"start": 1}'}, "'a.mp4': no .txt or .json"),
        ({"a.txt": " \n"}, "'a.mp4': no caption"),
        ({"a.txt": b"\xff"}, "'a.mp4': 'a.txt' is not UTF-8"),
    ],
)
def test_a_folder_in_which_no_video_has_a_caption(tmp_path, beside, why):
    message = refusal(Manifest, folder(tmp_path, {"a.mp4": "", "b.mp4": ""} | beside))
    assert f"{tmp_path}: none of its 2 videos has a caption ({why}" in message
    assert "NAME.txt" in message and "--manifest=FILE" in message


def test_suffixes_may_be_in_capitals(tmp_path):
    files = {"A.MP4": "", "A.TXT": "one", "B.MOV": "", "B.JSON": '{"caption": "two"}', "C.Mp4": "", "C.Txt": "three"}
    assert [one.caption for one in read(Manifest(folder(tmp_path, files)))] == ["one", "two", "three"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_caption_in_another_encoding_says_which(tmp_path, encoding):
    files = {"a.mp4": "", "a.txt": "a caption".encode(encoding), "b.mp4": "", "b.txt": "c"}
    found, _ = read(Manifest(folder(tmp_path, files)))
    name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    assert found.kind == "caption"
    assert found.reason == f"'a.txt' is {name}, expected UTF-8; convert it with `iconv -f {name} -t UTF-8`"


def hub_cache(root):
    """As a client of the hub leaves it: names that link to contents in a folder beside."""
    blobs, snapshot = root / "blobs", root / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number in range(3):
        for suffix, content in (("mp4", b"no video"), ("txt", b"a caption")):
            blob = blobs / f"{number}{suffix}"
            blob.write_bytes(content)
            (snapshot / f"v{number}.{suffix}").symlink_to(f"../../blobs/{blob.name}")
    return snapshot


@pytest.mark.parametrize("captions", ["links", "files", "none"])
def test_a_folder_of_links_says_where_they_lead_and_what_to_do(tmp_path, captions):
    snapshot = hub_cache(tmp_path / "cache")
    for path in snapshot.glob("*.txt") if captions != "links" else ():
        path.unlink()
        if captions == "files":
            path.write_text("a caption")
    message = refusal(Manifest, snapshot)
    assert message == (
        f"{snapshot}: none of its 3 videos can be read: 'v0.mp4' is a link to '{tmp_path / 'cache/blobs/0mp4'}', "
        "outside the folder of the videos; give a folder that holds both, or a copy with its links followed (`cp -rL`)"
    )
    if captions != "none":
        found = read(Manifest(tmp_path / "cache"))  # as it says
        assert [one.caption for one in found] == ["a caption"] * 3
        shutil.copytree(snapshot, tmp_path / "copy")
        assert [one.caption for one in read(Manifest(tmp_path / "copy"))] == ["a caption"] * 3


def test_captions_that_are_links_say_so(tmp_path):
    snapshot = hub_cache(tmp_path / "cache")
    for path in snapshot.glob("*.mp4"):
        path.unlink()
        path.touch()
    message = refusal(Manifest, snapshot)
    assert f"none of its 3 videos can be read: 'v0.txt' is a link to '{tmp_path / 'cache/blobs/0txt'}', out" in message
    assert "NAME.txt" not in message


@pytest.mark.parametrize("where", ["inside", "outside", "nowhere"])
def test_a_folder_of_links_to_folders(tmp_path, where):
    root = tmp_path / "root"
    root.mkdir()
    target = {"inside": root / ".more", "outside": tmp_path / "more", "nowhere": tmp_path / "root" / "gone.mp4"}[where]
    if where != "nowhere":
        folder(target, {"a.mp4": "", "a.txt": "c"})
    (root / "part.mp4").symlink_to(target)
    message = refusal(Manifest, root)
    assert "none of its 1 videos can be read: 'part.mp4' is a link to " in message and str(target) in message
    assert ("cp -rL" in message) == (where != "nowhere")


def test_a_table_of_links_says_where_they_lead(tmp_path):
    snapshot = hub_cache(tmp_path / "cache")
    (table := tmp_path / "t.csv").write_text("path,caption\nv0.mp4,one\nv1,two\n../x.mp4,three\n")
    one, two, three = read(Manifest(snapshot, table))
    assert one.reason.startswith(f"'v0.mp4' is a link to '{tmp_path / 'cache/blobs/0mp4'}', outside the folder of the")
    assert two.kind == "path" and "'v1' " in two.reason
    assert three.reason == "'../x.mp4' lies outside the folder of the videos"


def test_a_folder_of_images(tmp_path):
    folder(tmp_path, {"a/b.JPG": "", "a/b.txt": "a caption"})
    assert "only images such as 'a/b.JPG'" in refusal(Manifest, tmp_path)


def test_messages_name_the_setting_that_gave_the_folder(tmp_path):
    flag = "--config.data.videos"
    empty = folder(tmp_path / "empty", {"a.txt": ""})
    unreadable = folder(tmp_path / "unreadable", {"a.txt": "c"})
    os.mkfifo(unreadable / "a.mp4")
    for root in (tmp_path / "none", empty, unreadable):
        message = refusal(Manifest, root, flag=flag)
        assert f"with {flag}=FOLDER" in message and "--videos" not in message.replace(flag, "")


def test_bad_times_beside_a_video(tmp_path):
    (found,) = read(Manifest(folder(tmp_path, {"a.mp4": "", "a.json": '{"caption": "c", "end": "x"}'})))
    assert found.kind == "time"


def test_links_pipes_and_odd_names_in_a_folder(tmp_path):
    root = folder(tmp_path / "root", {"a.mp4": "", "a.txt": "c", "dir.mp4/b.mp4": "", "dir.mp4/b.txt": "c"})
    folder(tmp_path, {"secret.txt": "secret", "out.mp4": "", "out/e.mp4": ""})
    (root / "link.mp4").symlink_to(tmp_path / "out.mp4")
    (root / "s.mp4").touch()
    (root / "s.txt").symlink_to(tmp_path / "secret.txt")
    (root / "t.mp4").touch()
    os.mkfifo(root / "t.txt")
    os.mkfifo(root / "u.mp4")
    (root / "inner").symlink_to(root / "dir.mp4")
    (root / "outer").symlink_to(tmp_path / "out")
    (root / "self").symlink_to(root)
    (root / "gone.mp4").symlink_to("nowhere")
    with open(os.fsencode(root) + b"/w\xff.mp4", "wb"):
        pass
    found = {one.id: one for one in read(Manifest(root))}
    assert {name for name, one in found.items() if isinstance(one, CaptionedVideo)} == {"a.mp4", "dir.mp4/b.mp4"}
    kinds = {name: one.kind for name, one in found.items() if isinstance(one, Reject)}
    assert kinds == {
        "link.mp4": "path",
        "s.mp4": "caption",
        "t.mp4": "caption",
        "u.mp4": "path",
        "inner": "path",
        "outer": "path",
        "self": "path",
        "gone.mp4": "missing",
        "row 11": "path",
    }
    reasons = {name: one.reason for name, one in found.items() if isinstance(one, Reject)}
    assert f"'link.mp4' is a link to '{tmp_path / 'out.mp4'}', outside the folder" in reasons["link.mp4"]
    assert f"'gone.mp4' is a link to '{root / 'nowhere'}', which does not exist" in reasons["gone.mp4"]
    assert f"'inner' is a link to the folder '{root / 'dir.mp4'}', which is not followed" in reasons["inner"]
    assert f"'s.txt' is a link to '{tmp_path / 'secret.txt'}', outside" in reasons["s.mp4"]
    assert "secret" not in found["s.mp4"].reason.replace("secret.txt", "")


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EACCES, errno.ENAMETOOLONG])
def test_files_that_the_system_does_not_show(tmp_path, monkeypatch, number):
    manifest = Manifest(folder(tmp_path, {"a.mp4": "", "a.txt": "c", "b.mp4": "", "b.txt": "c"}))
    stat = os.stat

    def refusing(path, **options):
        if os.fspath(path).endswith("a.mp4"):
            raise OSError(number, os.strerror(number))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refusing)
    bad, good = read(manifest)
    assert (bad.id, bad.kind, good.id) == ("a.mp4", "path", "b.mp4")
    assert ("cannot be read: " in bad.reason) == (number != errno.ENAMETOOLONG)


def test_a_folder_deeper_than_python_recurses(tmp_path):
    (tmp_path / ("d/" * 300)).mkdir(parents=True)
    (tmp_path / ("d/" * 300) / "a.mp4").touch()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        found = list(_walk(str(tmp_path)))
    finally:
        sys.setrecursionlimit(limit)
    assert found == ["d/" * 300 + "a.mp4"]


def test_a_folder_without_videos(tmp_path):
    folder(tmp_path, {"a.txt": "", "b.jpg": ""})
    message = refusal(Manifest, tmp_path)
    assert ".mp4" in message and "--videos=FOLDER" in message


def test_a_folder_is_known_by_names_sizes_and_captions(tmp_path):
    files = {"a.mp4": "12", "a.txt": "one", "b.mp4": "3", "b.json": '{"text": "two"}'}
    known = Manifest(folder(tmp_path / "0", files)).identity
    assert Manifest(folder(tmp_path / "1", files | {"notes.md": "x"})).identity == known
    changes = [{"a.mp4": "123"}, {"a.txt": "uno"}, {"b.json": '{"text": "due"}'}, {"c.mp4": ""}, {"a.json": "{}"}]
    seen = {json.dumps(known)} | {
        json.dumps(Manifest(folder(tmp_path / f"c{i}", files | c)).identity) for i, c in enumerate(changes)
    }
    assert len(seen) == 1 + len(changes)
