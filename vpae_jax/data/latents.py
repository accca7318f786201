"""Encoded clips on disk: what a distillation trains on, computed once.

A folder of records holds

    index.json                          schema, count, shapes, where the clips came from, fingerprint, checksums
    null.safetensors                    text states and mask of the negative prompt
    clips-00000-of-00005.array_record   one record a clip, in safetensors format: latents, text states and mask, and
                                        for image-to-video image states and the condition frames; in float16
"""

from __future__ import annotations

import hashlib
import json
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
import safetensors.numpy
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from flax import nnx
from jaxtyping import Array, Float
from tqdm import tqdm

from vpae_jax.types import Latents, UserError, Video

SCHEMA = 1
INDEX, NULL = "index.json", "null.safetensors"
SHARD_CLIPS = 4096


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


class LatentRecords:
    """Random-access source over a folder of encoded clips.

    Item i is a dict of numpy arrays: `latents` [f, h, w, c], `text` [s, d] (zero beyond the prompt's end), `text_mask`
    [s], and for image-to-video `image` [n, e] and `frames` [f, h, w, 4 + c].

    Raises:
      UserError: no such folder, another schema, or a shard that is missing or cut short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)
        for shard in self.index["shards"]:
            path = folder / shard["file"]
            size = path.stat().st_size if path.is_file() else 0
            if size != shard["bytes"]:
                raise UserError(f"{path} has {size} bytes, expected {shard['bytes']}; remove {folder} and encode again")
        self._records = ArrayRecordDataSource([str(folder / shard["file"]) for shard in self.index["shards"]])
        null = safetensors.numpy.load_file(folder / NULL)
        self.null_text, self.null_mask = null["text"], null["text_mask"]

    def __len__(self) -> int:
        return int(self.index["count"])

    def __repr__(self) -> str:
        return f"LatentRecords({str(self.folder)!r}, fingerprint={self.index['fingerprint']})"

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        record = safetensors.numpy.load(self._records[index])
        del record["about"]
        text = np.zeros((self.index["text_tokens"], record["text"].shape[-1]), record["text"].dtype)
        mask = np.zeros(self.index["text_tokens"], bool)
        text[: len(record["text"])], mask[: len(record["text"])] = record["text"], True
        return {**record, "text": text, "text_mask": mask}

    def about(self, index: int) -> dict[str, Any]:
        """What else is known of a clip: its caption and id, a digit's class and direction."""
        return json.loads(safetensors.numpy.load(self._records[index])["about"].tobytes())

    def verify(self) -> None:
        """Reads every shard and compares checksums. Raises `UserError` for one that was damaged."""
        for shard in self.index["shards"]:
            if _sha256(self.folder / shard["file"]) != shard["sha256"]:
                raise UserError(f"{self.folder / shard['file']} is damaged; remove {self.folder} and encode again")


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
    identity = {"schema": SCHEMA, "clips": repr(clips), "encoders": fingerprint(encoders)}
    identity["fingerprint"] = hashlib.sha256(repr(sorted(identity.items())).encode()).hexdigest()[:16]
    folder = root / str(identity["fingerprint"])
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


def read_index(folder: Path) -> dict[str, Any]:
    """A record folder's index. Raises `UserError` when there is none, or one of another schema."""
    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"{folder} holds no encoded clips ({INDEX} is missing); remove it or choose another folder")
    index = json.loads(path.read_text())
    if index.get("schema") != SCHEMA:
        raise UserError(f"{path}: schema {index.get('schema')}, expected {SCHEMA}; remove {folder} and encode again")
    return index


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
    """Fills a new folder: shards, the negative prompt, the index last."""
    count = len(clips)
    text, mask = encoders.encode_prompt([""])
    null = {"text": _half(text[0], "the negative prompt"), "text_mask": np.asarray(mask[0])}
    safetensors.numpy.save_file(null, folder / NULL)
    total = -(-count // SHARD_CLIPS)
    shards, shape = [], ()
    with _Progress(count) as progress:
        for number in range(total):
            file = f"clips-{number:05d}-of-{total:05d}.array_record"
            writer = ArrayRecordWriter(str(folder / file), "group_size:1")
            first, last = number * SHARD_CLIPS, min(count, (number + 1) * SHARD_CLIPS)
            for start in range(first, last, batch_size):
                items = [clips[i] for i in range(start, min(last, start + batch_size))]
                records = _encode(items, encoders, batch_size)
                shape = records[0]["latents"].shape
                for record in records:
                    writer.write(safetensors.numpy.save(record))
                progress.advance(len(items))
            writer.close()
            path = folder / file
            shards.append({"file": file, "clips": last - first, "bytes": path.stat().st_size, "sha256": _sha256(path)})
    index = {
        **identity,
        "count": count,
        "latents": shape,
        "text_tokens": int(mask.shape[1]),
        "takes_image": encoders.takes_image,
        "shards": shards,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _encode(items: Sequence[Mapping[str, Any]], encoders: Encoders, batch_size: int) -> list[dict[str, np.ndarray]]:
    """Records of some clips. The batch is filled up to `batch_size`, so that one program serves all."""
    padded = [items[min(i, len(items) - 1)] for i in range(batch_size)]
    video = np.stack([item["video"] for item in padded])
    _, t, height, width, _ = video.shape
    pictures = video[:, 0] if encoders.takes_image else None
    latents = encode_video(encoders.vae, jnp.asarray(video.astype(np.float32) / 127.5 - 1))
    condition = encoders.condition([item["caption"] for item in padded], pictures, t, height, width)
    arrays = {"latents": latents, "text": condition.text, "image": condition.image, "frames": condition.frames}
    arrays = {name: np.asarray(value) for name, value in arrays.items() if value is not None}
    mask = np.asarray(condition.text_mask)
    records = []
    for row, item in enumerate(items):
        record = {name: value[row] for name, value in arrays.items()}
        record["text"] = record["text"][: int(mask[row].sum())]
        record = {name: _half(value, item["caption"]) for name, value in record.items()}
        about = {name: value for name, value in item.items() if not isinstance(value, np.ndarray)}
        record["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        records.append(record)
    return records


def encode_video(vae: nnx.Module, video: Video) -> Latents:
    """`vae.encode`, compiled."""
    return _encode_video(*nnx.split(vae), video)


@partial(jax.jit, static_argnums=0)
def _encode_video(graph: nnx.GraphDef, weights: nnx.State, video: Video) -> Latents:
    return nnx.merge(graph, weights).encode(video)


def _half(values: Float[np.ndarray, "..."] | Float[Array, "..."], name: str) -> Float[np.ndarray, "..."]:
    """As float16. Raises `UserError` for values that it cannot hold."""
    full = np.asarray(values, np.float32)
    if not np.abs(full).max() <= np.finfo(np.float16).max:  # so written, it is true of NaN too
        raise UserError(f"clip {name!r} has encoded values that are not finite in float16; check the encoders' weights")
    return np.ascontiguousarray(full, np.float16)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
