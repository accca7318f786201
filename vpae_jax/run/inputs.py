"""What a run trains on: rendered digits, a folder of videos, or folders of latent records, as batches."""

from __future__ import annotations

from pathlib import Path

import jax
from jax.sharding import Mesh

from vpae_jax import sharding
from vpae_jax.config import Experiment
from vpae_jax.data.batches import latent_batches
from vpae_jax.data.loader import Batches
from vpae_jax.data.records import REJECTS, LatentRecords
from vpae_jax.data.stores import Address
from vpae_jax.encoding.clip_source import InUnits
from vpae_jax.encoding.encoder import encode_into, fingerprint
from vpae_jax.encoding.manifest import Manifest
from vpae_jax.encoding.summary import rejected, report
from vpae_jax.encoding.videos import VideoClips
from vpae_jax.files import is_address
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.methods.base import Method
from vpae_jax.run.first_weights import resolve
from vpae_jax.runtime.processes import is_first, say, wait_for_all
from vpae_jax.tasks.digits.batches import captioned_batches, pixel_batches
from vpae_jax.tasks.digits.clips import MovingDigits
from vpae_jax.types import UserError

# Of one video of a folder that is encoded before a run, at most.
RAW_CLIPS = 1000
DIGITS_AT_ONCE = 32

Sources = tuple[tuple[LatentRecords, float], ...]


def renders(experiment: Experiment) -> bool:
    """Whether the run's clips are rendered digits."""
    return not experiment.data.records and not experiment.data.videos


def open_records(experiment: Experiment, workdir: Path, pipeline: Pipeline) -> Sources:
    """The encoded clips that the run trains on, each folder with its weight; encodes them first where they are given as
    videos or rendered.

    Raises:
      UserError: a folder that is missing, not complete, or was encoded with other encoders than the model's; an object
        store that cannot be read.
    """
    data = experiment.data
    if not data.sources:
        records = _encoded(experiment, workdir, pipeline)
        return ((records, float(len(records))),)
    found, expected = [], fingerprint(pipeline)
    for name, weight in data.sources:
        records = LatentRecords(Address(name) if is_address(name) else resolve(name, workdir))
        if records.index["identity"]["encoders"] != expected:
            raise UserError(
                f"config.data.records: {records.folder} was encoded with other encoders than those of "
                f"{experiment.model.path}; encode its clips again with --model={experiment.model.path}"
            )
        found.append((records, float(len(records)) if weight is None else weight))
    return tuple(found)


def _encoded(experiment: Experiment, workdir: Path, pipeline: Pipeline) -> LatentRecords:
    """Clips that are encoded before the run, of which each process does its share: those of a folder of videos, of the
    model's own size, or rendered digits."""
    data, own = experiment.data, pipeline.defaults
    here = jax.process_index(), jax.process_count()
    root = resolve(data.folder, workdir)
    if data.videos:
        manifest = Manifest(resolve(data.videos, workdir))
        sizes = ((own.height, own.width),)
        with VideoClips(manifest, sizes, own.num_frames, own.fps, clips_per_video=RAW_CLIPS) as clips:
            folder = encode_into(root, clips, pipeline, 1, *here)  # one at a time, since they may be large
    else:
        digits = InUnits(MovingDigits("train", data.clips, data.seed))
        folder = encode_into(root, digits, pipeline, DIGITS_AT_ONCE, *here)
    wait_for_all("encoded")
    records = LatentRecords(folder)
    if not len(records):
        kinds = rejected(records.index)
        raise UserError(f"config.data.videos: no clip of {data.videos} is used ({kinds}); see {folder}/{REJECTS}")
    if data.videos and is_first():
        for line in report(folder, records.index):
            say(line)
    return records


def make_batches(
    experiment: Experiment, method: Method, pipeline: Pipeline | None, mesh: Mesh, records: Sources
) -> Batches:
    """This process's part of the batches that the method trains on."""
    data = experiment.data
    how = (experiment.batch_size, experiment.seed, data.workers, sharding.own_rows(mesh, experiment.batch_size))
    if records:
        return latent_batches(records, *how, data.max_bad)
    clips = MovingDigits("train", data.clips, data.seed)
    if pipeline is None:
        return pixel_batches(clips, *how)
    return captioned_batches(clips, pipeline.tokenizer, *how)
