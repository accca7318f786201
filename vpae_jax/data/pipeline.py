"""Batch iterators over clips, frames with captions, and encoded clips.

Each is a grain pipeline: shuffled anew in every epoch, endless, the same for the same seed, and with `get_state` and
`set_state`, so that a checkpoint continues after exactly the batches that were seen. Items are prepared as numpy arrays
(in threads, or in processes when `workers` is above 0) and become JAX arrays when the iterator hands them out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
from grain.multiprocessing import MultiprocessingOptions
from jaxtyping import Float, UInt8
from transformers import PreTrainedTokenizerBase

from vpae_jax.data.digits import MovingDigits
from vpae_jax.data.latents import LatentRecords
from vpae_jax.data.tokenizer import tokenize
from vpae_jax.types import Batch, CaptionedFrames, Condition, PixelBatch, UserError

# Batches that wait in memory: enough to hide the preparation, few enough for clips of any size.
READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


def pixel_batches(source: MovingDigits, batch_size: int, seed: int, workers: int = 0) -> grain.DatasetIterator:
    """Endless iterator of `PixelBatch`."""

    def load(clip: Any) -> Any:
        return {"video": clip["video"]}

    def finish(batch: Any) -> PixelBatch:
        return PixelBatch(video=jnp.asarray(to_float(batch["video"])))

    return _iterate(source, load, finish, batch_size, seed, workers)


def captioned_batches(
    source: MovingDigits, tokenizer: PreTrainedTokenizerBase, batch_size: int, seed: int, workers: int = 0
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

    return _iterate(source, load, finish, batch_size, seed, workers)


def latent_batches(records: LatentRecords, batch_size: int, seed: int, workers: int = 0) -> grain.DatasetIterator:
    """Endless iterator of `Batch`, in float32."""
    null_text = jnp.asarray(records.null_text, jnp.float32)
    null_mask = jnp.asarray(records.null_mask)

    def finish(batch: Any) -> Batch:
        value = {name: jnp.asarray(x, None if x.dtype == bool else jnp.float32) for name, x in batch.items()}
        condition = Condition(
            text=value["text"], text_mask=value["text_mask"], image=value.get("image"), frames=value.get("frames")
        )
        return Batch(latents=value["latents"], condition=condition, null_text=null_text, null_mask=null_mask)

    return _iterate(records, lambda record: record, finish, batch_size, seed, workers)


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
) -> grain.DatasetIterator:
    if not 1 <= batch_size <= len(source):
        raise UserError(f"batch size {batch_size} does not fit {len(source)} clips; lower it or render more clips")
    items = grain.MapDataset.source(source).shuffle(seed=seed).repeat().map(load)
    batches = items.batch(batch_size, drop_remainder=True).to_iter_dataset(READ)
    if workers > 0:
        batches = batches.mp_prefetch(MultiprocessingOptions(num_workers=workers))
    return iter(batches.map(finish))
