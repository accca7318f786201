"""A table's rows, numbered and cut into units, with what is needed to read any unit and to tell equal ids.

A table is read once when its rows are counted. What is kept does not depend on what they hold: where each unit begins,
and the numbers of the rows whose id came before. That takes about 30 bytes a row while it is read, and a quarter of a
byte afterwards.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt64

from vpae_jax.encoding.parquet import ParquetTable
from vpae_jax.encoding.tables import DELIMITERS, JSON_LINES, Place, Refused, Table, TableRow, TextTable

PARQUET = (".parquet", ".pq")
TABLES = (*DELIMITERS, *JSON_LINES, *PARQUET)


class Rows:
    """The rows of a table in units.

    Args:
      table: where they are read.
      keys: the columns that `name` reads.
      size: rows of a unit.
      name: a row's id, or raises `Refused` for a row that has none; None for a table whose rows have no ids.

    Attributes:
      count, units: how many there are.
      digest: 16 hexadecimal digits of all that decides them.

    Raises:
      UserError: the table cannot be read.
    """

    def __init__(self, table: Table, keys: Sequence[str], size: int, name: Callable[[TableRow], str] | None) -> None:
        self._table, self.size = table, size
        digest = hashlib.sha256()
        places, hashes = array("Q"), array("Q")
        self.count = 0
        for place, row in table.scan(keys, digest):
            if self.count % size == 0:
                places.extend(place)
            if name is not None:
                hashes.append(_hash(row, name))
            self.count += 1
        self.units = math.ceil(self.count / size)
        self.digest = digest.hexdigest()[:16]
        self._places = np.array(places, np.uint64).reshape(self.units, 2)
        self._repeated = repeated(np.frombuffer(hashes, np.uint64))

    def rows_of(self, unit: int) -> int:
        """How many rows a unit has."""
        return min(self.size, self.count - unit * self.size)

    def read(self, unit: int) -> Iterator[tuple[int, TableRow | Refused, bool]]:
        """A unit's rows: number from 0, values, and whether a row before it has the same id.

        Ids are compared by 8 bytes of their hash: that one of a million is taken for another has a chance of 3e-8.

        Raises:
          IndexError: no such unit.
          UserError: the table was changed since it was scanned, or is gone.
        """
        if not 0 <= unit < self.units:
            raise IndexError(f"unit {unit} of {self.units}")
        first = unit * self.size
        count = self.rows_of(unit)
        low, high = np.searchsorted(self._repeated, [first, first + count])
        again = set(self._repeated[low:high].tolist())
        offset, line = self._places[unit].tolist()
        for number, row in enumerate(self._table.rows(Place(offset, line), count), first):
            yield number, row, number in again


def open_table(file: Path, needed: Mapping[str, str]) -> Table:
    """A table by its suffix, one of `TABLES`; `needed` are its columns by what they are needed for.

    Raises:
      UserError: it cannot be read, is empty or damaged, or a column is missing.
    """
    return ParquetTable(file, needed) if file.suffix.lower() in PARQUET else TextTable(file, needed)


def repeated(hashes: UInt64[np.ndarray, "rows"]) -> Int[np.ndarray, "repeated"]:
    """Numbers of the rows whose hash came before, in order; 0 stands for no id."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    return np.sort(order[1:][(ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)])


def _hash(row: TableRow | Refused, name: Callable[[TableRow], str]) -> int:
    """64 bits of a row's id; 0 for a row that has none."""
    if isinstance(row, Refused):
        return 0
    try:
        found = name(row)
    except Refused:
        return 0
    return int.from_bytes(hashlib.blake2b(found.encode(), digest_size=8).digest(), "little") or 1
