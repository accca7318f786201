"""Batches of a fixed order, prepared ahead of the training in threads or processes, from any position on.

A position is the number of batches before it. It says nothing of who prepares them, so it holds for any number of
processes that train and of workers that read.

Workers import this module and what it imports, which is why it knows neither models nor tokenizers.
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

# Batches that wait in memory: enough to hide the preparation, few enough for clips of any size. All are prepared at the
# same time, because reads of records that are far away take long and cost little.
READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
# Damage is judged by its share once this many records were read; after so many bad ones in a row none is looked for.
ENOUGH = 200

# From source and index to one clip's arrays; may raise `BadRecord`, and `UserError` when nothing can be read.
Load = Callable[[int, int], Mapping[str, Value]]


@dataclass(frozen=True)
class RecordsOf:
    """Loads clips from folders of records, of which `source` names one; with the seeds of their noise, or without."""

    folders: tuple[LatentRecords, ...]
    seeds: bool = False

    def __call__(self, source: int, clip: int) -> Mapping[str, Value]:
        folder = self.folders[source]
        return folder.with_seed(clip) if self.seeds else folder[clip]


class _Batches(grain.MapDataset):
    """Of each batch from `start` on, the clips at some places.

    An item has their `arrays`, one above the other (none when a clip could not be replaced), how many records were
    `read`, what was `bad` about which of them, and what `failed`, if something did: Grain adds lines of its own to an
    exception. It is a plain tree, whose arrays workers pass on in shared memory.
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
    """Endless iterator over an order's batches.

    Args:
      order: of all clips.
      load: makes one clip's arrays.
      finish: makes what is handed out from a batch's arrays.
      rows: which clips of each batch are prepared here.
      workers: processes that prepare batches; 0 prepares them in threads.
      max_bad: share of bad records that is put up with.
      data: what the order is of. A position holds for the same data alone.

    Attributes:
      bad: how many bad records were met.

    Raises:
      UserError: (when it is advanced) more than `max_bad` of the records that were read, at least 200, are bad, or
        200 bad ones came in a row; or what `load` raised.
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
        """How many batches were handed out, and of what."""
        return {"batches": self._position, "data": self._data}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after that many batches. Raises `UserError` for a position in other data, or of another version."""
        if sorted(state) != ["batches", "data"]:
            raise UserError(f"the checkpoint's position in the data is {dict(state)}, of another version; start again")
        if state["data"] != self._data:
            raise UserError(
                f"the checkpoint was trained on {state['data']}, now there is {self._data}; give the same data, or "
                "start again in another --workdir"
            )
        self.close()
        self._position = state["batches"]

    def close(self) -> None:
        """Ends the threads and processes that prepare batches; the next batch starts them again."""
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None

    def _judge(self, loaded: Mapping[str, Any]) -> None:
        """Counts bad records, and says of each once what is wrong with it. Raises `UserError` as `Batches` does."""
        self._read += loaded["read"]
        self.bad += len(loaded["bad"])
        for reason in loaded["bad"]:
            if reason not in self._named:
                self._named.add(reason)
                print(f"bad record: {reason}; another one takes its place", file=sys.stderr, flush=True)
        if loaded["failed"]:
            raise UserError(loaded["failed"])
        remedy = "remove the shards named above and run the same encode command again"
        if not loaded["arrays"]:
            raise UserError(f"{ENOUGH} records in a row were bad, the last of them: {loaded['bad'][-1]}; {remedy}")
        if self._read >= ENOUGH and self.bad > self._max_bad * self._read:
            raise UserError(
                f"{self.bad} of {self._read} records were bad, more than config.data.max_bad = {self._max_bad:g} "
                f"allows; {remedy}"
            )
