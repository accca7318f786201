"""Measures a manifest of many rows and compares units at random with Python's csv: FOLDER ROWS UNITS; prints JSON."""

import csv
import json
import random
import sys
import time
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


def main(folder: Path, rows: int, units: int) -> None:
    table = folder / "big.csv"
    write(table, rows)
    (folder / "v.mp4").touch()
    tracemalloc.start()
    start = time.perf_counter()
    manifest = Manifest(folder, table, Columns("video", "caption", "id"), UNIT)
    seconds = time.perf_counter() - start
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    chosen = random.Random(0).sample(range(manifest.units), units)
    found = {}
    for unit in chosen:
        found = {unit: len(list(manifest.read(unit)))}
    reading = tracemalloc.get_traced_memory()[1] - kept
    tracemalloc.stop()
    assert found
    wanted = set(chosen)
    with table.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file)):
            unit, place = divmod(number, UNIT)
            if unit in wanted:
                if place == 0:
                    entries = list(manifest.read(unit))
                entry = entries[place]
                assert (entry.id, entry.caption) == (row["id"], row["caption"]), (unit, place)
                assert entry.about == {"score": row["score"]}
    print(json.dumps({"rows": manifest.rows, "peak": peak, "kept": kept, "reading": reading, "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
