"""Generates the clips of rows, each once: clips from an earlier run or another process are reused.

For each row, its model's encoders are loaded, encode the conditions, and are released before the transformer is loaded.
Of n processes that share the work, each makes every n-th clip; they do not communicate, but all see the same folder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from vpae_jax import sharding
from vpae_jax.config import MeshConfig
from vpae_jax.encoding.encoder import fingerprint
from vpae_jax.evaluation.costs import WRITE, encoding, peak_memory
from vpae_jax.evaluation.rows import Entry
from vpae_jax.files import claimed
from vpae_jax.flow.sampler import Sampler
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.metrics.archive import Archive, Shelf
from vpae_jax.metrics.base import Clips
from vpae_jax.metrics.times import FIRST_CALL, MEMORY
from vpae_jax.run.agreement import reads
from vpae_jax.run.generation import Generation, decoded
from vpae_jax.runtime.progress import Pace, say, working
from vpae_jax.tasks.base import HeldOut, Task, clips_at_once, in_batches
from vpae_jax.types import UserError
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.merging import LoraFile, open_merging


@dataclass(frozen=True)
class Share:
    """This process's share of the clips.

    Attributes:
      process: index of this process, from 0.
      processes: number of processes.
    """

    process: int = 0
    processes: int = 1


@dataclass(frozen=True)
class Opened:
    """A row whose clips can be generated.

    Attributes:
      entry: the row.
      model: its model.
      sampler: how its clips are made.
      encoders: fingerprint (16 digits) of the encoders of its conditions.
      task, held_out: the conditions, without measurements of real clips.
      pipeline: its decoder, without encoders and transformer.
      archive: where its clips are stored.
    """

    entry: Entry
    model: ModelDirectory
    sampler: Sampler
    encoders: str
    task: Task
    held_out: HeldOut
    pipeline: Pipeline
    archive: Archive


class Making:
    """Opens rows, and generates this process's share of their clips.

    Args:
      shelf: where they are stored.
      task_of: gives the task of a model, from a pipeline with its encoders.
      count: maximum number of conditions of each mode.
      batch: clips generated at once; None for as many as their size allows.
      dtype: of the networks.
      devices: of this process, over which a batch is distributed.
    """

    def __init__(
        self,
        shelf: Shelf,
        task_of: Callable[[Pipeline], Task],
        count: int,
        batch: int | None,
        dtype: str,
        devices: Sequence[Any],
    ) -> None:
        self.shelf, self.task_of, self.count, self.batch = shelf, task_of, count, batch
        self.dtype, self.devices = dtype, devices
        self._asked: dict[str, tuple[Task, HeldOut]] = {}
        self._models: dict[str, tuple[Pipeline, str]] = {}
        self._costs: dict[str, dict[str, float]] = {}
        self._last: tuple[Any, Pipeline | None] = (None, None)

    def open(self, entry: Entry, share: Share) -> Opened:
        """Opens a row. Raises `UserError` for a model that cannot be read, or cannot make the clips of the task."""
        model, whole = entry.find(), None
        sampler = entry.sampler(model)
        if entry.model not in self._models:
            whole = self._with_encoders(entry, model)
            encoders = fingerprint(whole)
            if encoders not in self._asked:
                task = self.task_of(whole)
                self._asked[encoders] = task, task.held_out(whole, "evaluation", self.count)
            self._models[entry.model] = whole.without_encoders(), encoders
        pipeline, encoders = self._models[entry.model]
        task, held_out = self._asked[encoders]
        archive = self.shelf.archive(entry.name, self._identity(entry, model, sampler, held_out))
        if entry.model not in self._costs and archive.without_latents(_own(held_out, share)):
            self._costs[entry.model] = encoding(whole or self._with_encoders(entry, model), held_out)
        return Opened(entry, model, sampler, encoders, task, held_out, pipeline, archive)

    def _with_encoders(self, entry: Entry, model: ModelDirectory) -> Pipeline:
        with working(f"reading the encoders of {entry.model}"):
            return load_pipeline(model, jnp.dtype(self.dtype), with_transformer=False)

    def make(self, row: Opened, share: Share) -> None:
        """Generates this process's missing clips of a row.

        Raises:
          UserError: another process is generating them, or a clip cannot be written.
        """
        archive, own = row.archive, _own(row.held_out, share)
        left = archive.without_latents(own)
        kept = [index for index in archive.without_measures(own) if index not in left]
        each = "each" if row.sampler.chunks is None else "per chunk at most" if row.sampler.first else "per chunk"
        there = f"; {len(own) - len(left)} already exist" if len(left) < len(own) else ""
        say(f"{row.entry.name}: {len(own)} clips, {row.sampler.evaluations} network evaluations {each}{there}")
        if not left and not kept:
            return
        with claimed(archive.folder / f"{share.process}-of-{share.processes}.lock") as ours:
            if not ours:
                which = f"share {share.process} of {share.processes} of {row.entry.name}"
                raise UserError(
                    f"{which} is being made by another process; give each its own --process_id, or wait until it ends"
                )
            self._measure_again(row, kept)
            if left:
                self._make(row, left)

    def _make(self, row: Opened, left: Sequence[int]) -> None:
        archive, held_out = row.archive, row.held_out
        batch, mesh = self._laid_out(held_out.shape, len(left))
        pipeline = self._with_transformer(row, mesh)
        generation, pace = Generation(pipeline, held_out, batch), Pace(len(left), row.entry.name)
        known = self._costs.get(row.entry.model, {})
        batches, first = generation.batches(pipeline.denoiser, row.sampler, left), True
        while True:
            with working(f"{row.entry.name}: compiling, and making the first clips") if first else nullcontext():
                if (made := next(batches, None)) is None:
                    return
            seconds = {FIRST_CALL: sum(made.seconds.values()) * len(made.rows)} if first else made.seconds
            cost = {**known, **seconds, MEMORY: peak_memory()}
            for place, index in enumerate(made.rows.tolist()):
                archive.keep_latents(index, made.latents[place], cost)
            self._measure(row, made.rows.tolist(), made.clips, made.latents)
            pace.advance(len(made.rows))
            first = False

    def _measure_again(self, row: Opened, kept: Sequence[int]) -> None:
        """Decodes and measures clips of which only latents exist, or that were measured by other code."""
        if kept:
            say(f"{row.entry.name}: decoding and measuring {len(kept)} existing clips again")
        for rows, filled in in_batches(len(kept), clips_at_once(row.held_out.shape)):
            found = [row.archive.latents(kept[place]) for place in filled]
            latents = np.stack([one for one in found if one is not None])
            clips, _ = decoded(row.pipeline, latents)
            count = rows.stop - rows.start
            self._measure(row, kept[rows], None if clips is None else clips[:count], latents[:count])

    def _measure(
        self, row: Opened, indices: Sequence[int], clips: Clips | None, latents: Float[np.ndarray, "b f h w c"]
    ) -> None:
        if clips is None:
            for index in indices:
                row.archive.keep(index, {})
            return
        measures = row.task.measure(clips, latents, row.held_out.purpose)
        shown = {index for part in row.held_out.parts for index in range(len(row.held_out))[part.rows]}
        for place, index in enumerate(indices):
            cost = {}
            if index in shown:
                start = time.perf_counter()
                row.archive.keep_video(index, clips[place], row.held_out.fps)
                cost[WRITE] = time.perf_counter() - start
            row.archive.keep(index, {name: np.asarray(value[place]) for name, value in measures.items()}, cost)

    def _with_transformer(self, row: Opened, mesh: Mesh | None) -> Pipeline:
        """The row's whole generator; the previous one is released first."""
        key = row.entry.model, row.entry.lora
        if self._last[0] != key:
            self._last = None, None
            with working(f"reading {row.entry.model}"):
                loras = [] if row.entry.lora is None else [LoraFile(row.entry.lora)]
                merge = open_merging(loras, row.model.part("transformer").config) if loras else None
                whole = row.pipeline.with_transformer(row.model, jnp.dtype(self.dtype), mesh, merge)
            self._last = key, whole
        assert self._last[1] is not None
        return self._last[1]

    def _laid_out(self, shape: tuple[int, ...], clips: int) -> tuple[int, Mesh | None]:
        """The batch size for these clips, and the mesh. There are at least two batches, since the first one's time
        includes compilation. Clips are distributed over devices as far as the batch allows, tokens over the rest."""
        devices, batch = len(self.devices), self.batch
        if batch is None:
            batch = min(clips_at_once(shape), max(1, -(-clips // 2)))
            batch = batch // devices * devices if batch > devices else batch
        if devices == 1:
            return batch, None
        apart = math.gcd(batch, devices)
        return batch, sharding.make_mesh(MeshConfig(data=1, fsdp=apart, context=devices // apart), self.devices)

    def _identity(self, entry: Entry, model: ModelDirectory, sampler: Sampler, held_out: HeldOut) -> Mapping[str, Any]:
        """Everything that determines a row's clips."""
        loras = {} if entry.lora is None else {"LoRA": [entry.lora]}
        return {
            "model": reads(model, {}, loras),
            "dtype": self.dtype,
            "sampler": asdict(sampler),
            "asked": [*zip(held_out.origins, held_out.seeds, _modes(held_out), strict=True)],
            "shape": held_out.shape,
        }


def _modes(held_out: HeldOut) -> list[str]:
    """The mode of each row."""
    names = [""] * len(held_out)
    for part in held_out.parts:
        for index in (*range(len(held_out))[part.rows], *range(len(held_out))[part.again]):
            names[index] = part.name
    return names


def _own(held_out: HeldOut, share: Share) -> range:
    """The indices of the clips that a process generates."""
    return range(share.process, len(held_out), share.processes)


def unmade(rows: Sequence[Opened]) -> int:
    """Number of clips of all rows that are missing or not measured."""
    return sum(len(row.archive.without_measures(range(len(row.held_out)))) for row in rows)
