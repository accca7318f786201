"""Batch iterators over clips, frames with captions, and encoded clips.

Each is a grain pipeline: shuffled anew in every epoch, endless, the same for the same seed, and with `get_state` and
`set_state`, so that a checkpoint continues after exactly the batches that were seen. Items are prepared as numpy arrays
(in threads, or in processes when `workers` is above 0) and become JAX arrays when the iterator hands them out.

A batch is a row of one endless order of clips, whoever reads it: of several processes, each prepares some of its clips
(`rows`), and a position is a number of batches, so that it holds for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
from grain.multiprocessing import MultiprocessingOptions
from jaxtyping import Float, UInt8
from transformers import PreTrainedTokenizerBase

from vpae_jax.data.digits import MovingDigits
from vpae_jax.data.records import LatentRecords
from vpae_jax.data.tokenizer import tokenize
from vpae_jax.types import Batch, CaptionedFrames, Condition, PixelBatch, UserError

# Batches that wait in memory: enough to hide the preparation, few enough for clips of any size.
READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
# Which clips of each batch are prepared here, in order; None for all.
Rows = Sequence[int] | None


def pixel_batches(
    source: MovingDigits, batch_size: int, seed: int, workers: int = 0, rows: Rows = None
) -> grain.DatasetIterator:
    """Endless iterator of `PixelBatch`."""

    def load(clip: Any) -> Any:
        return {"video": clip["video"]}

    def finish(batch: Any) -> PixelBatch:
        return PixelBatch(video=jnp.asarray(to_float(batch["video"])))

    return _iterate(source, load, finish, batch_size, seed, workers, rows)


def captioned_batches(
    source: MovingDigits,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    seed: int,
    workers: int = 0,
    rows: Rows = None,
) -> grain.DatasetIterator:
    """Endless iterator of `CaptionedFrames`: each clip's first and last frame and its caption's tokens."""

    def load(clip: Any) -> Any:
        ids, mask = tokenize(tokenizer, [clip["caption"]])
        return {"first": clip["video"][0], "last": clip["video"][-1], "ids": ids[0], "mask": mask[0]}

    def finish(batch: Any) -> CaptionedFrames:
        return CaptionedFrames(
            first=jnp.asarray(to_float(batch["first"])),
            last=jnp.asarray(to_float(batch["last"])),
            ids=jnp.asarray(batch["ids"]),
            mask=jnp.asarray(batch["mask"]),
        )

    return _iterate(source, load, finish, batch_size, seed, workers, rows)


def latent_batches(
    records: LatentRecords, batch_size: int, seed: int, workers: int = 0, rows: Rows = None
) -> grain.DatasetIterator:
    """Endless iterator of `Batch`, in float32."""
    null_text = jnp.asarray(records.null_text, jnp.float32)
    null_mask = jnp.asarray(records.null_mask)

    def finish(batch: Any) -> Batch:
        value = {name: jnp.asarray(x, None if x.dtype == bool else jnp.float32) for name, x in batch.items()}
        condition = Condition(
            text=value["text"], text_mask=value["text_mask"], image=value.get("image"), frames=value.get("frames")
        )
        return Batch(latents=value["latents"], condition=condition, null_text=null_text, null_mask=null_mask)

    return _iterate(records, lambda record: record, finish, batch_size, seed, workers, rows)


def to_float(pixels: UInt8[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """0..255 to [-1, 1], float32."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def _iterate(
    source: Any,
    load: Callable[[Any], Any],
    finish: Callable[[Any], Any],
    batch_size: int,
    seed: int,
    workers: int,
    rows: Rows,
) -> grain.DatasetIterator:
    if not 1 <= batch_size <= len(source):
        raise UserError(f"batch size {batch_size} does not fit {len(source)} clips; lower it or render more clips")
    order = grain.MapDataset.source(source).shuffle(seed=seed).repeat()
    own = tuple(range(batch_size)) if rows is None else tuple(rows)
    items = _OwnRows(order, batch_size, own).map(load)
    batches = items.batch(len(own), drop_remainder=True).to_iter_dataset(READ)
    if workers > 0:
        batches = batches.mp_prefetch(MultiprocessingOptions(num_workers=workers))
    return iter(batches.map(finish))


class _OwnRows(grain.MapDataset):
    """Of an endless order of clips, cut into batches of `size`, the clips at some places of each batch."""

    def __init__(self, order: grain.MapDataset, size: int, rows: tuple[int, ...]):
        super().__init__(order)
        self.size, self.rows = size, rows

    def __len__(self) -> int:
        return len(self._parent) // self.size * len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, place = divmod(index, len(self.rows))
        return self._parent[batch * self.size + self.rows[place]]
