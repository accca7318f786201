"""Tables of text: what separates their columns, how they end lines, quotes, encodings, rows that are none."""

import csv
import json

import pytest
from manifests import GOOD_ROW, read, refusal, rows_of, write

from vpae_jax.encoding.clip_source import Reject
from vpae_jax.encoding.manifest import Columns, Manifest


def test_line_ends_a_mark_and_blank_lines(videos):
    for text in (
        "\ufeffpath,caption\r\nv0.mp4,one\r\n\r\n\r\nv1.mp4,two",
        "\n\npath,caption\nv0.mp4,one\n\nv1.mp4,two\n\n\n",
        '"path","caption"\n"v0.mp4","one"\n"v1.mp4","two"\n',
    ):
        assert [one.caption for one in rows_of(videos, text)] == ["one", "two"]
    text = '\ufeff{"path": "v0.mp4", "caption": "one"}\r\n\r\n{"path": "v1.mp4", "caption": "two"}'
    assert [one.caption for one in rows_of(videos, text, "t.jsonl")] == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        ("path;caption\nv0.mp4;one, two\n", ["one, two"]),
        ("path,caption\nv0.mp4,one; two\n", ["one; two"]),
        ('path;"width, height";caption\nv0.mp4;16, 9;one\n', ["one"]),
        ('"size; mb",path,caption\n1;2,v0.mp4,one\n', ["one"]),
        ("\ufeffpath;caption\r\nv0.mp4;one\r\nv1.mp4;two\r\n", ["one", "two"]),
        ('\n\npath;caption;"a long\nname"\nv0.mp4;"one; ""two""";\n', ['one; "two"']),
        ("path\tcaption\nv0.mp4\tone, two; three\n", ["one, two; three"]),
        ("path|caption\nv0.mp4|one\n", ["one"]),
        ("sep=;\npath;caption\nv0.mp4;one, two\n", ["one, two"]),
        ("\ufeffSEP=|\r\npath|caption\r\nv0.mp4|one;two\r\n", ["one;two"]),
    ],
)
@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_what_separates_columns_is_told_by_the_header(videos, text, captions, name):
    assert [one.caption for one in rows_of(videos, text, name)] == captions


def test_a_header_without_what_is_needed_is_shown_in_its_columns(videos):
    (table := videos.parent / "t.csv").write_text("video;text;size\nv0.mp4;one, two;3\n")
    assert "it has 'video', 'text', 'size'" in refusal(Manifest, videos, table)


@pytest.mark.parametrize(
    ("encoding", "text"), [("utf-16", "日本"), ("utf-16-le", "日本"), ("utf-16-be", "é"), ("cp1252", "“é”")]
)
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_the_advised_conversion_gives_what_was_written(videos, encoding, text, name):
    row = {"path": "v0.mp4", "caption": text}
    content = f"path,caption\nv0.mp4,{text}\n" if name == "t.csv" else json.dumps(row, ensure_ascii=False)
    table = videos.parent / name
    table.write_bytes(content.encode(encoding))
    message = refusal(Manifest, videos, table)
    command = message.partition("`")[2].partition("`")[0].split()
    assert command[0] == "iconv" and message.endswith("and give the result with --manifest=FILE")
    table.write_bytes(table.read_bytes().decode(command[2]).encode(command[4]))  # what iconv does
    assert [one.caption for one in read(Manifest(videos, table))] == [text]


def test_rows_of_other_lengths_and_broken_quotes_are_refused(videos):
    text = (
        "path,caption\n"
        "v0.mp4,one\n"
        "v1.mp4\n"
        "v2.mp4,unquoted, comma\n"
        'v3.mp4,"an end" too early\n'
        "v4.mp4,a carriage\rreturn\n"
        'v5.mp4,"two\nlines"\n'
        'v6.mp4,"an open quote\nv7.mp4,swallowed\n'
    )
    found = rows_of(videos, text, unit_videos=2)
    assert [one.id for one in found] == ["v0.mp4", "row 2", "row 3", "row 4", "row 5", "v5.mp4", "row 7"]
    assert [one.kind for one in found if isinstance(one, Reject)] == ["row"] * 5
    assert "line 3: 1 fields, expected 2" in found[1].reason
    assert "lines 9 to 10" in found[-1].reason


def test_an_open_quote_hides_no_more_than_the_limit(videos):
    lines = [f"v{i % 10}.mp4,{i:0100}\n" for i in range(3000)]
    lines[3] = 'v3.mp4,"never closed\n'
    found = rows_of(videos, "path,caption\n" + "".join(lines))
    assert [one.kind for one in found[:4] if isinstance(one, Reject)] == ["row"]
    assert "are its quotes closed?" in found[3].reason
    assert found[-1].id == "v9.mp4" and 3000 - len(found) < csv.field_size_limit() / 100


def test_fields_that_are_too_long_are_refused(videos):
    rows = [{"path": "v0.mp4", "caption": "a" * 1000}, {"path": "v1.mp4", "caption": "b" * 300_000}]
    rows += [{"path": "v2.mp4", "caption": "c"}, {"path": "v3.mp4", "caption": "d" * 300_000}]
    found = read(Manifest(videos, write(videos.parent / "t.csv", rows), unit_videos=1))
    assert [one.id for one in found] == ["v0.mp4", "row 2", "v2.mp4", "row 4"]
    assert str(csv.field_size_limit()) in found[1].reason


@pytest.mark.parametrize(
    "line", ["[" * 100_000, "9" * 5000, '{"path": ', '"path"', "[1]", "null", "{'path': 1}", "\x00"]
)
def test_json_lines_that_are_no_objects(videos, line):
    path = videos.parent / "t.jsonl"
    path.write_text(json.dumps(GOOD_ROW) + "\n" + line + "\n\n  \n" + json.dumps(GOOD_ROW | {"id": "two"}))
    good, bad, after = read(Manifest(videos, path, Columns(id="id")))
    assert (good.id, after.id) == ("one", "two")
    assert (bad.id, bad.kind) == ("row 2", "row") and "line 2" in bad.reason
