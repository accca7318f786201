"""The mask of a clip in chunks for splash attention, which skips masked tiles and computes the mask within others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import Mask


@dataclass(frozen=True)
class Seen:
    """Which keys a query sees, as a function of indices that the kernel can compute.

    Attributes:
      first: number of tokens of the first chunk.
      size: number of tokens of each later chunk.
      past: index of the first key that represents earlier chunks; None if their own keys do.
    """

    first: int
    size: int
    past: int | None

    def __call__(self, stop: Any, key: Any) -> Any:
        """Whether a query sees a key; for integers of NumPy or JAX.

        Args:
          stop: index after the last token of the query's chunk.
          key: index of the key.
        """
        if self.past is None:
            return key < stop
        start = stop - self.size  # a shorter first chunk begins before the first key
        if self.first > self.size:
            start = start * (stop != self.first)
        return ((key >= start) & (key < stop)) | ((key >= self.past) & (key < self.past + start))


@dataclass(frozen=True)
class ChunkMask(Mask):
    """The mask of a clip in chunks, with padding.

    The kernel calls `mask_function` with `q_sequence` and indices of keys.

    Attributes:
      rows, columns: number of queries and keys.
      stops: as in `by_chunks`.
      mask_function: whether a query sees a key.
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
        """The end of each query's chunk; padding belongs to the last chunk."""
        chunk = np.searchsorted(self.stops, np.arange(self.rows), side="right")
        return np.asarray(self.stops, np.int32)[np.minimum(chunk, len(self.stops) - 1)]

    def __getitem__(self, place: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (np.arange(length)[part] for length, part in zip(self.shape, place, strict=True))
        stops, row = np.unique(self.q_sequence[rows], return_inverse=True)  # a tile has few
        return self.mask_function(stops[:, None], columns[None, :])[row]
