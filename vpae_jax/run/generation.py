"""Clips that networks make for held-out conditions, from the same noise whatever the network."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from vpae_jax import sharding
from vpae_jax.flow.draws import normal
from vpae_jax.flow.sampler import Sampler
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.inference.samplers import Denoiser
from vpae_jax.metrics.base import Clips
from vpae_jax.runtime.processes import everywhere
from vpae_jax.tasks.base import HeldOut, Measures, Task, clips_at_once, in_batches, joined
from vpae_jax.types import Condition

SEED = 7


@dataclass(frozen=True)
class Made:
    """A batch of generated clips.

    Attributes:
      rows: of what was asked for.
      latents, clips: the clips, on the host.
      sampling_seconds, seconds: a clip, of the network alone and with the decoder.
    """

    rows: slice
    latents: Float[np.ndarray, "b f h w c"]
    clips: Clips
    sampling_seconds: float
    seconds: float


class Generation:
    """Fixed conditions and noise, to be turned into clips by different networks.

    Where these lie on the devices of several processes, all of them call it, and all get the clips.

    Args:
      pipeline: holds the decoder.
      held_out: what is asked for.
      batch: clips generated at once; by default as many as their size allows.
    """

    def __init__(self, pipeline: Pipeline, held_out: HeldOut, batch: int | None = None) -> None:
        self.pipeline, self.held_out = pipeline.without_encoders(), held_out
        self.batch = batch or clips_at_once(held_out.shape)

    def __call__(self, denoiser: Denoiser, sampler: Sampler) -> Clips:
        """All clips."""
        return np.concatenate([made.clips for made in self.batches(denoiser, sampler)])

    def batches(self, denoiser: Denoiser, sampler: Sampler) -> Iterator[Made]:
        """The clips as they are made, in order."""
        mesh = sharding.mesh_of(denoiser.weights)
        for rows, filled in in_batches(len(self.held_out), self.batch):
            count = rows.stop - rows.start
            start = time.perf_counter()
            latents = self._sample(denoiser, sampler, filled, mesh)
            sampled = time.perf_counter()
            # The decoder is each process's own.
            clips = np.asarray(self.pipeline.decode(jnp.asarray(latents)))
            seconds = np.array([sampled - start, time.perf_counter() - start]) / len(filled)
            yield Made(rows, latents[:count], clips[:count], *seconds.tolist())

    def _sample(
        self, denoiser: Denoiser, sampler: Sampler, rows: Any, mesh: Mesh | None
    ) -> Float[np.ndarray, "b f h w c"]:
        asked = self.held_out

        def chosen(value: np.ndarray) -> np.ndarray:
            value = value[rows]
            return value if value.dtype == bool else value.astype(np.float32)

        condition = jax.tree.map(chosen, asked.condition)
        seeds = jnp.asarray(np.array(asked.seeds)[rows])
        keys, fresh = (
            jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), seeds) for seed in (SEED, SEED + 1)
        )
        noise = normal(keys, (len(rows), *asked.shape))
        unconditional = self._unconditional(condition) if sampler.guidance > 1 else None
        inputs = sharding.beside((noise, condition, unconditional), mesh)
        latents = self.pipeline.sample(*inputs, sampler=sampler, key=fresh, denoiser=denoiser)
        return np.asarray(everywhere(latents))

    def _unconditional(self, condition: Condition) -> Condition:
        """The negative prompt with the same picture, as Wan guides."""
        asked = self.held_out
        return replace(
            condition,
            text=np.broadcast_to(np.float32(asked.null_text), condition.text.shape),
            text_mask=np.broadcast_to(asked.null_mask, condition.text_mask.shape),
        )


def measures_of(task: Task, held_out: HeldOut, made: Iterable[Made]) -> Measures | None:
    """What the task keeps of generated clips, measured one batch after the other; None if a latent is not finite."""
    measures, finite = [], True
    for one in made:
        finite = finite and bool(np.isfinite(one.latents).all())
        if finite:
            measures.append(task.measure(one.clips, one.latents, held_out.purpose))
    return joined(measures) if finite else None


def scores_of(task: Task, held_out: HeldOut, made: Iterable[Made]) -> Mapping[str, float]:
    """The task's scores of generated clips; none if a latent is not finite."""
    measures = measures_of(task, held_out, made)
    return {} if measures is None else task.scores(held_out, measures)
