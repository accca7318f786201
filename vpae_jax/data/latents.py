"""Clips that are encoded before a run trains on them (`data.records`)."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from vpae_jax.data.records import SCHEMA
from vpae_jax.data.units import Units, UnitWriter
from vpae_jax.types import Latents, Video

UNIT_CLIPS = 4096


@runtime_checkable
class Clips(Protocol):
    """A random-access source of captioned clips. Its `repr` says all that decides them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


@runtime_checkable
class Encoders(Protocol):
    """What of `vpae_jax.pipeline.Pipeline` is used here."""

    @property
    def vae(self) -> Any: ...
    @property
    def text_encoder(self) -> Any: ...
    @property
    def image_encoder(self) -> Any: ...
    @property
    def image_processor(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def takes_image(self) -> bool: ...
    def encode_prompt(self, prompts: Sequence[str]) -> Any: ...
    def condition(
        self, prompts: Sequence[str], pictures: Any, num_frames: int | None, height: int | None, width: int | None
    ) -> Any: ...


def encode_clips(clips: Clips, encoders: Encoders, root: Path, batch_size: int = 32) -> Path:
    """Encodes all clips into a folder of `root` that is named by clips and encoders, unless it is there already.

    The folder appears when it is complete and not before.

    Args:
      clips: items with `video` [t, height, width, 3] uint8 and `caption`; all else that is not an array is kept.
      encoders: a pipeline.
      root: where such folders are kept.
      batch_size: clips encoded at once.

    Returns:
      The folder.
    """
    identity = {"clips": repr(clips), "encoders": fingerprint(encoders)}
    named = repr((SCHEMA, sorted(identity.items())))
    folder = root / hashlib.sha256(named.encode()).hexdigest()[:16]
    if folder.exists():
        return folder
    partial_folder = root / f".{folder.name}.{os.getpid()}.partial"
    partial_folder.mkdir(parents=True)
    try:
        _write(clips, encoders, partial_folder, batch_size, identity)
        if not folder.exists():  # another process may have been faster
            partial_folder.rename(folder)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return folder


def fingerprint(encoders: Encoders) -> str:
    """16 hexadecimal digits of the encoders' configs and weights, the tokenizer's pieces and the image preparation."""
    digest = hashlib.sha256()
    models = (encoders.vae, encoders.text_encoder, encoders.image_encoder)
    for model in models:
        if model is None:
            continue
        digest.update(repr(model.config).encode())
        for path, value in jax.tree_util.tree_flatten_with_path(nnx.split(model, nnx.Param, ...)[1])[0]:
            host = np.asarray(value)
            digest.update(f"{jax.tree_util.keystr(path)} {host.dtype} {host.shape}".encode())
            digest.update(host.tobytes())
    tokenizer = encoders.tokenizer
    digest.update(repr((sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length)).encode())
    digest.update(repr(encoders.image_processor).encode())
    return digest.hexdigest()[:16]


def _write(clips: Clips, encoders: Encoders, folder: Path, batch_size: int, identity: Mapping[str, Any]) -> None:
    """Fills a new folder."""
    count = len(clips)
    text, mask = encoders.encode_prompt([""])
    units = Units(folder, identity, -(-count // UNIT_CLIPS))
    with _Progress(count) as progress:
        for unit in units.pending():
            with units.write(unit) as writer:
                first, last = unit * UNIT_CLIPS, min(count, (unit + 1) * UNIT_CLIPS)
                for start in range(first, last, batch_size):
                    items = [clips[i] for i in range(start, min(last, start + batch_size))]
                    _encode(items, encoders, batch_size, writer)
                    progress.advance(len(items))
    facts = {"text_tokens": int(mask.shape[1]), "takes_image": encoders.takes_image}
    units.finish({"text": np.asarray(text[0]), "text_mask": np.asarray(mask[0])}, facts)


def _encode(items: Sequence[Mapping[str, Any]], encoders: Encoders, batch_size: int, writer: UnitWriter) -> None:
    """Records of some clips. The batch is filled up to `batch_size`, so that one program serves all."""
    padded = [items[min(i, len(items) - 1)] for i in range(batch_size)]
    video = np.stack([item["video"] for item in padded])
    _, t, height, width, _ = video.shape
    pictures = video[:, 0] if encoders.takes_image else None
    latents = encode_video(encoders.vae, jnp.asarray(video.astype(np.float32) / 127.5 - 1))
    condition = encoders.condition([item["caption"] for item in padded], pictures, t, height, width)
    arrays = {"latents": latents, "text": condition.text, "image": condition.image, "frames": condition.frames}
    arrays = {name: np.asarray(value) for name, value in arrays.items() if value is not None}
    arrays["text_mask"] = np.asarray(condition.text_mask)
    for row, item in enumerate(items):
        about = {name: value for name, value in item.items() if not isinstance(value, np.ndarray)}
        writer.add(str(item["id"]), {name: value[row] for name, value in arrays.items()}, about)


def encode_video(vae: nnx.Module, video: Video) -> Latents:
    """`vae.encode`, compiled."""
    return _encode_video(*nnx.split(vae), video)


@partial(jax.jit, static_argnums=0)
def _encode_video(graph: nnx.GraphDef, weights: nnx.State, video: Video) -> Latents:
    return nnx.merge(graph, weights).encode(video)


class _Progress:
    """A bar on a terminal; in a log, a line at every tenth."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.bar = tqdm(total=total, desc="encoding clips", unit="clip") if sys.stderr.isatty() else None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, count: int) -> None:
        before, self.done = self.done, self.done + count
        if self.bar is not None:
            self.bar.update(count)
        elif 10 * before // self.total != 10 * self.done // self.total:
            print(f"encoded {self.done} of {self.total} clips", flush=True)
