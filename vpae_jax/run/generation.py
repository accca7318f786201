"""Generates clips for held-out conditions, from the same noise for every network."""

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
# Components of a batch's time: network evaluations, the decoder, and transferring latents and clips to the host.
SECONDS = ("network", "decode", "transfer")


@dataclass(frozen=True)
class Made:
    """A batch of generated clips.

    Attributes:
      rows: which of the requested rows.
      latents: latents of the clips, on the host.
      clips: the decoded clips; None if the latents are not finite.
      seconds: seconds per clip, by component (`SECONDS`).
    """

    rows: Int[np.ndarray, "b"]
    latents: Float[np.ndarray, "b f h w c"]
    clips: Clips | None
    seconds: Mapping[str, float]


class Generation:
    """Fixed conditions and noise, from which different networks generate clips.

    If a network lies on devices of several processes, all of them must call this, and all get the clips.

    Args:
      pipeline: provides the decoder.
      held_out: the conditions.
      batch: clips generated at once; by default depending on their size.
    """

    def __init__(self, pipeline: Pipeline, held_out: HeldOut, batch: int | None = None) -> None:
        self.pipeline, self.held_out = pipeline.without_encoders(), held_out
        self.batch = batch or clips_at_once(held_out.shape)

    def __call__(self, denoiser: Denoiser, sampler: Sampler) -> Clips:
        """Generates all clips. Raises `UserError` if some are not finite."""
        made = [one.clips for one in self.batches(denoiser, sampler)]
        clips = [one for one in made if one is not None]
        check_finite(jnp.array(len(clips) == len(made)))
        return np.concatenate(clips)

    def batches(self, denoiser: Denoiser, sampler: Sampler, rows: Sequence[int] | None = None) -> Iterator[Made]:
        """Yields batches of clips as they are generated, in order; by default for all rows."""
        mesh = sharding.mesh_of(denoiser.weights)
        if mesh is not None and mesh.size > 1:  # puts the decoder onto the network's devices
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
        inputs = sharding.replicate((noise, condition, unconditional), mesh)
        latents = self.pipeline.sample(*inputs, sampler=sampler, key=fresh, denoiser=denoiser)
        return everywhere(latents)

    def _unconditional(self, condition: Condition) -> Condition:
        """Returns the condition with the negative prompt and the same image, as Wan uses for guidance."""
        asked = self.held_out
        return replace(
            condition,
            text=np.broadcast_to(np.float32(asked.null_text), condition.text.shape),
            text_mask=np.broadcast_to(asked.null_mask, condition.text_mask.shape),
        )


def decoded(
    pipeline: Pipeline, latents: Float[np.ndarray, "b f h w c"], mesh: Mesh | None = None
) -> tuple[Clips | None, dict[str, float]]:
    """Decodes latents into clips; returns None if the latents are not finite. Also returns the seconds for decoding and
    for transferring the clips.

    Args:
      pipeline: provides the decoder; on the devices of the mesh, if there is one (`Pipeline.over`).
      latents: must be the same in every process.
      mesh: clips, and the rows of each, are divided among its devices. All of its processes must call this.

    Raises:
      UserError: there are pixels that are not finite.
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
    """Returns the task's measurements of generated clips, taken batch by batch; None if the clips are not finite."""
    measures, finite = [], True
    for one in made:  # always all of them, since other processes may take part in each
        finite = finite and one.clips is not None
        if finite and one.clips is not None:
            measures.append(task.measure(one.clips, one.latents, held_out.purpose))
    return joined(measures) if finite else None


def scores_of(task: Task, held_out: HeldOut, made: Iterable[Made]) -> Mapping[str, float]:
    """Returns the task's scores of generated clips; empty if the clips are not finite."""
    measures = measures_of(task, held_out, made)
    return {} if measures is None else task.scores(held_out, measures)
