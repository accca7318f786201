"""Measures a manifest of many rows and compares its units with Python's csv: FOLDER ROWS; prints JSON."""

import csv
import json
import sys
import tracemalloc
from pathlib import Path

from vpae_jax.encoding.manifest import Columns, Manifest

UNIT = 64


def write(path: Path, rows: int) -> None:
    """Rows of several lengths with line breaks within captions."""
    with path.open("w", newline="") as file:
        file.write("id,video,caption,score\r\n")
        for i in range(rows):
            middle = " and so on" * (i % 7)
            file.write(f'n{i},v.mp4,"caption {i}{middle}, with a ""quote"" and\na line break \u00e9",{i / 7:.4f}\r\n')


def main(folder: Path, rows: int) -> None:
    table = folder / "big.csv"
    write(table, rows)
    (folder / "v.mp4").touch()
    tracemalloc.start()
    manifest = Manifest(folder, table, Columns("video", "caption", "id"), UNIT)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    with table.open(newline="", encoding="utf-8") as file:
        expected = csv.DictReader(file)
        for unit in range(manifest.units):
            for entry, row in zip(manifest.read(unit), expected, strict=False):
                assert (entry.id, entry.caption, entry.about) == (row["id"], row["caption"], {"score": row["score"]})
    reading = tracemalloc.get_traced_memory()[1] - kept
    print(json.dumps({"rows": manifest.rows, "peak": peak, "kept": kept, "reading": reading}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
