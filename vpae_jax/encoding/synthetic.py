"""Clips that a teacher makes for captions: guided sampling in many steps, kept as records like those of real videos.

Each clip's noise comes from a seed of its own, the recipe's plus the caption's number, as `Pipeline.__call__` draws it.
With the recipe, which every record holds, `python -m vpae_jax.sample` makes the same clip again.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vpae_jax import sharding
from vpae_jax.encoding.captions import Captions, Prompt
from vpae_jax.encoding.clip_source import in_turn
from vpae_jax.encoding.encoder import Encoded, Encoders, add_weights, arrays_of, dtype_of, fill, fingerprint
from vpae_jax.encoding.units import Units
from vpae_jax.flow.draws import SEEDS, check_seed, noise_of_seed
from vpae_jax.flow.sampler import Sampler, Solver
from vpae_jax.types import UserError


@runtime_checkable
class Teacher(Encoders, Protocol):
    """What of `vpae_jax.inference.pipeline.Pipeline` is used here besides what encodes."""

    @property
    def transformer(self) -> Any: ...
    def latent_shape(self, batch: int, num_frames: int | None, height: int | None, width: int | None) -> Any: ...
    @property
    def sample(self) -> Callable[..., Any]: ...
    @property
    def sampler(self) -> Callable[..., Sampler]: ...
    def decode(self, latents: Any) -> Any: ...


@dataclass(frozen=True)
class Recipe:
    """How clips are made.

    Attributes:
      steps: network evaluations, twice as many with guidance.
      guidance: w of `v_u + w (v_c - v_u)`, at least 1.
      solver: see `flow.sampler.Sampler`.
      shift: of even times; None for the teacher's own.
      seed: of the first caption; each has the next one.
      num_frames, height, width: of a clip.

    Raises:
      UserError: a number that makes no sense.
    """

    steps: int
    guidance: float
    solver: Solver
    shift: float | None
    seed: int
    num_frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def sampler(self, teacher: Teacher) -> Sampler:
        """How a teacher is sampled. Raises `UserError` for numbers that make no sampler."""
        return teacher.sampler(self.steps, self.guidance, self.solver, self.shift)

    @property
    def size(self) -> tuple[int, int, int]:
        return self.num_frames, self.height, self.width


def describe(captions: Captions, encoders: Encoders, teacher: Teacher, recipe: Recipe) -> dict[str, Any]:
    """What decides the records: the identity of their folder.

    Raises:
      UserError: the teacher's latents are not those of the encoders' VAE, it cannot make clips of that size, or there
        are not enough seeds for so many captions.
    """
    teacher.latent_shape(1, *recipe.size)
    if recipe.seed + captions.rows > SEEDS:
        raise UserError(
            f"seed is {recipe.seed}: too high for {captions.rows} captions, each has the next one, up to {SEEDS - 1}"
        )
    prints = []
    for model in (encoders.vae, teacher.vae, teacher.transformer):
        digest = hashlib.sha256()
        add_weights(digest, model)
        prints.append(digest.hexdigest()[:16])
    if prints[0] != prints[1]:
        raise UserError(
            "--teacher and --model have different VAEs, so different latents; choose a teacher with the same"
        )
    return {
        "source": captions.identity,
        "encoders": fingerprint(encoders),
        "dtype": dtype_of(encoders.text_encoder),
        "teacher": {"weights": prints[2], "dtype": dtype_of(teacher.transformer)},
        "recipe": {**asdict(recipe), "times": list(recipe.sampler(teacher).times)},
        "negative_prompt": teacher.defaults.negative_prompt,
    }


def synthesise(
    captions: Captions,
    encoders: Encoders,
    teacher: Teacher,
    recipe: Recipe,
    units: Units,
    batch_size: int = 1,
    mesh: Mesh | None = None,
    process: int = 0,
    processes: int = 1,
) -> bool:
    """Makes this process's share of the units that are not done yet.

    Args:
      captions: what is to be shown.
      encoders: what a record's conditions come from; a pipeline.
      teacher: a pipeline with its transformer.
      recipe: how.
      units: the folder; its identity is `describe`'s.
      batch_size: clips made at once.
      mesh: of the teacher's transformer.
      process, processes: which share.

    Returns:
      Whether all units are done, by whomever, and the folder can be read.
    """
    run = partial(_make, encoders=encoders, teacher=teacher, recipe=recipe, batch_size=batch_size, mesh=mesh)
    return fill(
        units,
        encoders,
        units.pending(process, processes),
        partial(in_turn, captions.read),
        lambda: [run],
        batch_size,
        size=lambda _: recipe.size,
        expected=captions.rows_of,
    )


def _make(
    prompts: list[Prompt], encoders: Encoders, teacher: Teacher, recipe: Recipe, batch_size: int, mesh: Mesh | None
) -> list[Encoded]:
    """Makes clips. The batch is filled up to `batch_size`, so that one program serves all."""
    padded = [prompts[min(i, len(prompts) - 1)] for i in range(batch_size)]
    texts, seeds = [prompt.caption for prompt in padded], [recipe.seed + prompt.number for prompt in padded]
    condition = teacher.condition(texts, None, *recipe.size)
    unconditional = None
    if recipe.guidance > 1:
        text, mask = teacher.encode_prompt([teacher.defaults.negative_prompt] * batch_size)
        unconditional = dataclasses.replace(condition, text=text, text_mask=mask)
    noise = jnp.concatenate([noise_of_seed(seed, teacher.latent_shape(1, *recipe.size))[0] for seed in seeds])
    inputs = sharding.beside((noise, condition, unconditional), mesh)
    latents = teacher.sample(*inputs, recipe.sampler(teacher))
    latents = jnp.asarray(np.asarray(latents))  # the decoder is on one device
    videos = np.asarray(teacher.decode(latents))
    pictures = videos[:, 0] if encoders.takes_image else None
    arrays = arrays_of(latents, encoders.condition(texts, pictures, *recipe.size))
    result = []
    for row, prompt in enumerate(prompts):
        recipe_of_clip = {**asdict(recipe), "seed": seeds[row]}
        about = {"caption": prompt.caption, **recipe_of_clip, "negative_prompt": teacher.defaults.negative_prompt}
        about |= {"row": dict(prompt.about)} if prompt.about else {}
        result.append(Encoded(prompt.id, {name: x[row] for name, x in arrays.items()}, about, videos[row]))
    return result
