"""The folders of records that a run trains on, and those of their clips that it never sees."""

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
from vpae_jax.runtime.processes import as_first_says, is_first, say
from vpae_jax.types import UserError

# Of one video of a folder that is encoded before a run, at most.
RAW_CLIPS = 1000

Sources = tuple[tuple[LatentRecords, float], ...]


def open_sources(data: DataConfig, workdir: Path, pipeline: Pipeline, model: str) -> Sources:
    """The clips that a run trains on, each folder with its weight; encodes them first where they are given as videos.

    Args:
      data: where they lie.
      workdir: of the run.
      pipeline: the model whose encoders the clips are to be encoded with.
      model: its name, for messages.

    Raises:
      UserError: a folder that is missing, not complete, was encoded with other encoders than the model's, or has arrays
        that these do not make; an object store that cannot be read.
    """
    if data.videos:
        records = _encoded(data, workdir, pipeline)
        return ((records, float(len(records))),)
    return open_records(data.records, "config.data.records", workdir, pipeline, model)


def open_records(names: str, key: str, workdir: Path, pipeline: Pipeline, model: str) -> Sources:
    """Folders of records, "DIR,DIR" or "DIR=WEIGHT,...". Raises `UserError` as `open_sources`, naming `key`."""
    # Once for all processes: they have compared their models' files, and large encoders take long to read.
    found, expected = [], as_first_says(f"encoders of {key}", fingerprint(pipeline) if is_first() else None)
    for name, weight in parse_sources(names):
        folder = _location(name, workdir)
        if weight is not None and isinstance(folder, Path) and not folder.exists():
            raise UserError(
                f"{key}: {folder}: no such folder, of which {weight:g} would be the weight; where a folder's name ends "
                "in =NUMBER, end it in /"
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
    """Which arrays of records are not as the model's encoders make them, whatever the records say of their encoders;
    None if all are."""
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
                return f"its {name} are of {found.get(name)}, those of the model's encoders of {expected.get(name)}"
        f, h, w, _ = latents = list(latent_shape(shard))
        if (frames := shard["shapes"].get("frames", latents))[:-1] != latents[:-1]:
            return f"its frames are of {frames}, its latents of {latents}"
        space = vae.scale_factor_spatial
        try:
            pipeline.latent_shape(1, 1 + (f - 1) * vae.scale_factor_temporal, h * space, w * space)
        except UserError as error:
            return f"its latents are of {latents}, which the model does not make ({error})"
    return None


def check_clips(data: DataConfig, workdir: Path, name: str, method: Method) -> None:
    """Raises `UserError` for folders of which some hold prompts alone and some clips, or for prompts alone to train on
    where a method needs clips.

    Args:
      data: where the folders are.
      workdir: of the run.
      name: of the phase.
      method: what is trained.
    """
    _of_prompts("held_out_records", data.held_out_records, workdir)
    prompts = _of_prompts("records", data.records, workdir)
    if not prompts or not method.needs_clips:
        return
    encoded = "encode videos, or clips that a teacher makes (python -m vpae_jax.encode --captions=...)"
    if method.without_clips is None:
        raise UserError(f"{name} trains on real clips, but {prompts[0]} holds prompts alone; {encoded}")
    keys = [
        f"--config.method.{key}={value}" for key, value in method.without_clips.items() if getattr(method, key) != value
    ]
    raise UserError(
        f"{name} trains on real clips as it is set, but {prompts[0]} holds prompts alone; set {' '.join(keys)}, "
        f"or {encoded}"
    )


def _of_prompts(key: str, names: str, workdir: Path) -> list[Location]:
    """The folders, if they hold prompts alone; none, if they hold clips. Raises `UserError` for both."""
    folders = [_location(name, workdir) for name, _ in parse_sources(names)]
    prompts = [folder for folder in folders if of_prompts(read_index(folder))]
    if others := [folder for folder in folders if prompts and folder not in prompts]:
        raise UserError(
            f"config.data.{key}: {prompts[0]} holds prompts alone and {others[0]} clips; give folders of one kind"
        )
    return prompts


def open_videos(data: DataConfig, workdir: Path) -> Manifest:
    """The videos of a run. Raises `UserError` for a folder that is missing, or holds none that can be listed."""
    return Manifest(resolve(data.videos, workdir), flag="--config.data.videos")


def digests(names: str, workdir: Path) -> tuple[str, ...]:
    """Of each of the folders of records, "DIR,DIR" or "DIR=WEIGHT,...", a digest of its index, which has the clips'
    checksums, and its weight. Raises `UserError` for a folder that is missing, or not complete."""
    return tuple(
        f"{_digest(read_index(_location(name, workdir)))}{'' if weight is None else f' at weight {weight:g}'}"
        for name, weight in parse_sources(names)
    )


def _digest(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()[:16]


def _location(name: str, workdir: Path) -> Location:
    return Address(name) if is_address(name) else resolve(name, workdir)


def _encoded(data: DataConfig, workdir: Path, pipeline: Pipeline) -> LatentRecords:
    """Clips of the model's own size from a folder of videos, of which each process encodes its share."""
    own, manifest = pipeline.defaults, open_videos(data, workdir)
    sizes, unfit = ((own.height, own.width),), partial(too_long, pipeline)
    with VideoClips(manifest, sizes, own.num_frames, own.fps, clips_per_video=RAW_CLIPS, unfit=unfit) as clips:
        # One at a time, since they may be large.
        folder = encode_into(resolve(data.folder, workdir), clips, pipeline, 1)
    records = LatentRecords(folder)
    if not len(records):
        kinds = rejected(records.index)
        raise UserError(f"config.data.videos: no clip of {data.videos} is used ({kinds}); see {folder}/{REJECTS}")
    if is_first():
        for line in report(folder, records.index):
            say(line)
    return records
