"""Clips that networks make for held-out conditions, from the same noise whatever the network."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from vpae_jax import sharding
from vpae_jax.flow.draws import normal
from vpae_jax.flow.sampler import Sampler
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.inference.samplers import Denoiser, check_finite
from vpae_jax.metrics.base import Clips
from vpae_jax.runtime.processes import everywhere
from vpae_jax.tasks.base import HeldOut, Measures, Task, clips_at_once, in_batches, joined
from vpae_jax.types import Condition

SEED = 7
# What the seconds of a batch go into: the network's evaluations, the decoder, and fetching latents and clips.
SECONDS = ("network", "decode", "transfer")


@dataclass(frozen=True)
class Made:
    """A batch of generated clips.

    Attributes:
      rows: which of what was asked for.
      latents: of the clips, on the host.
      clips: None where the latents are not finite.
      seconds: a clip, by what was done (`SECONDS`).
    """

    rows: Int[np.ndarray, "b"]
    latents: Float[np.ndarray, "b f h w c"]
    clips: Clips | None
    seconds: Mapping[str, float]


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
        """All clips. Raises `UserError` for some that are not finite."""
        made = [one.clips for one in self.batches(denoiser, sampler)]
        clips = [one for one in made if one is not None]
        check_finite(jnp.array(len(clips) == len(made)))
        return np.concatenate(clips)

    def batches(self, denoiser: Denoiser, sampler: Sampler, rows: Sequence[int] | None = None) -> Iterator[Made]:
        """The clips as they are made, in order; of all rows by default."""
        mesh = sharding.mesh_of(denoiser.weights)
        if mesh is not None and mesh.size > 1:  # the decoder comes to lie where the network does
            self.pipeline = self.pipeline.over(mesh)
        wanted = np.arange(len(self.held_out)) if rows is None else np.array(rows, int)
        for some, filled in in_batches(len(wanted), self.batch):
            count = some.stop - some.start
            start = time.perf_counter()
            made = jax.block_until_ready(self._sample(denoiser, sampler, wanted[filled], mesh))
            sampled = time.perf_counter()
            latents = np.asarray(made)
            moved = time.perf_counter()
            clips, seconds = decoded(self.pipeline, latents, mesh)
            seconds = {"network": sampled - start, **seconds}
            seconds["transfer"] += moved - sampled
            each = {name: value / len(filled) for name, value in seconds.items()}
            yield Made(wanted[some], latents[:count], None if clips is None else clips[:count], each)

    def _sample(self, denoiser: Denoiser, sampler: Sampler, rows: Any, mesh: Mesh | None) -> Float[Array, "b f h w c"]:
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
        return everywhere(latents)

    def _unconditional(self, condition: Condition) -> Condition:
        """The negative prompt with the same picture, as Wan guides."""
        asked = self.held_out
        return replace(
            condition,
            text=np.broadcast_to(np.float32(asked.null_text), condition.text.shape),
            text_mask=np.broadcast_to(asked.null_mask, condition.text_mask.shape),
        )


def decoded(
    pipeline: Pipeline, latents: Float[np.ndarray, "b f h w c"], mesh: Mesh | None = None
) -> tuple[Clips | None, dict[str, float]]:
    """Clips of latents, None where these are not finite, and the seconds of decoding and of fetching them.

    Args:
      pipeline: decodes; on the devices of the mesh, if there is one (`Pipeline.over`).
      latents: the same in every process.
      mesh: shares the clips out among its devices, and the rows of each. All of its processes call this.

    Raises:
      UserError: pixels that are not finite.
    """
    start = time.perf_counter()
    if not np.isfinite(latents).all():
        return None, {"decode": 0.0, "transfer": 0.0}
    placed = jnp.asarray(latents)
    if mesh is not None and mesh.size > 1:
        shared = len(latents) % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
        place = NamedSharding(mesh, PartitionSpec(("data", "fsdp") if shared else None))
        placed = jax.make_array_from_callback(latents.shape, place, lambda index: latents[index])
    frames = jax.block_until_ready(everywhere(pipeline.decode(placed)))
    ready = time.perf_counter()
    return np.asarray(frames), {"decode": ready - start, "transfer": time.perf_counter() - ready}


def measures_of(task: Task, held_out: HeldOut, made: Iterable[Made]) -> Measures | None:
    """What the task keeps of generated clips, measured one batch after the other; None if they are not finite."""
    measures, finite = [], True
    for one in made:  # all of them, as other processes may have a part in each
        finite = finite and one.clips is not None
        if finite and one.clips is not None:
            measures.append(task.measure(one.clips, one.latents, held_out.purpose))
    return joined(measures) if finite else None


def scores_of(task: Task, held_out: HeldOut, made: Iterable[Made]) -> Mapping[str, float]:
    """The task's scores of generated clips; none if they are not finite."""
    measures = measures_of(task, held_out, made)
    return {} if measures is None else task.scores(held_out, measures)
