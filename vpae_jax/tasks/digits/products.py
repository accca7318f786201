"""Writes the model directories of the trainings behind the embedded model: autoencoder, and text and image encoders."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vpae_jax.data.batches import to_float
from vpae_jax.models import presets
from vpae_jax.models.clip import CLIPVision
from vpae_jax.models.umt5 import UMT5Encoder
from vpae_jax.models.wan_dit import WanTransformer
from vpae_jax.tasks.digits.clips import MovingDigits
from vpae_jax.tasks.digits.words import build_tokenizer
from vpae_jax.train.roles import split
from vpae_jax.types import Params
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.find import find_model
from vpae_jax.weights.layout import Contents, write_product
from vpae_jax.weights.loading import build as build_part
from vpae_jax.weights.settings import Defaults, Scheduler
from vpae_jax.weights.writing import from_tree

STATISTICS_CLIPS = 256
# The tiny clip: 9 frames of 48x48, at a rate that is slow enough to watch.
TINY_CLIP = Defaults(num_frames=9, height=48, width=48, fps=8.0)


def write_autoencoder(workdir: Path, preset: str, params: Params, clips: MovingDigits, scheduler: Scheduler) -> Path:
    """Writes the first model directory: the trained autoencoder, the tokenizer, and untrained weights for other parts.

    The autoencoder's latents are normalised by their mean and standard deviation over `clips`.
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
        return write_product(workdir, Contents(find_model(Path(source)), parts, scheduler, TINY_CLIP))


def write_encoders(workdir: Path, preset: str, params: Params, source: ModelDirectory) -> Path:
    """Writes the source model with the trained text and image encoders."""
    sizes = presets.find(preset)
    names = ("text_encoder", "image_encoder")
    parts = {name: from_tree(name, getattr(sizes, name), params[name]) for name in names}
    return write_product(workdir, Contents(source, parts))


def latent_statistics(config: Any, params: Params, clips: MovingDigits) -> dict[str, tuple[float, ...]]:
    """Returns mean and standard deviation of each raw latent channel, as `latents_mean` and `latents_std`."""
    model = build_part("vae", config, params, jnp.float32)
    moments = jax.jit(lambda video: model.moments(video)[0])
    means = []
    for start in range(0, STATISTICS_CLIPS, 16):
        video = to_float(np.stack([clips[i]["video"] for i in range(start, start + 16)]))
        means.append(np.asarray(moments(jnp.asarray(video)), np.float64))
    values = np.concatenate(means).reshape(-1, config.z_dim)
    return {"latents_mean": tuple(values.mean(0).tolist()), "latents_std": tuple(values.std(0).tolist())}
