"""What a run trains on: rendered digits, a folder of videos, or folders of latent records, as batches."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from jax.sharding import Mesh

from vpae_jax import sharding
from vpae_jax.config import Experiment
from vpae_jax.data.digits import MovingDigits
from vpae_jax.data.encoding import encode_into, fingerprint
from vpae_jax.data.manifest import Manifest
from vpae_jax.data.pipeline import captioned_batches, latent_batches, pixel_batches
from vpae_jax.data.reading import Batches
from vpae_jax.data.records import REJECTS, LatentRecords
from vpae_jax.data.source import InUnits, Source
from vpae_jax.data.stores import Address
from vpae_jax.data.videos import VideoClips
from vpae_jax.files import is_address
from vpae_jax.methods.base import Method
from vpae_jax.pipeline import Pipeline
from vpae_jax.processes import first_alone
from vpae_jax.types import UserError
from vpae_jax.weights import resolve

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
        batch_size = 1 if data.videos else DIGITS_AT_ONCE  # clips of videos may be large
        source = _raw(experiment, workdir, pipeline)
        encode = partial(encode_into, resolve(data.folder, workdir), source, pipeline, batch_size)
        records = LatentRecords(first_alone("encoded", encode))
        if not len(records):
            kinds = ", ".join(f"{count} {kind}" for kind, count in records.index["rejects"].items())
            raise UserError(
                f"config.data.videos: no clip of {data.videos} is used ({kinds}); see {records.folder}/{REJECTS}"
            )
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


def _raw(experiment: Experiment, workdir: Path, pipeline: Pipeline) -> Source:
    """Clips that are to be encoded: all that a folder of videos has of the model's own size, or rendered digits."""
    data, own = experiment.data, pipeline.defaults
    if not data.videos:
        return InUnits(MovingDigits("train", data.clips, data.seed))
    manifest = Manifest(resolve(data.videos, workdir))
    sizes = ((own.height, own.width),)
    return VideoClips(manifest, sizes, own.num_frames, own.fps, clips_per_video=RAW_CLIPS)


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
