"""Manifests that were damaged in hundreds of ways: each is refused in one line, or gives entries and rejects."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vpae_jax.encoding.clip_source import CaptionedVideo, Reject
from vpae_jax.encoding.manifest import Columns, Manifest
from vpae_jax.types import UserError

COLUMNS = Columns("path", "caption", "id", "start", "end", "cuts")
FORMATS = ("csv", "tsv", "jsonl", "parquet", "folder")
CASES = 60
SPICE = (
    *("\x00", "\ufeff", "\u2028", "\x85", "\r", "\n", "\r\n", '"', '""', "'", ",", "\t", "\\\\", "\\", "=", ";"),
    *("\U0001f600", "\u0301", "\u202e", "\uffff", "../", "/", "~", "%s", "{", "}", "[", "]", "\\ud800", "\\udc00x"),
    *("NaN", "Infinity", "-1", "1e999", "null", "true", "9" * 400, "\u0663", "inf", "0:0:0", "PAR1"),
)


def base(rng):
    return [
        {
            "path": rng.choice(["v0.mp4", "v1.mp4", "sub/v2.mp4", "none.mp4", "v0"]),
            "caption": rng.choice(["a cat", 'a "cat", running', "two\nlines", "\u732b", "x" * rng.randrange(1, 300)]),
            "id": f"n{rng.randrange(20)}",
            "start": rng.choice(["", "0", "1.5", "0:01"]),
            "end": rng.choice(["", "5", "0:09.5"]),
            "cuts": rng.choice(["", "[1, 2]", "3 4"]),
            "score": f"{rng.random():.3f}",
        }
        for _ in range(rng.randrange(1, 30))
    ]


def unicode(rng):
    return "".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(20))


def damage_rows(rng, rows):
    for _ in range(rng.randrange(4)):
        row = rng.choice(rows)
        key = rng.choice(list(row) or ["path"])
        change = rng.randrange(6)
        if change == 0:
            row.pop(key, None)
        elif change == 1:
            row[key] = unicode(rng)
        elif change == 2:
            row[key] = rng.choice(SPICE) * rng.choice([1, 1, 3, 3000])
        elif change == 3:
            row[key] = row.get(key, "") + rng.choice(SPICE)
        elif change == 4:
            row[rng.choice(["path", "caption", "\n", ""])] = row.pop(key, "")
        else:
            row[key] = "y" * rng.choice([5000, 140_000])


def encode(rng, kind, rows):
    if kind == "parquet":
        sink = pa.BufferOutputStream()
        options = {"compression": rng.choice(["none", "snappy"]), "use_dictionary": rng.random() < 0.5}
        table = pa.Table.from_pylist([{k: v for k, v in row.items() if k} for row in rows])
        pq.write_table(table, sink, row_group_size=rng.choice([3, 100]), **options)
        return sink.getvalue().to_pybytes()
    if kind == "jsonl":
        lines = []
        for row in rows:
            values = dict(row)
            if rng.random() < 0.2:
                odd = [None, 1, -1.5, True, [], [1, "2"], {"a": [1]}, float("nan"), 10**30, "\ud800", [[]]]
                values[rng.choice(list(row) or ["path"])] = rng.choice(odd)
            lines.append(json.dumps(values, ensure_ascii=rng.random() < 0.9).encode(errors="surrogatepass"))
        return b"\n".join(lines)
    names = list(dict.fromkeys(name for row in rows for name in row))
    if rng.random() < 0.2:
        rng.shuffle(names)
    comma = "," if kind == "csv" else "\t"

    def quoted(text):
        plain = not any(c in text for c in '",\t\n\r')
        return text if plain or rng.random() < 0.05 else '"' + text.replace('"', '""') + '"'

    lines = [comma.join(map(quoted, names))] + [comma.join(quoted(row.get(n, "")) for n in names) for row in rows]
    return rng.choice(["\n", "\r\n"]).join(lines).encode()


def damage_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        where = rng.randrange(len(data) + 1)
        change = rng.randrange(7)
        if change == 0 and where < len(data):
            data[where] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[where:where] = rng.choice(SPICE).encode()
        elif change == 2:
            del data[where:]
        elif change == 3:
            del data[where : where + rng.randrange(1, 40)]
        elif change == 4:
            lines = data.split(b"\n")
            rng.shuffle(lines)
            data = bytearray(b"\n".join(lines))
        elif change == 5:
            data = data.replace(b'"', b"", rng.randrange(1, 3))
        else:
            data[where:where] = bytes(rng.randrange(256) for _ in range(8))
    return bytes(data)


def plant(rng, root, kind):
    """Writes a damaged manifest. Returns its file, or None for a folder."""
    rows = base(rng)
    if kind == "folder":
        for name in ("v0", "v1", "sub/v2"):
            row = {k: v for k, v in rng.choice(rows).items() if k not in ("path", "id")}
            damage_rows(rng, [row])
            suffix = rng.choice([".json", ".txt"])
            data = json.dumps(row).encode() if suffix == ".json" else row.get("caption", "").encode()
            (root / (name + suffix)).write_bytes(damage_bytes(rng, data))
        return None
    damage_rows(rng, rows)
    file = root.parent / f"table.{kind}"
    file.write_bytes(damage_bytes(rng, encode(rng, kind, rows)))
    return file


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_manifests(tmp_path, kind):
    read = refused = 0
    kinds = set()
    for seed in range(CASES):
        rng = random.Random(f"{kind} {seed}")
        root = tmp_path / str(seed) / "videos"
        (root / "sub").mkdir(parents=True)
        for name in ("v0.mp4", "v1.mp4", "sub/v2.mp4"):
            (root / name).touch()
        file = plant(rng, root, kind)
        try:
            manifest = Manifest(root, file, COLUMNS, unit_videos=4)
            units = [list(manifest.read(unit)) for unit in range(manifest.units)]
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, seed
            refused += 1
            continue
        assert sum(map(len, units)) == manifest.rows, seed
        again = rng.randrange(manifest.units)
        assert list(manifest.read(again)) == units[again], seed
        names = [one.id for unit in units for one in unit if isinstance(one, CaptionedVideo)]
        assert len(names) == len(set(names)), seed
        for one in (one for unit in units for one in unit):
            check(one, root)
            kinds.add(getattr(one, "kind", "entry"))
        read += 1
    assert read > CASES / 10 and (refused or kind == "folder")
    assert {"entry", "caption" if kind == "folder" else "duplicate"} <= kinds


def check(one, root):
    """What may come out of a manifest, whatever went in."""
    if isinstance(one, Reject):
        assert one.kind in ("row", "path", "missing", "id", "duplicate", "caption", "time")
        assert one.reason and len(one.reason.splitlines()) == 1
        (one.id + one.reason).encode()
        return
    assert isinstance(one, CaptionedVideo)
    assert one.path.is_file() and one.path.resolve().is_relative_to(root.resolve())
    assert one.id.strip() and one.caption.strip()
    (one.id + one.caption).encode()
    assert 0 <= (one.start or 0) < (one.end or float("inf"))
    assert list(one.cuts) == sorted(set(one.cuts)) and all(cut >= 0 for cut in one.cuts)
    json.dumps(dict(one.about), ensure_ascii=False, allow_nan=False).encode()
