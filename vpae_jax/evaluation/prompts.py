"""Evaluation on a user's own prompts, without real clips; they are encoded once, into the evaluation's folder."""

from __future__ import annotations

import time
from pathlib import Path

from vpae_jax.config import DataConfig
from vpae_jax.encoding.captions import Captions
from vpae_jax.encoding.encoder import fingerprint
from vpae_jax.encoding.pictures import Pictures
from vpae_jax.encoding.prompts import Sizes, describe, encode_prompts
from vpae_jax.encoding.units import Units
from vpae_jax.files import claimed
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.tasks.base import Task
from vpae_jax.tasks.video.task import Video
from vpae_jax.types import UserError

UNIT = 64  # prompts in a work unit
POLL = 1.0  # seconds between checks while another process encodes


def listed(file: Path, images: Path | None) -> Captions:
    """The prompts of a file, as `python -m vpae_jax.encode --prompts` reads them. Raises `UserError` if it has none."""
    pictures = None if images is None else Pictures(images, None)
    return Captions(file, unit=UNIT, flag="--prompts", pictures=pictures)


def task_of(prompts: Captions, folder: Path, pipeline: Pipeline, model: str) -> Task:
    """The task of generating clips for prompts, at the model's own size.

    Args:
      prompts: from `listed`.
      folder: where they are encoded, by whichever process comes first.
      pipeline: of the model, with its encoders.
      model: its name, for messages.

    Raises:
      UserError: first frames for a model that takes none, or prompts or images that cannot be used.
    """
    if prompts.pictures is not None and not pipeline.takes_image:
        raise UserError(f"--images: {model} is a text-to-video model; leave it out")
    own = pipeline.defaults
    sizes = Sizes(own.num_frames, ((own.height, own.width),))
    target = folder / fingerprint(pipeline)
    units = Units(target, describe(prompts, pipeline, sizes), prompts.units)
    while not units.complete():
        with claimed(target.with_suffix(".lock")) as ours:
            if ours:
                encode_prompts(prompts, pipeline, sizes, units)
        if not ours:
            time.sleep(POLL)
    return Video(DataConfig(records=str(target), held_out_records=str(target)), folder, model)
