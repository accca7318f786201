"""What a finished run leaves behind: a model directory with the trained part in it.

Every run writes `model/` in its workdir, a complete directory in the Diffusers layout: the parts that it trained, and
all others as they were. So the three trainings behind the tiny model hand a directory on, and a student is a directory
that Diffusers loads.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vpae_jax.data.batches import to_float
from vpae_jax.flow.sampler import Sampler
from vpae_jax.models import presets
from vpae_jax.models.clip import CLIPVision
from vpae_jax.models.umt5 import UMT5Encoder
from vpae_jax.models.wan_dit import WanTransformer, WanTransformerConfig
from vpae_jax.tasks.digits.clips import MovingDigits
from vpae_jax.tasks.digits.words import build_tokenizer
from vpae_jax.train.roles import split
from vpae_jax.types import Params
from vpae_jax.weights.card import Provenance
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.find import find_model
from vpae_jax.weights.layout import Contents, write_model
from vpae_jax.weights.loading import build as build_part
from vpae_jax.weights.lora import Lora, Merged
from vpae_jax.weights.parts import LOW
from vpae_jax.weights.settings import Defaults, Scheduler
from vpae_jax.weights.writing import Values, from_tree

FOLDER = "model"
STATISTICS_CLIPS = 256
APART = 1e-4  # between two experts' boundary and the nearest time
# The tiny clip: 9 frames of 48x48, shown slowly enough to be followed.
TINY_CLIP = Defaults(num_frames=9, height=48, width=48, fps=8.0)


def write_autoencoder(workdir: Path, preset: str, params: Params, clips: MovingDigits, scheduler: Scheduler) -> Path:
    """A first model directory: the trained autoencoder, the tokenizer, and untrained weights for all other parts.

    The autoencoder's latents are normalised by the mean and standard deviation over `clips`.
    """
    sizes = presets.find(preset)
    vae = dataclasses.replace(sizes.vae, **latent_statistics(sizes.vae, params, clips))
    rngs = nnx.Rngs(0)
    fresh: dict[str, Any] = {
        "transformer": (sizes.transformer, WanTransformer(sizes.transformer, rngs=rngs)),
        "text_encoder": (sizes.text_encoder, UMT5Encoder(sizes.text_encoder, rngs=rngs)),
    }
    if sizes.image_encoder is not None:
        fresh["image_encoder"] = (sizes.image_encoder, CLIPVision(sizes.image_encoder, rngs=rngs))
    parts = {name: from_tree(name, config, split(model)[1]) for name, (config, model) in fresh.items()}
    parts["vae"] = from_tree("vae", vae, params)
    with tempfile.TemporaryDirectory() as source:
        build_tokenizer(Path(source) / "tokenizer")
        return _write(workdir, Contents(find_model(Path(source)), parts, scheduler, TINY_CLIP))


def write_encoders(workdir: Path, preset: str, params: Params, source: Path) -> Path:
    """The source with the trained text and image encoders."""
    sizes = presets.find(preset)
    names = ("text_encoder", "image_encoder")
    parts = {name: from_tree(name, getattr(sizes, name), params[name]) for name in names}
    return _write(workdir, Contents(find_model(source), parts))


@dataclass(frozen=True)
class Trained:
    """A trained transformer.

    Attributes:
      params: its weights, or those that its adapters are added to.
      lora: its adapters (`weights.lora.from_adapters`); None without.
    """

    params: Params
    lora: Lora | None = None

    def values(self, config: WanTransformerConfig) -> Values:
        """What is written: adapters merged, in the float32 in which they were trained."""
        values = from_tree("transformer", config, self.params)
        return values if self.lora is None else Merged(values, self.lora, changed_dtype=np.dtype(np.float32))


def write_student(
    workdir: Path,
    base: ModelDirectory,
    trained: Trained,
    sampler: Sampler,
    shift: float = 1.0,
    low: Trained | None = None,
    boundary: float | None = None,
) -> Path:
    """The model directory of a student.

    Args:
      workdir: the run's; the directory is `model/` in it.
      base: the model that the run started from: all parts but the transformers.
      trained: the transformer; of two experts the one for times from `boundary` on. One with adapters is written
        merged, and if it is the only one, the adapters as a LoRA file beside it, for the base.
      sampler: how the student is sampled.
      shift: of even times, for other numbers of steps than the sampler's (`Scheduler.of`).
      low: the second expert.
      boundary: time in (0, 1) between two experts; given if `low` is.
    """
    if (low is None) != (boundary is None):
        raise ValueError("a second expert and a boundary belong together")
    config = base.part("transformer").config
    others = dataclasses.replace(base, parts={n: s for n, s in base.parts.items() if n != LOW}, boundary=None)
    parts = {"transformer": trained.values(config)}
    if low is not None and boundary is not None:
        parts[LOW], boundary = low.values(config), _apart(boundary, sampler)
    lora = trained.lora if low is None else None
    return _write(workdir, Contents(others, parts, Scheduler.of(sampler, shift), boundary=boundary, lora=lora))


def _apart(boundary: float, sampler: Sampler) -> float:
    """The boundary, a little lower where it is one of the times, which in float32 may fall on either side of it."""
    return boundary - APART if any(abs(t - boundary) < APART for t in sampler.times) else boundary


def _write(workdir: Path, contents: Contents) -> Path:
    folder, base = workdir / FOLDER, contents.base
    contents.base.require_whole(contents.parts)
    given = Provenance(str(workdir), {"started from": str(base.path)} if base.parts else {})
    write_model(folder, dataclasses.replace(contents, provenance=given), overwrite=True)
    return folder


def latent_statistics(config: Any, params: Params, clips: MovingDigits) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation of each raw latent channel, as `latents_mean` and `latents_std`."""
    model = build_part("vae", config, params, jnp.float32)
    moments = jax.jit(lambda video: model.moments(video)[0])
    means = []
    for start in range(0, STATISTICS_CLIPS, 16):
        video = to_float(np.stack([clips[i]["video"] for i in range(start, start + 16)]))
        means.append(np.asarray(moments(jnp.asarray(video)), np.float64))
    values = np.concatenate(means).reshape(-1, config.z_dim)
    return {"latents_mean": tuple(values.mean(0).tolist()), "latents_std": tuple(values.std(0).tolist())}
