"""Loads batches in a fixed order, ahead of training, in threads or processes, from any position.

A position is the number of preceding batches. It does not depend on who prepares them, so it is valid for any number of
training processes and of workers.

Workers import this module and everything it imports, so it must not import models or tokenizers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import grain
import numpy as np
from grain.multiprocessing import MultiprocessingOptions

from vpae_jax.data.order import Order
from vpae_jax.data.records import BadRecord, LatentRecords, Value
from vpae_jax.types import UserError

# Batches prepared ahead: enough to hide the preparation, few enough for clips of any size. They are prepared
# concurrently, because reads from a remote store have high latency but cost little.
READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
# The fraction of bad records is checked once this many were read; after this many bad ones in a row, the run stops.
ENOUGH = 200

# Returns one clip's arrays, given source and index; may raise `BadRecord`, or `UserError` if nothing can be read.
Load = Callable[[int, int], Mapping[str, Value]]


@dataclass(frozen=True)
class RecordsOf:
    """Loads clips from folders of records, indexed by `source`; with or without the seeds of their noise."""

    folders: tuple[LatentRecords, ...]
    seeds: bool = False

    def __call__(self, source: int, clip: int) -> Mapping[str, Value]:
        folder = self.folders[source]
        return folder.with_seed(clip) if self.seeds else folder[clip]


class _Batches(grain.MapDataset):
    """The clips at the given rows of each batch from `start` on.

    An item contains the stacked `arrays` (empty if a clip could not be replaced), the number of records `read`,
    messages about `bad` ones, and an error message `failed`, which is not an exception because Grain would add lines to
    it. It is a plain tree, whose arrays workers return in shared memory.
    """

    def __init__(self, order: Order, load: Load, rows: tuple[int, ...], start: int):
        super().__init__()
        self.order, self.load, self.rows, self.start = order, load, rows, start

    def __len__(self) -> int:
        return sys.maxsize - self.start

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        arrays: dict[str, Value] = {}
        read, bad = 0, []
        for place, row in enumerate(self.rows):
            loaded: Mapping[str, Value] | None = None
            for source, clip in islice(self.order.candidates(self.start + index, row), ENOUGH):
                read += 1
                try:
                    loaded = self.load(source, clip)
                    break
                except BadRecord as error:
                    bad.append(str(error))
                except UserError as error:
                    return {"arrays": {}, "read": read, "bad": bad, "failed": str(error)}
            if loaded is None:
                return {"arrays": {}, "read": read, "bad": bad, "failed": ""}
            for name, value in loaded.items():
                if place == 0:
                    arrays[name] = np.empty((len(self.rows), *value.shape), value.dtype)
                arrays[name][place] = value
        return {"arrays": arrays, "read": read, "bad": bad, "failed": ""}


class Batches(Iterator[Any]):
    """An endless iterator over the batches of an order.

    Args:
      order: the order of all clips.
      load: returns one clip's arrays.
      finish: makes the batch that is returned from its arrays.
      rows: which clips of each batch are prepared here.
      workers: processes that prepare batches; 0 prepares them in threads.
      max_bad: maximum tolerated fraction of corrupt records.
      data: description of the data; a position is only valid for the same data.

    Attributes:
      bad: number of bad records met so far.

    Raises:
      UserError: (when advanced) of at least 200 records read, more than `max_bad` are bad, or 200 in a row were bad; or
        an error that `load` raised.
    """

    def __init__(
        self,
        order: Order,
        load: Load,
        finish: Callable[[Mapping[str, Value]], Any],
        rows: Sequence[int],
        workers: int = 0,
        max_bad: float = 0.0,
        data: str = "",
    ):
        self._order, self._load, self._finish, self._rows = order, load, finish, tuple(rows)
        self._workers, self._max_bad, self._data = workers, max_bad, data
        self._position, self._ahead = 0, None
        self._read, self.bad = 0, 0
        self._named: set[str] = set()

    def __next__(self) -> Any:
        if self._ahead is None:
            dataset = _Batches(self._order, self._load, self._rows, self._position).to_iter_dataset(READ)
            if self._workers > 0:
                dataset = dataset.mp_prefetch(MultiprocessingOptions(num_workers=self._workers))
            self._ahead = iter(dataset)
        loaded = next(self._ahead)
        self._judge(loaded)
        self._position += 1
        return self._finish(loaded["arrays"])

    def get_state(self) -> dict[str, Any]:
        """Returns the number of batches returned so far, and the description of the data."""
        return {"batches": self._position, "data": self._data}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from a saved position. Raises `UserError` for a position in other data, or from another version."""
        if sorted(state) != ["batches", "data"]:
            raise UserError(
                f"the checkpoint's data position is {dict(state)}, which another version wrote; start again in another "
                "--workdir"
            )
        if state["data"] != self._data:
            raise UserError(
                f"the checkpoint was trained on {state['data']}, but the data is now {self._data}; give the same data, "
                "or start again in another --workdir"
            )
        self.close()
        self._position = state["batches"]

    def close(self) -> None:
        """Ends the threads and processes that prepare batches; they restart with the next batch."""
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None

    def _judge(self, loaded: Mapping[str, Any]) -> None:
        """Counts bad records, and reports each of them once. Raises `UserError` as `Batches` does."""
        self._read += loaded["read"]
        self.bad += len(loaded["bad"])
        for reason in loaded["bad"]:
            if reason not in self._named:
                self._named.add(reason)
                print(f"bad record: {reason}; it is replaced by another", file=sys.stderr, flush=True)
        if loaded["failed"]:
            raise UserError(loaded["failed"])
        remedy = "remove the shards named above and run the same encode command again"
        if not loaded["arrays"]:
            raise UserError(f"{ENOUGH} records in a row were bad, the last one: {loaded['bad'][-1]}; {remedy}")
        if self._read >= ENOUGH and self.bad > self._max_bad * self._read:
            raise UserError(
                f"{self.bad} of {self._read} records were bad, more than config.data.max_bad = {self._max_bad:g} "
                f"allows; {remedy}"
            )
