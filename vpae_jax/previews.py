"""Clips sampled while training: teacher, generator and its average side by side, from the same noise.

Half of them are text-to-video and half image-to-video, for a model that does both. Prompts, pictures and noise are the
same at every interval, so that the pictures of a run can be flipped through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from vpae_jax import sharding
from vpae_jax.data.video import write_contact_sheet, write_video
from vpae_jax.pipeline import Pipeline
from vpae_jax.processes import everywhere
from vpae_jax.types import Condition, Params

Clips = UInt8[np.ndarray, "b t height width 3"]


@dataclass(frozen=True)
class Sampler:
    """How a network is sampled: evaluations, guidance and shift of its Euler solver."""

    steps: int
    guidance: float = 1.0
    shift: float = 1.0


class Generation:
    """Fixed conditions and noise, to be turned into clips by different weights.

    Where these lie on the devices of several processes, all of them call it, and all get the clips.

    Args:
      pipeline: encodes the conditions, holds the decoder.
      captions: one a clip.
      pictures: first frames of the clips, or None for text-to-video alone.
      given: which clips get their picture; the others are text-to-video.
      seed: decides the noise.
      batch: clips generated at once.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        captions: Sequence[str],
        pictures: UInt8[np.ndarray, "b height width 3"] | None,
        given: Sequence[bool],
        seed: int,
        batch: int = 64,
    ):
        self.pipeline, self.batch = pipeline.without_encoders(), batch
        condition = pipeline.condition(list(captions), pictures)
        if pictures is not None:
            condition = replace(condition, image=_keep(condition.image, given), frames=_keep(condition.frames, given))
        self.condition = condition
        text, mask = pipeline.encode_prompt([""])
        self.null_text, self.null_mask = text, mask
        self.noise = jax.random.normal(jax.random.key(seed), pipeline.latent_shape(len(captions)))

    def __call__(self, params: Params, sampler: Sampler) -> Clips:
        """Clips of these weights."""
        mesh = sharding.mesh_of(params)
        pipeline = self.pipeline.with_transformer(params, mesh)
        clips = []
        for start in range(0, len(self.noise), self.batch):
            part = slice(start, start + self.batch)
            condition = jax.tree.map(lambda x, part=part: x[part], self.condition)
            inputs = sharding.beside((self.noise[part], condition, self._unconditional(condition)), mesh)
            latents = pipeline.sample(
                *inputs,
                steps=sampler.steps,
                guidance=sampler.guidance,
                shift=sampler.shift,
            )
            here = jnp.asarray(np.asarray(everywhere(latents)))  # the decoder is each process's own
            clips.append(np.asarray(pipeline.decode(here)))
        return np.concatenate(clips)

    def _unconditional(self, condition: Condition) -> Condition:
        return replace(
            condition,
            text=jnp.broadcast_to(self.null_text, condition.text.shape),
            text_mask=jnp.broadcast_to(self.null_mask, condition.text_mask.shape),
        )


def write_previews(folder: Path, step: int, rows: Mapping[str, Clips], fps: float) -> Path:
    """Writes `step_000100.mp4` and `.png`: one row of clips for each entry; returns the png's path.

    The png shows each clip's first, middle and last frame.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"step_{step:06d}"
    stack = np.stack(list(rows.values()))
    r, b, t, h, w, _ = stack.shape
    video = stack.transpose(2, 0, 3, 1, 4, 5).reshape(t, r * h, b * w, 3)
    write_video(stem.with_suffix(".mp4"), video, fps)
    moments = stack[:, :, [0, t // 2, t - 1]].reshape(r * b * 3, h, w, 3)
    write_contact_sheet(stem.with_suffix(".png"), moments, columns=b * 3)
    return stem.with_suffix(".png")


def _keep(x: Float[Array, "b ..."] | None, given: Sequence[bool]) -> Float[Array, "b ..."] | None:
    if x is None:
        return None
    return x * jnp.asarray(given, x.dtype).reshape(-1, *[1] * (x.ndim - 1))
