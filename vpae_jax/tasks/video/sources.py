"""The folders of records that a run trains on, and its held-out folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vpae_jax.config import DataConfig, parse_sources
from vpae_jax.data.index import REJECTS, common, has_clips, latent_shape, of_prompts, read_index
from vpae_jax.data.records import LatentRecords
from vpae_jax.data.stores import Address, Location
from vpae_jax.encoding.encoder import encode_into, fingerprint, too_long
from vpae_jax.encoding.manifest import Manifest
from vpae_jax.encoding.summary import rejected, report
from vpae_jax.encoding.videos import VideoClips
from vpae_jax.files import is_address, resolve
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.methods.base import Method
from vpae_jax.runtime.processes import broadcast_from_0, is_first, say
from vpae_jax.types import UserError

# Maximum number of clips per video in a folder that is encoded before a run.
RAW_CLIPS = 1000

Sources = tuple[tuple[LatentRecords, float], ...]


def open_sources(data: DataConfig, workdir: Path, pipeline: Pipeline, model: str) -> Sources:
    """Opens the folders of clips that a run trains on, each with its weight; if they are given as videos, encodes them
    first.

    Args:
      data: the data config.
      workdir: the run's folder.
      pipeline: the model whose encoders the clips must be encoded with.
      model: its name, for messages.

    Raises:
      UserError: a folder is missing or incomplete, was encoded with other encoders than the model's, or has arrays that
        these would not produce; or an object store cannot be read.
    """
    if data.videos:
        records = _encoded(data, workdir, pipeline)
        return ((records, float(len(records))),)
    return open_records(data.records, "config.data.records", workdir, pipeline, model)


def open_records(names: str, key: str, workdir: Path, pipeline: Pipeline, model: str) -> Sources:
    """Opens folders of records, "DIR,DIR" or "DIR=WEIGHT,...". Raises `UserError` as `open_sources`, naming `key`."""
    # Only in the first process: all have compared their models' files, and large encoders take long to read.
    found, expected = [], broadcast_from_0(f"encoders of {key}", fingerprint(pipeline) if is_first() else None)
    for name, weight in parse_sources(names):
        folder = _location(name, workdir)
        if weight is not None and isinstance(folder, Path) and not folder.exists():
            raise UserError(
                f"{key}: {folder}: no such folder (with weight {weight:g}); if the folder's name itself ends in "
                "=NUMBER, append a /"
            )
        records = LatentRecords(folder)
        if records.index["identity"].get("encoders") != expected:
            raise UserError(
                f"{key}: {records.folder} was encoded with other encoders than those of {model}; encode its clips "
                f"again with --model={model}"
            )
        if (wrong := _misfit(records, pipeline)) is not None:
            raise UserError(f"{key}: {folder}: {wrong}; encode its clips again with --model={model}")
        found.append((records, float(len(records)) if weight is None else weight))
    return tuple(found)


def _misfit(records: LatentRecords, pipeline: Pipeline) -> str | None:
    """Describes arrays of records that differ from what the model's encoders produce, whatever encoders the index
    names; None if all agree."""
    vae, tokens = pipeline.vae.config, pipeline.tokenizer.model_max_length
    made = {"text": [pipeline.text_encoder.config.d_model], "text_tokens": [tokens]}
    if pipeline.takes_image:
        made["frames"] = [vae.z_dim]
    if pipeline.image_encoder is not None:
        image = pipeline.image_encoder.config
        made["image"] = [image.num_tokens, image.hidden_size]
    for shard in records.index["shards"]:
        expected = made | {"latents" if has_clips(shard) else "latent_size": [vae.z_dim]}
        found = common(shard) | {"text_tokens": [records.index["text_tokens"]]}
        for name in sorted({*found, *expected}):
            if found.get(name) != expected.get(name):
                return f"its index gives {name} as {found.get(name)}, but the model's encoders {expected.get(name)}"
        f, h, w, _ = latents = list(latent_shape(shard))
        if (frames := shard["shapes"].get("frames", latents))[:-1] != latents[:-1]:
            return f"its frames have shape {frames}, but its latents {latents}"
        space = vae.scale_factor_spatial
        try:
            pipeline.latent_shape(1, 1 + (f - 1) * vae.scale_factor_temporal, h * space, w * space)
        except UserError as error:
            return f"its latents have shape {latents}, which the model cannot make ({error})"
    return None


def check_clips(data: DataConfig, workdir: Path, name: str, method: Method) -> None:
    """Raises `UserError` if some folders contain prompts alone and others clips, or if there are only prompts to train
    on and the method needs clips.

    Args:
      data: the data config.
      workdir: the run's folder.
      name: name of the phase.
      method: the method.
    """
    _of_prompts("held_out_records", data.held_out_records, workdir)
    prompts = _of_prompts("records", data.records, workdir)
    if not prompts or not method.needs_clips:
        return
    encoded = "encode videos, or clips that a teacher makes (python -m vpae_jax.encode --captions=...)"
    if method.without_clips is None:
        raise UserError(f"{name} trains on real clips, but {prompts[0]} contains prompts alone; {encoded}")
    keys = [
        f"--config.method.{key}={value}" for key, value in method.without_clips.items() if getattr(method, key) != value
    ]
    raise UserError(
        f"{name} trains on real clips with these settings, but {prompts[0]} contains prompts alone; set "
        f"{' '.join(keys)}, or {encoded}"
    )


def _of_prompts(key: str, names: str, workdir: Path) -> list[Location]:
    """Returns the folders if they contain prompts alone; none if they contain clips. Raises `UserError` for both."""
    folders = [_location(name, workdir) for name, _ in parse_sources(names)]
    prompts = [folder for folder in folders if of_prompts(read_index(folder))]
    if others := [folder for folder in folders if prompts and folder not in prompts]:
        raise UserError(
            f"config.data.{key}: {prompts[0]} contains prompts alone, but {others[0]} clips; give folders of one kind"
        )
    return prompts


def open_videos(data: DataConfig, workdir: Path) -> Manifest:
    """Opens the videos of a run. Raises `UserError` if the folder is missing or contains no usable videos."""
    return Manifest(resolve(data.videos, workdir), flag="--config.data.videos")


def digests(names: str, workdir: Path) -> tuple[str, ...]:
    """Returns a digest for each folder of records, "DIR,DIR" or "DIR=WEIGHT,...": a hash of its index, which contains
    the clips' checksums, and its weight. Raises `UserError` if a folder is missing or incomplete."""
    return tuple(
        f"{_digest(read_index(_location(name, workdir)))}{'' if weight is None else f' at weight {weight:g}'}"
        for name, weight in parse_sources(names)
    )


def _digest(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()[:16]


def _location(name: str, workdir: Path) -> Location:
    return Address(name) if is_address(name) else resolve(name, workdir)


def _encoded(data: DataConfig, workdir: Path, pipeline: Pipeline) -> LatentRecords:
    """Encodes clips of the model's own size from a folder of videos; each process encodes its share."""
    own, manifest = pipeline.defaults, open_videos(data, workdir)
    sizes, unfit = ((own.height, own.width),), partial(too_long, pipeline)
    with VideoClips(manifest, sizes, own.num_frames, own.fps, clips_per_video=RAW_CLIPS, unfit=unfit) as clips:
        # One at a time, since they may be large.
        folder = encode_into(resolve(data.folder, workdir), clips, pipeline, 1)
    records = LatentRecords(folder)
    if not len(records):
        kinds = rejected(records.index)
        raise UserError(f"config.data.videos: {data.videos} gives no usable clip ({kinds}); see {folder}/{REJECTS}")
    if is_first():
        for line in report(folder, records.index):
            say(line)
    return records
