"""Batches of encoded clips, and the iterator from which other kinds of batches are made.

An iterator is endless, reshuffled in every epoch and reproducible from its seed. It has `get_state` and `set_state`, so
that a resumed run continues exactly after the batches already seen. Items are prepared in threads or in processes
(`data.loader`). Batches are numpy arrays; `sharding.put_rows` moves them to the devices, each byte once.

Batches are successive rows of one endless order of clips (`data.order`), regardless of who reads them. Of several
processes, each prepares some clips of every batch (`rows`). A position is a number of batches, so it is valid for any
number of processes and workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from vpae_jax.data.index import common
from vpae_jax.data.loader import Batches, RecordsOf
from vpae_jax.data.order import ClipStream, Order, held_out
from vpae_jax.data.records import LatentRecords, LatentShape
from vpae_jax.types import Batch, Condition, UserError

# Which clips of each batch are prepared here, in order; None for all.
OwnRows = Sequence[int] | None
# Maximum relative difference of two negative prompts from the same text encoder, which differ only by rounding.
SAME_PROMPT = 0.1


def latent_batches(
    sources: Sequence[tuple[LatentRecords, float]],
    batch_size: int,
    seed: int,
    workers: int = 0,
    rows: OwnRows = None,
    max_bad: float = 0.01,
    most_held_out: int = 0,
    seeds: bool = False,
) -> Batches:
    """Returns an endless iterator of `Batch`, in bfloat16 like the records. All clips of a batch have latents of one
    shape. Batches of prompts alone have no latents.

    Args:
      sources: folders of records, each with its weight: the relative share of clips that come from it (the folder's
        size, to see all clips equally often). Within a source, shapes are drawn in proportion to their clips.
      batch_size: clips per batch, over all processes.
      seed: determines the order.
      workers: processes that read; 0 reads in threads.
      rows: which clips of each batch are read here, in order; None for all.
      max_bad: maximum tolerated fraction of corrupt records; each is replaced by another of its source and shape.
      most_held_out: maximum number of clips of each source that are left out (`data.order.held_out`).
      seeds: whether batches contain the seeds of their clips' noise; all sources must then be a teacher's clips.

    Raises:
      UserError: there are fewer clips than a batch needs, or sources that do not fit together.
    """
    first = sources[0][0]
    for records, weight in sources:
        _check_source(records, weight, first)
        if seeds and not records.from_teacher:
            raise UserError(
                f"{records.folder}: the noise of its clips is not known, since no teacher made them; give only folders "
                "made by `python -m vpae_jax.encode --captions=...`"
            )
    buckets: dict[LatentShape, list[ClipStream]] = {}
    named = []
    for number, (records, weight) in enumerate(sources):
        left_out = held_out(len(records), most_held_out)
        trained = len(records) - len(left_out)
        for shape, clips in records.shapes.items():
            if len(kept := np.setdiff1d(clips, left_out)):
                buckets.setdefault(shape, []).append(ClipStream(number, kept, weight * len(kept) / trained))
        named.append(f"{trained} of {len(records)} clips of {records.index['fingerprint']} at weight {weight:g}")
    load = RecordsOf(tuple(records for records, _ in sources), seeds)

    def finish(batch: Any) -> Batch:
        condition = Condition(
            text=batch["text"], text_mask=batch["text_mask"], image=batch.get("image"), frames=batch.get("frames")
        )
        null = {"null_text": first.null_text, "null_mask": first.null_mask}
        size = tuple(batch["size"][0].tolist()) if "size" in batch else None
        return Batch(batch.get("latents"), condition, **null, seed=batch.get("seed"), size=size)

    parts = [parts for _, parts in sorted(buckets.items())]
    return iterate(parts, load, finish, " and ".join(named), batch_size, seed, workers, rows, max_bad)


def _check_source(records: LatentRecords, weight: float, first: LatentRecords) -> None:
    """Raises `UserError` for a source without clips or weight, or one that was encoded differently from the first."""
    if not len(records):
        raise UserError(f"{records.folder} contains no clips, only rejects (see rejects.jsonl); leave it out")
    if not weight > 0:
        raise UserError(f"{records.folder} has weight {weight}, expected more than 0; leave it out instead")
    kinds = [common(one.index["shards"][0]) | {"text_tokens": [one.index["text_tokens"]]} for one in (first, records)]
    for name in sorted({*kinds[0], *kinds[1]}):
        if kinds[0].get(name) != kinds[1].get(name):
            raise UserError(
                f"{records.folder} and {first.folder} do not fit together: {name} is {kinds[1].get(name)} and "
                f"{kinds[0].get(name)}, respectively; encode both with the same model"
            )
    given, expected = np.float32(records.null_text), np.float32(first.null_text)
    if np.linalg.norm(given - expected) > SAME_PROMPT * np.linalg.norm(expected):
        raise UserError(
            f"{records.folder} and {first.folder} have different text encoders; encode both with the same model"
        )


def to_float(pixels: UInt8[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Converts pixels in 0..255 to float32 in [-1, 1]."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def iterate(
    buckets: Sequence[Sequence[ClipStream]],
    load: Callable[[int, int], Any],
    finish: Callable[[Any], Any],
    data: str,
    batch_size: int,
    seed: int,
    workers: int,
    rows: OwnRows,
    max_bad: float = 0.0,
) -> Batches:
    """Returns an endless iterator of batches.

    Args:
      buckets: the clips, by shape; all clips of a batch come from one bucket.
      load: reads one clip, given the number of its source and its number in the source.
      finish: makes a batch from the clips' arrays.
      data: describes the clips, to check that a checkpoint's position belongs to the same data.
      batch_size, seed, workers, rows, max_bad: see `latent_batches`.

    Raises:
      UserError: there are fewer clips than a batch needs.
    """
    clips = sum(len(part.clips) for parts in buckets for part in parts)
    if not 1 <= batch_size <= clips:
        raise UserError(
            f"config.batch_size is {batch_size}, but there are {clips} clips to train on; lower it, or use more clips"
        )
    own = range(batch_size) if rows is None else rows
    data = f"batches of {batch_size} from {data}, seed {seed}"
    return Batches(Order(buckets, batch_size, seed), load, finish, own, workers, max_bad, data)
