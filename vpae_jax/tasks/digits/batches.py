"""Batches of rendered digits, on which the embedded model's autoencoder and encoders are trained."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from vpae_jax.data.batches import OwnRows, iterate, to_float
from vpae_jax.data.loader import Batches
from vpae_jax.data.order import ClipStream
from vpae_jax.inference.tokenizer import PreTrainedTokenizerBase, tokenize
from vpae_jax.tasks.digits.clips import MovingDigits
from vpae_jax.types import CaptionedFrames, PixelBatch


@dataclass(frozen=True)
class _Pixels:
    """Loads a clip's video."""

    clips: Any

    def __call__(self, _: int, clip: int) -> Any:
        return {"video": self.clips[clip]["video"]}


@dataclass(frozen=True)
class _Frames:
    """Loads a clip's first and last frame, and the tokens of its caption."""

    clips: Any
    tokenizer: PreTrainedTokenizerBase

    def __call__(self, _: int, clip: int) -> Any:
        item = self.clips[clip]
        ids, mask = tokenize(self.tokenizer, [item["caption"]])
        return {"first": item["video"][0], "last": item["video"][-1], "ids": ids[0], "mask": mask[0]}


def pixel_batches(source: MovingDigits, batch_size: int, seed: int, workers: int = 0, rows: OwnRows = None) -> Batches:
    """Returns an endless iterator of `PixelBatch`."""

    def finish(batch: Any) -> PixelBatch:
        return PixelBatch(video=to_float(batch["video"]))

    return iterate(_whole(source), _Pixels(source), finish, _named(source), batch_size, seed, workers, rows)


def captioned_batches(
    source: MovingDigits,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    seed: int,
    workers: int = 0,
    rows: OwnRows = None,
) -> Batches:
    """Returns an endless iterator of `CaptionedFrames`: each clip's first and last frame, and its caption's tokens."""

    def finish(batch: Any) -> CaptionedFrames:
        return CaptionedFrames(
            first=to_float(batch["first"]),
            last=to_float(batch["last"]),
            ids=batch["ids"],
            mask=batch["mask"],
        )

    return iterate(_whole(source), _Frames(source, tokenizer), finish, _named(source), batch_size, seed, workers, rows)


def _named(source: MovingDigits) -> str:
    """Describes the clips of a source, to identify the data in a checkpoint."""
    return json.dumps(source.identity)


def _whole(source: Any) -> list[list[ClipStream]]:
    """Returns all clips of a source as one bucket."""
    return [[ClipStream(0, np.arange(len(source)), 1.0)]]
