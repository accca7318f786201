"""The mask of a clip in chunks for splash attention, which computes it within tiles and leaves out those not seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import Mask


@dataclass(frozen=True)
class Seen:
    """Which keys a query sees, by numbers alone, so that the kernel computes it.

    Attributes:
      first: tokens of the first chunk.
      size: of each later one.
      past: the number of the first key that stands for what is before a chunk; None if its own keys do.
    """

    first: int
    size: int
    past: int | None

    def __call__(self, stop: Any, key: Any) -> Any:
        """Whether a query is shown a key, of NumPy's or JAX's integers.

        Args:
          stop: the token after the last of the query's chunk.
          key: the key's number.
        """
        if self.past is None:
            return key < stop
        start = stop - self.size  # a shorter first chunk begins before the first key
        if self.first > self.size:
            start = start * (stop != self.first)
        return ((key >= start) & (key < stop)) | ((key >= self.past) & (key < self.past + start))


@dataclass(frozen=True)
class ChunkMask(Mask):
    """What the queries of a clip in chunks see, padded.

    The kernel hands `q_sequence` and numbers of keys to `mask_function`.

    Attributes:
      rows, columns: queries and keys.
      stops: as of `by_chunks`.
      mask_function: who sees what.
    """

    rows: int
    columns: int
    stops: tuple[int, ...]
    mask_function: Seen

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def q_sequence(self) -> np.ndarray:
        """The end of each query's chunk; padding is of the last one."""
        chunk = np.searchsorted(self.stops, np.arange(self.rows), side="right")
        return np.asarray(self.stops, np.int32)[np.minimum(chunk, len(self.stops) - 1)]

    def __getitem__(self, place: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (np.arange(length)[part] for length, part in zip(self.shape, place, strict=True))
        stops, row = np.unique(self.q_sequence[rows], return_inverse=True)  # a tile has few
        return self.mask_function(stops[:, None], columns[None, :])[row]
