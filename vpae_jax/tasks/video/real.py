"""Reconstructs the real clips behind records by decoding their latents with the VAE, and measures them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from vpae_jax.data.records import LatentRecords, Value
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.metrics.archive import Shelf
from vpae_jax.metrics.base import Clips
from vpae_jax.metrics.judge import FIRST_SIDE
from vpae_jax.metrics.measures import reduced
from vpae_jax.tasks.base import Measures, clips_at_once, in_batches, joined

Latents = Float[np.ndarray, "n f h w c"]
Measure = Callable[[Clips, Latents], Measures]


@dataclass(frozen=True)
class Captioned:
    """A held-out clip, or a prompt alone, from its record.

    Attributes:
      arrays: arrays of the record (`data.records.LatentRecords`).
      caption: its caption.
      origin: identifies the folder and the record.
      given: whether it is a prompt alone with a first frame.
      unseen: whether it is a prompt alone without a first frame.
    """

    arrays: dict[str, Value]
    caption: str
    origin: str
    given: bool = False
    unseen: bool = False


def captioned(records: LatentRecords, index: int) -> Captioned:
    """Reads a record. Raises `BadRecord` if it is damaged."""
    arrays, caption = records[index], records.about(index).get("caption", "")
    given = "frames" in arrays and bool(np.any(arrays["frames"]))
    origin = f"{records.index['fingerprint']} {index}"
    return Captioned(arrays, caption, origin, records.of_prompts and given, records.of_prompts and not given)


def latents_of(clips: Sequence[Captioned]) -> Latents:
    """Returns the latents of clips of one size, in float32."""
    return np.stack([clip.arrays["latents"] for clip in clips]).astype(np.float32)


def first_pictures(pipeline: Pipeline, prompts: Sequence[Captioned]) -> Measures:
    """Returns the given first frames, decoded by the VAE, in the form in which measurements of clips contain them."""
    found = []
    for prompt in prompts:
        latents = prompt.arrays["frames"][None, :1, ..., -pipeline.vae.config.z_dim :].astype(np.float32)
        found.append(reduced(np.asarray(pipeline.decode(jnp.asarray(latents))), side=FIRST_SIDE)[0, 0])
    return {"first": np.stack(found)}


def measured(
    pipeline: Pipeline, name: str, clips: Sequence[Captioned], measure: Measure, shelf: Shelf | None, shown: bool
) -> tuple[tuple[Path, ...], Measures]:
    """Measures clips of one size. Returns their files, if a shelf stores them, and the measurements.

    Args:
      name: name of the clips on the shelf.
      shown: whether the shelf also stores them as videos.
    """
    archive = None
    if shelf is not None:
        archive = shelf.archive(name, {"clips": [clip.origin for clip in clips]})
    left: Sequence[int] = range(len(clips)) if archive is None else archive.without_measures(range(len(clips)))
    found: list[Measures] = []
    for rows, filled in in_batches(len(left), clips_at_once(clips[0].arrays["latents"].shape)):
        wanted: list[Any] = [clips[left[row]] for row in filled]
        latents, count = latents_of(wanted), rows.stop - rows.start
        frames = np.asarray(pipeline.decode(jnp.asarray(latents)))[:count]
        some = measure(frames, latents[:count])
        if archive is None:
            found.append(some)
            continue
        for place in range(count):
            if shown:
                archive.keep_video(left[rows][place], frames[place], pipeline.defaults.fps)
            archive.keep(left[rows][place], {key: np.asarray(value[place]) for key, value in some.items()})
    if archive is None:
        return (), joined(found)
    kept = archive.all_measures(range(len(clips)))
    assert kept is not None  # decoding raises an error for clips that are not finite
    return tuple(archive.video(index) for index in range(len(clips))) if shown else (), kept
