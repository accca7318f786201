"""The embedded task (`tasks.base.Task`): rendered handwritten digits, whose captions can be checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int

from vpae_jax.config import DataConfig, Experiment
from vpae_jax.data.batches import latent_batches
from vpae_jax.data.loader import Batches
from vpae_jax.data.records import LatentRecords
from vpae_jax.encoding.clip_source import InUnits
from vpae_jax.encoding.encoder import encode_into
from vpae_jax.files import resolve
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.metrics.archive import Shelf
from vpae_jax.metrics.base import Clips, Pictures
from vpae_jax.metrics.intervals import Interval
from vpae_jax.tasks.base import (
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
from vpae_jax.tasks.digits import products, scores
from vpae_jax.tasks.digits.batches import captioned_batches, pixel_batches
from vpae_jax.tasks.digits.clips import Clip, MovingDigits, Split, check_size
from vpae_jax.types import CaptionedFrames, Condition, Params, PixelBatch, UserError
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.settings import Scheduler

ENCODED_AT_ONCE = 32
# Digit images and seed of the held-out clips for each purpose; fixed, so that scores are comparable between runs. The
# guard's digits are used neither for training nor in the final evaluation.
ASKED: Mapping[Purpose, tuple[Split, int]] = {
    "preview": ("eval", 7),
    "guard": ("classifier", 99),
    "evaluation": ("eval", 100),
}
# Number and seed of the other real clips for comparison; number of conditions with a second clip.
OTHERS: Mapping[Purpose, tuple[int, int]] = {"preview": (0, 0), "guard": (256, 199), "evaluation": (1000, 200)}
AGAIN: Mapping[Purpose, int] = {"preview": 0, "guard": 16, "evaluation": 64}
FEWEST = 16  # minimum number of clips in an evaluation


def check(experiment: Experiment, pipeline: Pipeline | None) -> None:
    """Raises `UserError` if a batch needs more clips than there are, or if the model makes clips of another size."""
    if experiment.batch_size > experiment.data.clips:
        raise UserError(
            f"config.batch_size is {experiment.batch_size}, but config.data.clips is {experiment.data.clips}; "
            "lower the former or raise the latter"
        )
    if pipeline is not None:
        _check_size(experiment.model.path, pipeline)


class Digits:
    """Rendered digits. The digit images are split, so that those of held-out clips are never trained on.

    Args:
      data: number of training clips, and where they are stored after encoding.
      workdir: the run's folder; paths may be relative to it.
    """

    name = "digits"
    metrics = scores.METRICS
    compared = "kvd"
    least = scores.LEAST

    def __init__(self, data: DataConfig, workdir: Path) -> None:
        self._data, self._workdir = data, workdir

    @property
    def _trained(self) -> MovingDigits:
        return MovingDigits("train", self._data.clips, self._data.seed)

    def batches(self, kind: type, pipeline: Pipeline | None, feed: Feed) -> Batches:
        how = (feed.batch_size, feed.seed, feed.workers, feed.rows)
        if pipeline is None or kind is PixelBatch:
            return pixel_batches(self._trained, *how)
        if kind is CaptionedFrames:
            return captioned_batches(self._trained, pipeline.tokenizer, *how)
        root = resolve(self._data.folder, self._workdir)
        records = LatentRecords(encode_into(root, InUnits(self._trained), pipeline, ENCODED_AT_ONCE))
        return latent_batches([(records, 1.0)], *how, feed.max_bad)

    def held_out(self, pipeline: Pipeline, purpose: Purpose, count: int) -> HeldOut:
        if purpose == "evaluation" and count < FEWEST:
            raise TooFew(f"count is {count}: scores need at least {FEWEST} clips")
        _check_size("the model", pipeline)
        modes: tuple[Mode, ...] = ("t2v", "i2v") if pipeline.takes_image else ("t2v",)
        again = min(AGAIN[purpose], count)
        parts = mode_parts(modes, count, again)
        items, clip_of_row = _asked(purpose, parts)
        videos, (split, seed) = np.stack([item["video"] for item in items]), ASKED[purpose]
        captions = tuple(items[clip]["caption"] for clip in clip_of_row)
        return HeldOut(
            purpose=purpose,
            parts=parts,
            captions=captions,
            condition=_condition(pipeline, captions, videos[clip_of_row, 0], parts),
            null_text=np.asarray((null := pipeline.encode_prompt([pipeline.defaults.negative_prompt]))[0]),
            null_mask=np.asarray(null[1]),
            shape=pipeline.latent_shape(1)[1:],
            seeds=tuple([*range(count), *range(OTHER_NOISE, OTHER_NOISE + again)] * len(modes)),
            origins=tuple(f"{split} {seed} {clip}" for clip in clip_of_row),
            fps=pipeline.defaults.fps,
        )

    def with_real(self, held_out: HeldOut, pipeline: Pipeline, shelf: Shelf | None = None) -> HeldOut:
        purpose = held_out.purpose
        split, _ = ASKED[purpose]
        items, clip_of_row = _asked(purpose, held_out.parts)
        videos = np.stack([item["video"] for item in items])
        if purpose == "preview":
            return replace(
                held_out, clips={part.name: videos[clip_of_row[part.rows]][:SHOWN] for part in held_out.parts}
            )
        more, seed = OTHERS[purpose]
        others = MovingDigits(split, more, seed)
        return replace(
            held_out,
            files=() if shelf is None else _kept(videos[:SHOWN], held_out, shelf),
            real=rows_of(scores.measure_real(items), clip_of_row),
            others=scores.measure_real([others[i] for i in range(more)]),
        )

    def measure(self, clips: Clips, latents: Float[np.ndarray, "b f h w c"], purpose: Purpose) -> Measures:
        del latents, purpose
        return scores.measure(clips)

    def scores(self, held_out: HeldOut, made: Measures) -> dict[str, float]:
        result: dict[str, float] = {}
        for part in held_out.parts:
            values = _part_scores(held_out, part.name, rows_of(made, part.rows), rows_of(held_out.real, part.rows))
            if part.again.stop > part.again.start:
                values["diversity"] = scores.diversity(rows_of(made, part.rows), rows_of(made, part.again))
            result |= {f"{part.name}/{name}": value for name, value in values.items()}
        return result

    def real(self, held_out: HeldOut) -> dict[str, float]:
        result: dict[str, float] = {}
        for part in held_out.parts:
            real = rows_of(held_out.real, part.rows)
            values = _part_scores(held_out, part.name, real, real)
            # In real data each first frame occurs only once, so there are no pairs for image-to-video.
            if part.name == "t2v" and (found := scores.real_diversity(real, held_out.others)) is not None:
                values["diversity"] = found
            result |= {f"{part.name}/{name}": value for name, value in values.items()}
        return result

    def intervals(self, held_out: HeldOut, made: Measures | None) -> dict[str, Interval]:
        result: dict[str, Interval] = {}
        for part in held_out.parts:
            real = rows_of(held_out.real, part.rows)
            own = real if made is None else rows_of(made, part.rows)
            again = rows_of(own, slice(0)) if made is None else rows_of(made, part.again)
            named = held_out.purpose == "evaluation"
            found = scores.intervals(own, again, real, held_out.others, named=named, given=part.name == "i2v")
            result |= {f"{part.name}/{name}": value for name, value in found.items()}
        return result

    def curves(self, held_out: HeldOut, made: Measures | None) -> dict[str, list[float]]:
        result: dict[str, list[float]] = {}
        for part in held_out.parts:
            own = rows_of(held_out.real if made is None else made, part.rows)
            result |= {f"{part.name}/{name}": values for name, values in scores.curves(own).items()}
        return result

    def each(self, held_out: HeldOut, made: Measures) -> dict[str, list[float]]:
        result: dict[str, list[float]] = {}
        for part in held_out.parts:
            pair = rows_of(made, part.rows), rows_of(held_out.real, part.rows)
            result |= {f"{part.name}/{name}": v for name, v in scores.each(*pair, given=part.name == "i2v").items()}
        return result

    def write_model(
        self,
        workdir: Path,
        preset: str,
        params: Mapping[str, Params],
        source: ModelDirectory | None,
        scheduler: Scheduler,
    ) -> Path:
        if source is None:
            return products.write_autoencoder(workdir, preset, params["vae"], self._trained, scheduler)
        return products.write_encoders(workdir, preset, params["encoders"], source)


def _asked(purpose: Purpose, parts: Sequence[Part]) -> tuple[list[Clip], Int[np.ndarray, "n"]]:
    """Returns the held-out clips, and which of them each row uses. An evaluation uses the same clips in both modes,
    which are shown side by side."""
    split, seed = ASKED[purpose]
    count = parts[0].rows.stop - parts[0].rows.start
    distinct = count if purpose == "evaluation" else count * len(parts)
    source = MovingDigits(split, distinct, seed)
    rows = [
        (np.array([*range(count), *range(part.again.stop - part.again.start)]) + number * count) % distinct
        for number, part in enumerate(parts)
    ]
    return [source[i] for i in range(distinct)], np.concatenate(rows)


def _kept(videos: Clips, held_out: HeldOut, shelf: Shelf) -> tuple[Path, ...]:
    """Stores the first real clips as files."""
    archive = shelf.archive("real", {"clips": held_out.origins[: len(videos)]})
    for index in archive.without_measures(range(len(videos))):
        archive.keep_video(index, videos[index], held_out.fps)
        archive.keep(index, {})
    return tuple(archive.video(index) for index in range(len(videos)))


def _part_scores(held_out: HeldOut, mode: Mode, made: Measures, real: Measures) -> dict[str, float]:
    values = scores.against_real(made, real, held_out.others)
    if held_out.purpose == "evaluation":  # the guard's digits are the training data of the classifier
        values |= scores.digits_named(made, real)
    if mode == "i2v":
        values["psnr_first"] = scores.agreement(made, real)
    return values


def _condition(pipeline: Pipeline, captions: tuple[str, ...], pictures: Pictures, parts: Sequence[Part]) -> Condition:
    """Encodes captions and, for image-to-video, first frames with the pipeline's encoders."""
    found = []
    for part in parts:
        rows = slice(part.rows.start, part.again.stop)  # includes the repeated rows
        found.append(pipeline.condition(list(captions[rows]), pictures[rows] if part.name == "i2v" else None))
    return jax.tree.map(lambda *values: np.concatenate(values), *found)


def _check_size(model: str, pipeline: Pipeline) -> None:
    made = pipeline.defaults
    check_size(model, made.num_frames, made.height, made.width)
