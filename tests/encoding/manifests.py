"""Tables that list videos, and what manifests make of them."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vpae_jax.encoding.manifest import Manifest
from vpae_jax.types import UserError

GOOD_ROW = {"path": "v0.mp4", "caption": "c", "id": "one", "start": "", "end": "", "cuts": ""}

CAPTIONS = (
    "a plain caption",
    'with "quotes", commas; and\ttabs',
    "two\nlines\r\nand more",
    "日本語 العربية 👩‍👩‍👧 e\u0301 \u202eright to left",
    "a NUL \x00 within",
    "\ufeffa mark before it",
    "'; DROP TABLE clips; --",
    "{json: [1, 2]}",
    "=SUM(A1:A9)",
    "line\u2028separator \x85 next \x1c line",
)


def write(path, rows):
    """A table of dicts, in the format of the path's suffix."""
    suffix = path.suffix
    names = list(dict.fromkeys(name for row in rows for name in row))
    if suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, delimiter="," if suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    return path


def read(manifest):
    return [one for unit in range(manifest.units) for one in manifest.read(unit)]


def refusal(call, *args, **options):
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def rows_of(videos, text, name="t.csv", **options):
    """What a table with this content gives."""
    path = videos.parent / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read(Manifest(videos, path, **options))
