"""Clips sampled while training: teacher, generator and its average side by side, from the same noise.

Half of them are text-to-video and half image-to-video, for a model that does both. Prompts, pictures and noise are the
same at every interval, so that the pictures of a run can be flipped through.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, UInt8

from vpae_jax import sharding
from vpae_jax.data.batches import latent_batches
from vpae_jax.flow.sampler import Sampler
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.media import write_contact_sheet, write_video
from vpae_jax.run.inputs import Sources
from vpae_jax.runtime.processes import everywhere
from vpae_jax.tasks.digits.clips import MovingDigits
from vpae_jax.types import Batch, Condition, Latents, Params, in_float32

Clips = UInt8[np.ndarray, "b t height width 3"]

CLIPS = 8
SEED = 7
# Clips of more latent points than these are large, and fewer are shown.
POINTS, LARGE_CLIPS = 4096, 2


class Generation:
    """Fixed conditions and noise, to be turned into clips by different weights.

    Where these lie on the devices of several processes, all of them call it, and all get the clips.

    Args:
      pipeline: holds the transformer's shapes and the decoder.
      condition: one a clip.
      null_text, null_mask: the negative prompt, one for all.
      shape: of the latents of one clip.
      seed: decides the noise.
      batch: clips generated at once.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        condition: Condition,
        null_text: Float[Array, "1 s d"],
        null_mask: Bool[Array, "1 s"],
        shape: tuple[int, ...],
        seed: int,
        batch: int = 64,
    ):
        self.pipeline, self.batch, self.condition = pipeline.without_encoders(), batch, condition
        self.null_text, self.null_mask = null_text, null_mask
        self.noise = jax.random.normal(jax.random.key(seed), (len(condition.text), *shape))

    @classmethod
    def of_prompts(
        cls,
        pipeline: Pipeline,
        captions: Sequence[str],
        pictures: UInt8[np.ndarray, "b height width 3"] | None,
        given: Sequence[bool],
        seed: int,
    ) -> Generation:
        """From what the pipeline's encoders make of captions and pictures, in clips of the model's own size.

        Args:
          pictures: first frames of the clips, or None for text-to-video alone.
          given: which clips get their picture; the others are text-to-video.
        """
        condition = pipeline.condition(list(captions), pictures)
        if pictures is not None:
            condition = replace(condition, image=_keep(condition.image, given), frames=_keep(condition.frames, given))
        null_text, null_mask = pipeline.encode_prompt([pipeline.defaults.negative_prompt])
        return cls(pipeline, condition, null_text, null_mask, pipeline.latent_shape(1)[1:], seed)

    @classmethod
    def of_batch(cls, pipeline: Pipeline, batch: Batch, seed: int) -> Generation:
        """From the conditions of encoded clips; one at a time, since such clips may be large."""
        null_text, null_mask = batch.null_text[None], batch.null_mask[None]
        return cls(pipeline, batch.condition, null_text, null_mask, batch.latents.shape[1:], seed, batch=1)

    def __call__(self, params: Params, sampler: Sampler) -> Clips:
        """Clips of these weights."""
        mesh = sharding.mesh_of(params)
        pipeline = self.pipeline.with_transformer(params, mesh)
        clips = []
        for start in range(0, len(self.noise), self.batch):
            part = slice(start, start + self.batch)
            condition = jax.tree.map(lambda x, part=part: x[part], self.condition)
            inputs = sharding.beside((self.noise[part], condition, self._unconditional(condition)), mesh)
            latents = pipeline.sample(*inputs, sampler=sampler)
            clips.append(self.decode(latents))
        return np.concatenate(clips)

    def decode(self, latents: Latents) -> Clips:
        """Pixels of latents; the decoder is each process's own."""
        here = jnp.asarray(np.asarray(everywhere(latents)))
        parts = [self.pipeline.decode(here[i : i + self.batch]) for i in range(0, len(here), self.batch)]
        return np.concatenate([np.asarray(part) for part in parts])

    def _unconditional(self, condition: Condition) -> Condition:
        return replace(
            condition,
            text=jnp.broadcast_to(self.null_text, condition.text.shape),
            text_mask=jnp.broadcast_to(self.null_mask, condition.text_mask.shape),
        )


def preview_of_digits(pipeline: Pipeline) -> tuple[Clips, Generation]:
    """Held-out clips, and what is generated for their captions; half of them with the first frame where the model takes
    one."""
    clips = MovingDigits("eval", CLIPS, SEED)
    items = [clips[i] for i in range(CLIPS)]
    videos = np.stack([item["video"] for item in items])
    pictures = videos[:, 0] if pipeline.takes_image else None
    given = [i >= CLIPS // 2 for i in range(CLIPS)]
    captions = [item["caption"] for item in items]
    return videos, Generation.of_prompts(pipeline, captions, pictures, given, SEED)


def preview_of_records(pipeline: Pipeline, records: Sources) -> tuple[Clips, Generation]:
    """Some clips that are trained on, as they are decoded, and what is generated for their conditions."""
    shapes = [shape for source, _ in records for shape in source.shapes]
    count = CLIPS if max(math.prod(shape[:3]) for shape in shapes) <= POINTS else LARGE_CLIPS
    batches = latent_batches(records, min(count, sum(len(source) for source, _ in records)), SEED)
    batch = in_float32(next(batches))
    batches.close()
    generation = Generation.of_batch(pipeline, batch, SEED)
    return generation.decode(batch.latents), generation


def write_previews(folder: Path, step: int, rows: Mapping[str, Clips], fps: float) -> Path:
    """Writes `step_000100.mp4` and `.png`: one row of clips for each entry; returns the png's path.

    The png shows each clip's first, middle and last frame.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"step_{step:06d}"
    stack = np.stack(list(rows.values()))
    _, b, t, _, _, _ = stack.shape
    write_video(stem.with_suffix(".mp4"), rearrange(stack, "row b t h w c -> t (row h) (b w) c"), fps)
    moments = rearrange(stack[:, :, [0, t // 2, t - 1]], "row b t h w c -> (row b t) h w c")
    write_contact_sheet(stem.with_suffix(".png"), moments, columns=b * 3)
    return stem.with_suffix(".png")


def _keep(x: Float[Array, "b ..."] | None, given: Sequence[bool]) -> Float[Array, "b ..."] | None:
    if x is None:
        return None
    return x * jnp.asarray(given, x.dtype).reshape(-1, *[1] * (x.ndim - 1))
