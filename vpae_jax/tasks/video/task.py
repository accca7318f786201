"""The task for clips of any content: trains on them, and scores with those that are held out.

The real clips are reconstructed by the VAE's decoder from their latents, since this is the best that a generator of
latents can reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from vpae_jax.config import DataConfig
from vpae_jax.data.batches import latent_batches
from vpae_jax.data.loader import Batches
from vpae_jax.data.order import held_out, shuffled
from vpae_jax.data.records import BadRecord, LatentRecords, LatentShape, Value
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.metrics import extras
from vpae_jax.metrics.archive import Shelf
from vpae_jax.metrics.base import Clips
from vpae_jax.metrics.intervals import Interval
from vpae_jax.metrics.judge import Comparison
from vpae_jax.runtime.processes import say
from vpae_jax.tasks.base import (
    AGAIN,
    OTHER_NOISE,
    SHOWN,
    Feed,
    HeldOut,
    Measures,
    Mode,
    Part,
    Purpose,
    TooFew,
    mode_parts,
    rows_of,
)
from vpae_jax.tasks.video import scores
from vpae_jax.tasks.video.real import Captioned, captioned, first_pictures, latents_of, measured
from vpae_jax.tasks.video.sources import Sources, open_records, open_sources
from vpae_jax.types import Condition, UserError

# Maximum number of real clips for comparison, and of clips used from a folder that is completely held out.
OTHERS, FOLDER = 256, 4096
Number = TypeVar("Number")
Place = tuple[LatentRecords, int]  # a record: its folder, and its index there
FEWEST = 8  # minimum number of conditions, and of other clips, for scores


class Video:
    """The task for folders of records, or a folder of videos (`tasks.base.Task`).

    Args:
      data: the data config.
      workdir: the run's folder; paths may be relative to it.
      model: name of the model whose encoders made the records, for messages.
      modes: modes to generate; by default image-to-video if the model takes a first frame, else text-to-video.
    """

    name = "video"
    metrics = scores.METRICS
    compared = "kvd"
    least = scores.LEAST

    def __init__(self, data: DataConfig, workdir: Path, model: str, modes: tuple[Mode, ...] | None = None) -> None:
        self._data, self._workdir, self._model, self._modes = data, workdir, model, modes
        self._sources: Sources | None = None
        self._opened_for: Pipeline | None = None
        self._judged: Sources = ()
        self._judged_for: Pipeline | None = None

    def batches(self, kind: type, pipeline: Pipeline | None, feed: Feed) -> Batches:
        assert pipeline is not None  # `tasks.check` rejects methods without one
        sources = self._open(pipeline)
        how = (feed.batch_size, feed.seed, feed.workers, feed.rows, feed.max_bad)
        return latent_batches(sources, *how, most_held_out=self._most, seeds=feed.seeds)

    def held_out(self, pipeline: Pipeline, purpose: Purpose, count: int) -> HeldOut:
        if self._judged_for is not pipeline:
            self._judged, self._judged_for = self._apart(pipeline), pipeline
        asked, others = self._chosen(purpose, count)
        judged = purpose != "preview" and asked and "latents" in asked[0].arrays
        if not asked or (judged and min(len(asked), len(others)) < FEWEST):
            raise TooFew(
                f"{len(asked) + len(others)} held-out clips of one size are too few; raise config.data.held_out (at "
                "most a fifth of a folder is held out), or give other clips in config.data.held_out_records"
            )
        modes = self._modes or (("i2v",) if pipeline.takes_image else ("t2v",))
        if not pipeline.takes_image or asked[0].unseen:
            modes = ("t2v",)
        again = 0 if purpose == "preview" else min(AGAIN, len(asked))
        parts = mode_parts(modes, len(asked), again)
        clip_of_row = _clips_of(parts)
        conditions = [
            _condition(asked[clip], part.name) for part in parts for clip in clip_of_row[: len(asked) + again]
        ]
        arrays, records = asked[0].arrays, self._judged[0][0]  # all have the same encoders and negative prompt
        shape = arrays["latents"].shape if "latents" in arrays else tuple(int(size) for size in arrays["size"])
        return HeldOut(
            purpose=purpose,
            parts=parts,
            captions=tuple(asked[clip].caption for clip in clip_of_row),
            condition=_stacked(conditions),
            null_text=records.null_text[None],
            null_mask=records.null_mask[None],
            shape=shape,
            seeds=tuple([*range(len(asked)), *range(OTHER_NOISE, OTHER_NOISE + again)] * len(modes)),
            origins=tuple(asked[clip].origin for clip in clip_of_row),
            fps=pipeline.defaults.fps,
        )

    def with_real(self, held_out: HeldOut, pipeline: Pipeline, shelf: Shelf | None = None) -> HeldOut:
        asked, others = self._chosen(held_out.purpose, held_out.count)
        clip_of_row = _clips_of(held_out.parts)
        if held_out.purpose == "preview":
            if "latents" not in asked[0].arrays:
                return held_out
            clips = np.asarray(pipeline.decode(jnp.asarray(latents_of(asked[:SHOWN]))))
            return replace(held_out, clips={part.name: clips for part in held_out.parts})
        if held_out.purpose == "evaluation":
            extras.note()
        if "latents" not in asked[0].arrays:
            given = first_pictures(pipeline, asked) if asked[0].given else {}
            return replace(held_out, real=rows_of(given, clip_of_row))
        measure = partial(scores.measure, purpose=held_out.purpose)
        files, real = measured(pipeline, "real", asked, measure, shelf, shown=True)
        del asked  # may be large
        beside = measured(pipeline, "others", list(_readable(others, OTHERS)), measure, shelf, shown=False)[1]
        return replace(held_out, files=files, real=rows_of(real, clip_of_row), others=beside)

    def measure(self, clips: Clips, latents: Float[np.ndarray, "b f h w c"], purpose: Purpose) -> Measures:
        return scores.measure(clips, latents, purpose)

    def scores(self, held_out: HeldOut, made: Measures) -> dict[str, float]:
        return _named(held_out, made, Comparison.scores)

    def real(self, held_out: HeldOut) -> dict[str, float]:
        result = _named(held_out, None, Comparison.scores)
        for part in held_out.parts:
            result[f"{part.name}/diversity"] = 1.0
            if "content" in held_out.real:
                result[f"{part.name}/diversity_content"] = 1.0
        return result

    def intervals(self, held_out: HeldOut, made: Measures | None) -> dict[str, Interval]:
        return _named(held_out, made, Comparison.intervals)

    def curves(self, held_out: HeldOut, made: Measures | None) -> dict[str, list[float]]:
        return _named(held_out, made, Comparison.curves)

    def each(self, held_out: HeldOut, made: Measures) -> dict[str, list[float]]:
        return {name: values.tolist() for name, values in _named(held_out, made, Comparison.each).items()}

    def write_model(self, *_: object, **__: object) -> Path:
        raise UserError("the autoencoder and the encoders can only be trained on rendered digits")

    @property
    def _most(self) -> int:
        return 0 if self._data.held_out_records else self._data.held_out

    def _open(self, pipeline: Pipeline) -> Sources:
        """Opens the folders of training clips; prints once how many clips are held out of them."""
        if self._sources is None or self._opened_for is not pipeline:  # another pipeline may have other encoders
            said, self._opened_for = self._sources is not None, pipeline
            self._sources = open_sources(self._data, self._workdir, pipeline, self._model)
            for records, _ in self._sources if self._most and not said else ():
                count = len(held_out(len(records), self._most))
                what = "prompts" if records.of_prompts else "clips"
                say(f"held out: {count} of {len(records)} {what} of {records.folder}")
        return self._sources

    def _apart(self, pipeline: Pipeline) -> Sources:
        """Opens the folders with the held-out clips, which must have been made by this pipeline's encoders."""
        if not self._data.held_out_records:
            return self._open(pipeline)
        key = "config.data.held_out_records"
        return open_records(self._data.held_out_records, key, self._workdir, pipeline, self._model)

    def _halves(self) -> tuple[list[Place], list[Place]]:
        """Returns the held-out clips of the most frequent shape, from all folders alternately: one half for the guard
        and the previews, the other for the evaluation."""
        found: list[list[tuple[LatentRecords, int, LatentShape]]] = []
        for records in {records.index["fingerprint"]: records for records, _ in self._judged}.values():
            shapes = {int(clip): shape for shape, clips in records.shapes.items() for clip in clips}
            total = len(records)
            if self._data.held_out_records and records.of_prompts:  # in the order of the prompts' file
                clips = [*range(min(total, FOLDER))]
            elif self._data.held_out_records:
                clips = [shuffled(place, total, 0) for place in range(min(total, FOLDER))]
            else:
                clips = held_out(total, self._most).tolist()
            found.append([(records, clip, shapes[clip]) for clip in clips])
        turns = [clip for turn in zip_longest(*found) for clip in turn if clip is not None]
        counts: dict[LatentShape, int] = {}
        for *_, shape in turns:
            counts[shape] = counts.get(shape, 0) + 1
        most = max(sorted(counts), key=lambda shape: counts[shape], default=())
        same = [(records, clip) for records, clip, shape in turns if shape == most]
        return same[::2], same[1::2]

    def _chosen(self, purpose: Purpose, count: int) -> tuple[list[Captioned], list[Place]]:
        """Returns the clips whose conditions are used, and the places of the other real clips for comparison. The
        latter are empty for prompts alone, which can only be used for previews and evaluations."""
        first, second = self._halves()
        prompts = [records.folder for records, _ in (*first, *second) if records.of_prompts]
        if prompts and (purpose == "guard" or (purpose == "evaluation" and not self._data.held_out_records)):
            raise TooFew(
                f"{prompts[0]} contains prompts alone, without real clips to compare with; give records of clips in "
                "config.data.held_out_records, or in --records of python -m vpae_jax.evaluate"
            )
        if prompts and purpose == "evaluation":
            every = [clip for pair in zip_longest(first, second) for clip in pair if clip is not None]
            return list(_readable(every, count)), []
        asked, others = (second, first) if purpose == "evaluation" else (first, second)
        return list(_readable(asked, count)), [] if purpose == "preview" else others


def _named(
    held_out: HeldOut, made: Measures | None, of: Callable[[Comparison], Mapping[str, Number]]
) -> dict[str, Number]:
    """Evaluates `of` on the comparison of every part, and prefixes the results with the part's name."""
    return {
        f"{part.name}/{name}": value
        for part in held_out.parts
        for name, value in of(scores.compared(held_out, part, made)).items()
    }


def _clips_of(parts: Sequence[Part]) -> Int[np.ndarray, "n"]:
    """Returns which held-out clip each row uses."""
    return np.concatenate([np.arange(rows.stop - rows.start) for part in parts for rows in (part.rows, part.again)])


def _readable(clips: Sequence[Place], count: int) -> Iterator[Captioned]:
    """Yields the first `count` clips that are not damaged."""
    left = count
    for records, index in clips:
        if not left:
            return
        try:
            yield captioned(records, index)
        except BadRecord:
            continue
        left -= 1


def _condition(clip: Captioned, mode: Mode) -> dict[str, Value]:
    """Returns the condition in a clip's record; for text-to-video without the first frame."""
    kept = {name: clip.arrays[name] for name in ("text", "text_mask", "image", "frames") if name in clip.arrays}
    if mode == "t2v":
        kept |= {name: np.zeros_like(kept[name]) for name in ("image", "frames") if name in kept}
    return kept


def _stacked(conditions: Sequence[dict[str, Value]]) -> Condition:
    arrays = {name: np.stack([one[name] for one in conditions]) for name in conditions[0]}
    return Condition(arrays["text"], arrays["text_mask"], arrays.get("image"), arrays.get("frames"))
