"""The models behind the page: loaded once, sharing what is identical, and timed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vpae_jax.encoding.encoder import fingerprint
from vpae_jax.evaluation.rows import Entry
from vpae_jax.flow.sampler import Sampler
from vpae_jax.inference import streaming
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.media import Frames, Picture
from vpae_jax.runtime.progress import working
from vpae_jax.weights.directory import ModelDirectory

WARM_UP_PROMPT = "a"


@dataclass(frozen=True)
class Model:
    """A model that the page shows.

    Attributes:
      name: of its panel.
      pipeline: what makes its clips.
      sampler: how it samples unless a request says otherwise.
    """

    name: str
    pipeline: Pipeline
    sampler: Sampler

    @property
    def takes_image(self) -> bool:
        """Whether a first frame can be given: it is an input of the network, or a causal model continues it."""
        return self.pipeline.takes_image or self.sampler.chunks is not None

    @property
    def own_steps(self) -> tuple[int, ...]:
        """The numbers of steps that the model is sampled in by default."""
        asked = self.sampler.asked
        return asked if isinstance(asked, tuple) else (asked,)

    @cached_property
    def _for_checks(self) -> Pipeline:
        """The pipeline with a tokenizer of its own: one tokenizer must not be used by two threads at once."""
        return dataclasses.replace(self.pipeline, tokenizer=copy.deepcopy(self.pipeline.tokenizer))

    def check_prompt(self, prompt: str) -> None:
        """Raises `UserError` if the prompt has too many tokens, or some that the text encoder does not know."""
        self._for_checks.tokenize([prompt])


@dataclass(frozen=True)
class Made:
    """A clip and where its time went.

    Attributes:
      frames: of the clip.
      seconds: by stage: "encoding" (text and first frame), "network", "decoding".
    """

    frames: Frames
    seconds: dict[str, float]


def make(model: Model, sampler: Sampler, prompt: str, seed: int, image: Picture | None = None) -> Made:
    """Makes one clip and times its stages. Raises `UserError` for what the model cannot make."""
    times = [perf_counter()]
    sample = model.pipeline.prepare(
        prompt,
        image=image,
        steps=sampler.asked,
        guidance=sampler.guidance,
        seed=seed,
        solver=sampler.solver,
    )
    jax.block_until_ready((sample.args, sample.keywords))
    times.append(perf_counter())
    latents = jax.block_until_ready(sample())
    times.append(perf_counter())
    frames = np.concatenate([*streaming.decoded(model.pipeline.decoder, latents)])
    times.append(perf_counter())
    stages = ("encoding", "network", "decoding")
    return Made(frames, {stage: end - begin for stage, begin, end in zip(stages, times, times[1:], strict=False)})


def load_models(
    entries: Sequence[Entry],
    dtype: str,
    mesh: Mesh | None,
    decoder: str | None,
    say: Callable[[str], object],
) -> list[Model]:
    """Loads all models. Encoders and autoencoders that equal the first model's are in memory once, and rows of one
    model directory share all of it.

    Args:
      entries: the models, the many-step one first.
      dtype: of the networks.
      mesh: as of `load_pipeline`.
      decoder: small decoder that takes the place of every VAE; None for the VAEs.
      say: prints a line of progress.

    Raises:
      UserError: a model or the decoder cannot be loaded, or a model cannot be sampled as its entry says.
    """
    loaded: dict[Path, Pipeline] = {}
    result = []
    for entry in entries:
        directory = entry.find()
        sampler = entry.sampler(directory)
        if directory.path not in loaded:
            with working(f"reading {entry.model}", say):
                first = next(iter(loaded.values()), None)
                loaded[directory.path] = _load(directory, first, dtype, mesh, decoder)
        result.append(Model(entry.name, loaded[directory.path], sampler))
    return result


def _load(
    directory: ModelDirectory, first: Pipeline | None, dtype: str, mesh: Mesh | None, decoder: str | None
) -> Pipeline:
    settings: dict[str, Any] = dict(dtype=dtype, mesh=mesh, vae_dtype=dtype, decoder=decoder)
    if first is None:
        return load_pipeline(directory, **settings)
    bare = load_pipeline(directory, with_transformer=False, **settings)
    if fingerprint(bare) == fingerprint(first):
        parts = ("vae", "text_encoder", "image_encoder", "small_decoder")
        bare = dataclasses.replace(bare, **{part: getattr(first, part) for part in parts})
    return dataclasses.replace(bare.with_transformer(directory, dtype, mesh), vae=bare.vae)


def warm_up(model: Model, say: Callable[[str], object]) -> float:
    """Compiles a model's programs for its own settings; returns the seconds that a clip takes then."""
    image = None
    if model.takes_image:
        own = model.pipeline.defaults
        image = np.full((own.height, own.width, 3), 128, np.uint8)
    with working(f"{model.name}: compiling, and making a clip", say):
        make(model, model.sampler, WARM_UP_PROMPT, 0)
        if image is not None:
            make(model, model.sampler, WARM_UP_PROMPT, 0, image)
    seconds = sum(make(model, model.sampler, WARM_UP_PROMPT, 0).seconds.values())
    say(f"{model.name}: {seconds:.2f} s per clip")
    return seconds
