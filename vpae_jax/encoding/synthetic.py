"""Generates a teacher's clips for captions, by guided sampling in many steps, and writes records like those of videos.

Each clip's noise is drawn from its own seed, the recipe's seed plus the caption's number, as in `Pipeline.__call__`.
With the recipe, which every record contains, `python -m vpae_jax.sample` reproduces the clip.
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
    """The part of `vpae_jax.inference.pipeline.Pipeline` that is used here, in addition to the encoders."""

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
    """How clips are generated.

    Attributes:
      steps: sampling steps; each takes one network evaluation, or two with guidance.
      guidance: w in `v_u + w (v_c - v_u)`, at least 1.
      solver: see `flow.sampler.Sampler`.
      shift: shift of an even time grid; None for the teacher's own timesteps.
      seed: seed of the first caption; each further caption adds 1.
      num_frames, height, width: size of a clip.

    Raises:
      UserError: an invalid number.
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
        """Returns the sampler for a teacher. Raises `UserError` for invalid numbers."""
        return teacher.sampler(self.steps, self.guidance, self.solver, self.shift)

    @property
    def size(self) -> tuple[int, int, int]:
        return self.num_frames, self.height, self.width


def describe(captions: Captions, encoders: Encoders, teacher: Teacher, recipe: Recipe) -> dict[str, Any]:
    """Returns everything that determines the records: the identity of their folder.

    Raises:
      UserError: the teacher and the encoders have different VAEs, the teacher cannot generate clips of that size, or
        there are not enough seeds for all captions.
    """
    teacher.latent_shape(1, *recipe.size)
    if recipe.seed + captions.rows > SEEDS:
        raise UserError(
            f"seed is {recipe.seed}: too high for {captions.rows} captions, whose seeds are consecutive and end at "
            f"{SEEDS - 1}"
        )
    prints = []
    for model in (encoders.vae, teacher.vae, teacher.transformer):
        digest = hashlib.sha256()
        add_weights(digest, model)
        prints.append(digest.hexdigest()[:16])
    if prints[0] != prints[1]:
        raise UserError(
            "--teacher and --model have different VAEs, so different latents; choose a teacher with the same VAE"
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
    """Generates this process's share of the units that are not done yet.

    Args:
      captions: the captions.
      encoders: the pipeline that computes a record's conditions.
      teacher: a pipeline with its transformer.
      recipe: how clips are generated.
      units: the folder; its identity must be that of `describe`.
      batch_size: clips generated at once.
      mesh: mesh of the teacher's transformer.
      process, processes: index of this process, and number of processes that divide the units.

    Returns:
      Whether all units are done (by any process) and the folder can be read.
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
    """Generates clips. The batch is padded to `batch_size`, so that a single compiled program suffices."""
    padded = [prompts[min(i, len(prompts) - 1)] for i in range(batch_size)]
    texts, seeds = [prompt.caption for prompt in padded], [recipe.seed + prompt.number for prompt in padded]
    condition = teacher.condition(texts, None, *recipe.size)
    unconditional = None
    if recipe.guidance > 1:
        text, mask = teacher.encode_prompt([teacher.defaults.negative_prompt] * batch_size)
        unconditional = dataclasses.replace(condition, text=text, text_mask=mask)
    noise = jnp.concatenate([noise_of_seed(seed, teacher.latent_shape(1, *recipe.size))[0] for seed in seeds])
    inputs = sharding.replicate((noise, condition, unconditional), mesh)
    latents = teacher.sample(*inputs, recipe.sampler(teacher))
    latents = jnp.asarray(np.asarray(latents))  # the decoder runs on one device
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
