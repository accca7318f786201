"""Manifests in Parquet."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from manifests import read, refusal

from vpae_jax.encoding.manifest import Columns, Manifest


def test_parquet_of_other_types(videos):
    table = pa.table(
        {
            "path": pa.array(["v0.mp4", "v1.mp4", None]).dictionary_encode(),
            "caption": pa.array(["a", "b", "c"], pa.large_string()),
            "id": pa.array([1, 2, None], pa.int16()),
            "start": pa.array([0.5, None, 1], pa.float32()),
            "cuts": pa.array([[1.0, 2.0], None, []]),
            "frames": pa.array([[b"x" * 100]] * 3),
            "when": pa.array([10**18] * 3, pa.timestamp("ns")),
        }
    )
    path = videos.parent / "t.parquet"
    pq.write_table(table, path)
    first, second, third = read(Manifest(videos, path, Columns(id="id", start="start", cuts="cuts")))
    assert (first.id, first.start, first.cuts, first.about) == ("1", 0.5, (1.0, 2.0), {})
    assert (second.id, second.start, second.cuts) == ("2", None, ())
    assert third.kind == "id"


def test_parquet_columns_that_hold_no_text(videos):
    path = videos.parent / "t.parquet"
    pq.write_table(pa.table({"path": [{"bytes": b"x", "path": "v0.mp4"}], "caption": ["c"]}), path)
    message = refusal(Manifest, videos, path)
    assert "struct<" in message and "--columns=path=COLUMN" in message


def test_parquet_text_that_is_not_utf8(videos):
    bad = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 2, 3], np.int32)), pa.py_buffer(b"\xff\xfec"))
    path = videos.parent / "t.parquet"
    pq.write_table(pa.table({"path": ["v0.mp4", "v1.mp4"], "caption": bad}), path)
    first, second = read(Manifest(videos, path))
    assert (first.kind, second.caption) == ("row", "c") and "cannot be read" in first.reason


def test_a_file_of_which_a_part_is_damaged_is_refused(videos):
    rows = [{"path": f"v{i % 10}.mp4", "id": i, "caption": f"caption {i} " + "x" * 50} for i in range(40)]
    path = videos.parent / "t.parquet"
    plain = {"use_dictionary": False, "compression": "none", "write_page_checksum": True}
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10, **plain)
    data = bytearray(path.read_bytes())
    data[data.index(b"caption 25 ")] ^= 0xFF
    path.write_bytes(data)
    message = refusal(Manifest, videos, path, Columns(id="id"))
    assert str(path) in message and "is damaged" in message and "--manifest=FILE" in message


def test_units_in_ascending_order_cost_one_pass_over_one_large_row_group(videos):
    rows = [{"path": "v0.mp4", "caption": f"caption {i}", "id": i} for i in range(3000)]
    path = videos.parent / "t.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3000)
    manifest = Manifest(videos, path, Columns(id="id"), unit_videos=50)
    opened = []
    table = manifest._rows._table
    begin = table._all
    table._all = lambda: opened.append(None) or begin()
    for unit in range(0, manifest.units, 3):
        assert [one.id for one in manifest.read(unit)] == [str(50 * unit + i) for i in range(50)]
    assert len(opened) == 1
    assert next(manifest.read(0)).id == "0" and len(opened) == 2
