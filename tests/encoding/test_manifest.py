"""Manifests: every format of tables, every kind of bad row, places that hold, memory that does not grow."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from manifests import CAPTIONS, GOOD_ROW, read, refusal, rows_of, write

from vpae_jax.encoding.clip_source import CaptionedVideo, Reject
from vpae_jax.encoding.manifest import Columns, Manifest
from vpae_jax.encoding.tables import repeated


def only(videos, name, rows, columns=None):
    """The one thing that a manifest of one row gives."""
    found = read(Manifest(videos, write(videos.parent / name, rows), columns))
    assert len(found) == 1
    return found[0]


TABLES = ("t.csv", "t.tsv", "t.jsonl", "t.parquet")


@pytest.mark.parametrize("name", TABLES)
def test_every_format_gives_the_same_entries(videos, name):
    rows = [
        {"video": f"v{i}.mp4", "text": text, "from": 0.5 * i, "to": 0.5 * i + 2, "shots": "[1.5, 0.25]", "fps": 24 + i}
        for i, text in enumerate(CAPTIONS)
    ]
    columns = Columns("video", "text", None, "from", "to", "shots")
    manifest = Manifest(videos, write(videos.parent / name, rows), columns, unit_videos=3)
    assert (manifest.rows, manifest.units) == (10, 4)
    found = read(manifest)
    number = int if name in ("t.jsonl", "t.parquet") else str
    for i, one in enumerate(found):
        about = {"fps": number(24 + i)}
        start, end = 0.5 * i, 0.5 * i + 2
        id = f"v{i}.mp4@{start:g}-{end:g}"
        expected = CaptionedVideo(id, videos / f"v{i}.mp4", CAPTIONS[i], start, end, (0.25, 1.5), about)
        assert one == expected
    for unit in random.Random(0).choices(range(4), k=20):
        assert list(manifest.read(unit)) == found[3 * unit : 3 * unit + 3]


@pytest.mark.parametrize("name", TABLES)
def test_interleaved_units_do_not_disturb_each_other(videos, name):
    rows = [{"path": f"v{i % 10}.mp4", "caption": f"c{i}", "id": f"n{i}"} for i in range(40)]
    manifest = Manifest(videos, write(videos.parent / name, rows), Columns(id="id"), unit_videos=5)
    both = list(zip(manifest.read(6), manifest.read(1), strict=True))
    assert [one.id for one, _ in both] == [f"n{i}" for i in range(30, 35)]
    assert [one.id for _, one in both] == [f"n{i}" for i in range(5, 10)]


BAD_ROWS = {
    "climbs": ({"path": "../outside.mp4"}, "path"),
    "climbs from within": ({"path": "a/../../outside.mp4"}, "path"),
    "absolute": ({"path": "/etc/passwd"}, "path"),
    "link": ({"path": "link.mp4"}, "path"),
    "circle": ({"path": "circle.mp4"}, "path"),
    "folder": ({"path": "folder.mp4"}, "path"),
    "pipe": ({"path": "pipe.mp4"}, "path"),
    "root": ({"path": "."}, "path"),
    "NUL": ({"path": "v0\x00.mp4"}, "path"),
    "long name": ({"path": "v" * 300 + ".mp4"}, "path"),
    "long path": ({"path": "v" * 5000 + ".mp4"}, "path"),
    "no name": ({"path": "  "}, "path"),
    "below a file": ({"path": "v0.mp4/v1.mp4"}, "missing"),
    "absent": ({"path": "none.mp4"}, "missing"),
    "absent, newline": ({"path": "no\nne.mp4"}, "missing"),
    "no caption": ({"caption": ""}, "caption"),
    "blank caption": ({"caption": " \n\t\u3000"}, "caption"),
    "no id": ({"id": ""}, "id"),
    "long id": ({"id": "i" * 5000}, "id"),
    "start": ({"start": "soon"}, "time"),
    "negative": ({"start": "-1"}, "time"),
    "not a number": ({"start": "nan"}, "time"),
    "infinite": ({"end": "inf"}, "time"),
    "too large": ({"end": "1e999"}, "time"),
    "Python only": ({"end": "1_000"}, "time"),
    "foreign digits": ({"end": "٣"}, "time"),
    "end before start": ({"start": "3", "end": "2"}, "time"),
    "nothing left": ({"start": "3", "end": "3"}, "time"),
    "end at zero": ({"end": "0"}, "time"),
    "cuts": ({"cuts": "1, two"}, "time"),
    "too many cuts": ({"cuts": "1 " * 10_001}, "time"),
}
ALL = Columns(id="id", start="start", end="end", cuts="cuts")


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_a_reject_with_its_kind(videos, name, case):
    (videos.parent / "outside.mp4").touch()
    (videos / "link.mp4").symlink_to(videos.parent / "outside.mp4")
    (videos / "circle.mp4").symlink_to(videos / "circle.mp4")
    (videos / "folder.mp4").mkdir()
    os.mkfifo(videos / "pipe.mp4")
    change, kind = BAD_ROWS[case]
    found = only(videos, name, [GOOD_ROW | change], ALL)
    assert isinstance(found, Reject), found
    assert found.kind == kind
    assert found.reason and "\n" not in found.reason and len(found.reason) < 300
    assert found.id == ("row 1" if kind == "id" else "one")


@pytest.mark.parametrize(
    ("given", "seconds"), [("1.5", 1.5), (" 2 ", 2), (".5", 0.5), ("1e1", 10), ("0:02.5", 2.5), ("1:00:01.25", 3601.25)]
)
def test_times_are_seconds_or_clock_times(videos, given, seconds):
    row = GOOD_ROW | {"start": given, "end": "2:00:00", "cuts": f"['{given}'; 0:07.5]"}
    found = only(videos, "t.csv", [row], ALL)
    assert (found.start, found.end, found.cuts) == (seconds, 7200, tuple(sorted((seconds, 7.5))))


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"caption": "half \ud800"}, "caption"),
        ({"caption": 7}, "caption"),
        ({"caption": ["a", "b"]}, "caption"),
        ({"caption": None}, "caption"),
        ({"path": "\udcff.mp4"}, "path"),
        ({"path": True}, "path"),
        ({"path": {}}, "path"),
        ({"id": "\ud800"}, "id"),
        ({"id": 1.5}, "id"),
        ({"id": None}, "id"),
        ({"start": True}, "time"),
        ({"start": float("nan")}, "time"),
        ({"start": [1]}, "time"),
        ({"end": 10**400}, "time"),
        ({"end": float("inf")}, "time"),
        ({"cuts": {"a": 1}}, "time"),
        ({"cuts": [1, None]}, "time"),
        ({"cuts": [[1]]}, "time"),
    ],
)
def test_values_of_json(videos, change, kind):
    found = only(videos, "t.jsonl", [GOOD_ROW | change], ALL)
    assert isinstance(found, Reject) and found.kind == kind
    (found.reason + found.id).encode()


def test_json_numbers_and_lists_are_times_and_ids(videos):
    found = only(videos, "t.jsonl", [GOOD_ROW | {"id": 7, "start": 1, "end": 2.5, "cuts": [2, 1.5, "0:02"]}], ALL)
    assert (found.id, found.start, found.end, found.cuts) == ("7", 1.0, 2.5, (1.5, 2.0))
    assert only(videos, "t.jsonl", [GOOD_ROW | {"cuts": 3}], ALL).cuts == (3.0,)


def test_what_is_kept_about_a_video_is_plain_json(videos):
    row = {
        "a": 1,
        "b": "x",
        "c": True,
        "d": 1.5,
        "e": float("nan"),
        "f": [1],
        "g": "y" * 2000,
        "h": "\ud800",
        "i": None,
    }
    found = only(videos, "t.jsonl", [GOOD_ROW | row | {"\udc00": 1}], ALL)
    assert found.about == {"a": 1, "b": "x", "c": True, "d": 1.5, "h": "?", "?": 1}
    json.dumps(found.about, ensure_ascii=False, allow_nan=False).encode()


@pytest.mark.parametrize("name", TABLES)
def test_the_first_of_equal_ids_is_kept(videos, name):
    rows = [{"path": f"v{i % 3}.mp4", "caption": f"c{i}"} for i in range(9)]
    found = read(Manifest(videos, write(videos.parent / name, rows), unit_videos=2))
    assert [one.caption for one in found[:3]] == ["c0", "c1", "c2"]
    assert [(one.id, one.kind) for one in found[3:]] == [(f"v{i % 3}.mp4", "duplicate") for i in range(3, 9)]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("columns", [Columns(start="from", end="to"), Columns(span="span")])
def test_parts_of_one_video_are_told_apart_by_their_times(videos, name, columns):
    times = [("0", "1.5"), ("1.5", "3.2"), ("0:01.50", "3.200"), ("", ""), ("0", ""), ("2", ""), ("", "1:00:00.125")]
    rows = [
        {
            "path": f"v{i // 7}.mp4",
            "caption": f"c{i}",
            "from": times[i % 7][0],
            "to": times[i % 7][1],
            "span": " ".join(times[i % 7]) if all(times[i % 7]) else "",
        }
        for i in range(14)
    ]
    if columns.span:
        rows = [row for row in rows if row["span"] or not row["to"] + row["from"]]
    manifest = Manifest(videos, write(videos.parent / name, rows), columns, unit_videos=3)
    found = read(manifest)
    kept = {one.id: one.caption for one in found if isinstance(one, CaptionedVideo)}
    some = {
        "v0.mp4@0-1.5": "c0",
        "v0.mp4@1.5-3.2": "c1",
        "v0.mp4": "c3",
        "v1.mp4@0-1.5": "c7",
        "v1.mp4@1.5-3.2": "c8",
        "v1.mp4": "c10",
    }
    open_ended = {
        "v0.mp4@2-": "c5",
        "v0.mp4@0-3600.125": "c6",
        "v1.mp4@2-": "c12",
        "v1.mp4@0-3600.125": "c13",
    }
    assert kept == (some if columns.span else some | open_ended)
    doubled = [one for one in found if isinstance(one, Reject)]
    assert [one.kind for one in doubled] == ["duplicate"] * (2 if columns.span else 4)
    assert doubled[0].id == "v0.mp4@1.5-3.2"
    assert doubled[0].reason == (
        "an earlier row has the same path and times, 'v0.mp4@1.5-3.2'; give rows ids with --columns=...,id=COLUMN"
    )
    assert [one for unit in reversed(range(manifest.units)) for one in manifest.read(unit)][-1] == found[2]


def test_a_part_whose_times_are_none_keeps_its_name(videos):
    rows = [{"path": "v0.mp4", "caption": "c", "from": at} for at in ("soon", "soon", "1")]
    bad, same, good = read(Manifest(videos, write(videos.parent / "t.csv", rows), Columns(start="from")))
    assert [(one.id, one.kind) for one in (bad, same)] == [("v0.mp4", "time")] * 2
    assert good.id == "v0.mp4@1-"


def test_a_duplicate_says_what_is_the_same(videos):
    rows = [{"path": "v0.mp4", "caption": "c", "id": "one"}] * 2
    table = write(videos.parent / "t.csv", rows)
    assert read(Manifest(videos, table))[1].reason == (
        "an earlier row has the same path, 'v0.mp4'; give rows ids with --columns=...,id=COLUMN"
    )
    assert read(Manifest(videos, table, Columns(id="id")))[1].reason == "an earlier row has the same 'id', 'one'"


def test_rows_without_ids_are_not_equal(videos):
    rows = [{"path": "", "caption": "c"}] * 3
    found = read(Manifest(videos, write(videos.parent / "t.csv", rows)))
    assert [(one.id, one.kind) for one in found] == [(f"row {i}", "path") for i in (1, 2, 3)]


def test_repeated_finds_all_but_the_first():
    hashes = np.array([5, 0, 7, 5, 0, 5, 2**64 - 1, 7, 2**64 - 1], np.uint64)
    assert np.flatnonzero(repeated(hashes)).tolist() == [3, 5, 7, 8]
    assert not repeated(hashes[:1]).any()


def test_names_without_a_suffix_are_completed(videos):
    (videos / "v1").mkdir()
    (videos / "b.c.webm").touch()
    (videos / "plain").touch()
    rows = [{"path": name, "caption": "c"} for name in ("v0", "v1", "b.c", "plain", "none", "../v0")]
    found = read(Manifest(videos, write(videos.parent / "t.csv", rows)))
    assert [one.path.name for one in found[:4]] == ["v0.mp4", "v1.mp4", "b.c.webm", "plain"]
    assert [one.kind for one in found[4:]] == ["missing", "path"]


def test_absolute_paths_and_links_within_the_folder_are_taken(videos):
    (videos / "link.mp4").symlink_to("v1.mp4")
    (videos.parent / "elsewhere").symlink_to(videos)
    rows = [{"path": str(videos / "v0.mp4")}, {"path": "link.mp4"}, {"path": str(videos.parent / "elsewhere/v2.mp4")}]
    table = write(videos.parent / "t.csv", [row | {"caption": "c"} for row in rows])
    for root in (videos, videos.parent / "elsewhere"):
        manifest = Manifest(root, table)
        found = [one.path for one in read(manifest)]
        assert [path.read_bytes() for path in found] == [b"no video"] * 3
        assert [str(path.relative_to(manifest.root)) for path in found] == ["v0.mp4", "link.mp4", "v2.mp4"]


@pytest.mark.parametrize("name", ["./v0.mp4", ".//v0.mp4", "x/../v0.mp4", "{root}/v0.mp4", "{link}/v0.mp4"])
def test_a_path_is_the_same_however_it_is_written(videos, name):
    (videos / "x").mkdir()
    (link := videos.parent / "link").symlink_to(videos)
    name = name.format(root=videos, link=link)
    table = videos.parent / "t.csv"
    for first, second in (("v0.mp4", name), (name, "v0.mp4")):
        table.write_text(f"path,caption\n{first},one\n{second},two\n")
        good, again = read(Manifest(link, table))
        assert (good.id, good.caption, again.id, again.kind) == ("v0.mp4", "one", "v0.mp4", "duplicate")


def test_parts_of_a_path_are_the_same_however_it_is_written(videos):
    text = "path,caption,from,to\n./v0.mp4,one,1,2\nv0.mp4,two,1,2\nv0.mp4,three,2,3\n"
    found = rows_of(videos, text, columns=Columns(start="from", end="to"))
    assert [getattr(one, "kind", one.id) for one in found] == ["v0.mp4@1-2", "duplicate", "v0.mp4@2-3"]


@pytest.mark.parametrize("name", TABLES)
def test_missing_columns_are_named_with_those_there_are(videos, name):
    table = write(videos.parent / name, [{"video": "v0.mp4", "caption": "c"}])
    message = refusal(Manifest, videos, table)
    assert name in message and "'path'" in message and "'video', 'caption'" in message
    assert "--columns=path=COLUMN" in message
    assert "--columns=cuts=COLUMN" in refusal(Manifest, videos, table, Columns(path="video", cuts="shots"))


def test_json_columns_may_be_there_in_some_rows(videos):
    rows = [{"path": "v0.mp4", "caption": "c"}, {"path": "v1.mp4", "caption": "c", "start": 1}, {"path": "v2.mp4"}]
    first, second, third = read(Manifest(videos, write(videos.parent / "t.jsonl", rows), Columns(start="start")))
    assert (first.start, second.start, third.kind) == (None, 1.0, "caption")


@pytest.mark.parametrize(
    ("name", "data", "hint"),
    [
        ("t.csv", b"", "empty"),
        ("t.jsonl", b"", "empty"),
        ("t.parquet", b"", "empty"),
        ("t.csv", b"\n\n\n", "no rows"),
        ("t.csv", b"path,caption\n", "no rows"),
        ("t.jsonl", b"\n", "no rows"),
        ("t.csv", b"path,caption,path\nv0.mp4,c,d\n", "more than one column 'path'"),
        ("t.csv", "path,caption\nv0.mp4,caf\u00e9\n".encode("latin1"), "line 2 is not UTF-8 (byte 0xe9)"),
        ("t.jsonl", b'{"path": "v0.mp4", "caption": "\xff"}', "line 1 is not UTF-8"),
        ("t.csv", "path,caption\nv0.mp4,c\n".encode("utf-16"), "`iconv -f UTF-16 -t UTF-8`"),
        ("t.csv", "path,caption\nv0.mp4,c\n".encode("utf-16-le"), "`iconv -f UTF-16LE -t UTF-8`"),
        ("t.tsv", "path\tcaption\nv0.mp4\tc\n".encode("utf-16-be"), "`iconv -f UTF-16BE -t UTF-8`"),
        ("t.jsonl", '{"path": "v0.mp4", "caption": "c"}'.encode("utf-32"), "`iconv -f UTF-32 -t UTF-8`"),
        ("t.csv", "path,caption\nv0.mp4,\u201ccaf\u00e9\u201d\n".encode("cp1252"), "`iconv -f WINDOWS-1252 -t UTF-8`"),
        ("t.csv", b'"path,caption\nv0.mp4,c\n', "not a header"),
        ("t.csv", b"\x00" * 300_000, "not a header"),
        ("t.csv", b"a" * 300_000, "not a header"),
        ("t.jsonl", b'"a"\n2\n', "no column 'path'"),
        ("t.jsonl", b'[\n  {"path": "v0.mp4", "caption": "c"}\n]\n', "JSON array, expected one object per line"),
        (
            "t.jsonl",
            b'{\n  "path": "v0.mp4",\n  "caption": "c"\n}\n',
            "indented JSON, expected one object per line",
        ),
        ("t.parquet", b"PAR1 no parquet", "damaged"),
        ("t.parquet", b"path,caption\nv0.mp4,c\n", "damaged"),
        ("t.txt", b"path,caption\n", ".csv .tsv .jsonl"),
        ("t.json", b"[]", "`jq -c '.[]' FILE.json` converts a JSON array to JSON Lines"),
        ("t", b"path,caption\n", "--videos=FOLDER"),
    ],
)
def test_files_that_are_no_manifests(videos, name, data, hint):
    path = videos.parent / name
    path.write_bytes(data)
    message = refusal(Manifest, videos, path)
    assert name in message and hint in message
    assert "--" in message or "header" in message or "jq" in message


def test_files_that_are_not_there(videos, tmp_path):
    assert "no such folder" in refusal(Manifest, tmp_path / "none")
    assert "v0.mp4: is a file; give the folder of videos" in refusal(Manifest, videos / "v0.mp4")
    assert "--manifest=FILE" in refusal(Manifest, videos, tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    assert "is not a file" in refusal(Manifest, videos, tmp_path / "folder.csv")
    assert "expected 1 or more" in refusal(Manifest, videos, unit_videos=0)
    assert "span" in repr(Columns(span="timestamp"))
    assert "start" in refusal(Columns, span="timestamp", start="from")


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_changed_is_not_read_on(videos, name):
    table = write(videos.parent / name, [{"path": "v0.mp4", "caption": "c"}])
    manifest = Manifest(videos, table)
    write(table, [{"path": "v0.mp4", "caption": "another"}])
    assert "has changed" in refusal(lambda: list(manifest.read(0)))
    table.unlink()
    assert name in refusal(lambda: list(manifest.read(0)))
    with pytest.raises(IndexError, match="unit 1 of 1"):
        list(manifest.read(1))


def test_an_identity_is_what_decides_the_entries_and_not_where_they_lie(videos, tmp_path):
    rows = [{"path": "v0.mp4", "caption": "c"}]
    one = Manifest(videos, write(tmp_path / "a.csv", rows))
    (tmp_path / "moved").mkdir()
    assert Manifest(tmp_path / "moved", write(tmp_path / "b.csv", rows)).identity == one.identity
    assert str(videos) not in repr(one.identity)
    assert Manifest(videos, write(tmp_path / "c.csv", [rows[0] | {"caption": "d"}])).identity != one.identity
    assert Manifest(videos, tmp_path / "a.csv", unit_videos=2).identity != one.identity
    assert Manifest(videos, tmp_path / "a.csv", Columns(id="path")).identity != one.identity
    parquet = Manifest(videos, write(tmp_path / "a.parquet", rows))
    assert Manifest(videos, write(tmp_path / "b.parquet", rows * 2)).identity != parquet.identity


# --- Size


def test_memory_hardly_grows_with_the_rows(tmp_path):
    """In a process of its own: without checks of types, which take memory too."""
    rows = 10_000
    script = Path(__file__).with_name("measure_manifest.py")
    done = subprocess.run([sys.executable, script, tmp_path, str(rows)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rows"] == rows
    assert found["peak"] < (1 << 20) + 32 * rows
    assert found["kept"] < (1 << 18) + rows
    assert found["reading"] < 1 << 20
