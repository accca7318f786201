"""Loads a model directory: every part onto its devices, and its settings for sampling."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from vpae_jax import sharding
from vpae_jax.inference import experts
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.inference.tokenizer import check_ids, load_tokenizer
from vpae_jax.runtime.platforms import compute_dtype
from vpae_jax.types import UserError
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.find import find_model
from vpae_jax.weights.image_processor import read_image_processor
from vpae_jax.weights.loading import left_part, load_part
from vpae_jax.weights.parts import check_fit, makes_from_image
from vpae_jax.weights.settings import read_defaults, read_scheduler


def load_pipeline(
    path: str | Path | ModelDirectory | None = None,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    with_transformer: bool = True,
    with_encoders: bool = True,
    vae_dtype: DTypeLike = jnp.float32,
    decoder: str | Path | None = None,
) -> Pipeline:
    """Loads a model.

    Args:
      path: a folder or file in any layout (`weights/find.py`), or `OWNER/NAME` of the Hugging Face hub; "tiny" or None
        for the model inside this package; or the result of `weights.find.find_model`.
      dtype: weights and compute dtype of the transformer and the encoders; by default bfloat16 on accelerators, and
        float32 on CPU.
      mesh: devices over which the transformer's weights and tokens are sharded (`sharding.TRANSFORMER_RULES`,
        `parallel.MeshLayout`) and the other parts replicated; the VAE splits the rows of a clip over `context` and
        `tensor` (`models.wan_vae_rows`). None uses the default device.
      with_transformer: False leaves the transformers' weights in their files and loads only shapes, for a caller that
        supplies other weights (`Pipeline.sample`'s denoiser).
      with_encoders: False does the same for the encoders, for a caller whose prompts are already encoded.
      vae_dtype: weights and compute dtype of the VAE; float32 by default, as in Wan's own code. Training data is
        encoded in float32. In bfloat16, decoding takes half to two thirds of the memory (docs/benchmarks.md), and the
        tiny model's video has a PSNR of 60 dB against float32's.
      decoder: path of a small decoder to use instead of the VAE's: TAEHV's file for Wan 2.1 (`taew2_1`), or the model
        directory that `configs/decoder.py` writes. It is loaded in `vae_dtype`.

    Raises:
      UserError: there is no Wan model, a part of it is missing or broken, or its parts do not fit together.
    """
    model, dtype = find_model(path), jnp.dtype(compute_dtype() if dtype is None else dtype)
    model.require_whole()
    check_fit({name: source.config for name, source in model.parts.items()}, str(model.path))
    with model.open_tokenizer() as folder:
        tokenizer = load_tokenizer(folder)
    check_ids(max(tokenizer.get_vocab().values(), default=0), model.part("text_encoder").config.vocab_size)
    load_encoder = load_part if with_encoders else left_part
    image_encoder, image_processor = None, None
    if "image_encoder" in model.parts:
        image_encoder = load_encoder(model, "image_encoder", dtype, experts.place(mesh, sharding.REPLICATED))
        image_processor = read_image_processor(model.image_processor, image_encoder.config.image_size)
    load = experts.load if with_transformer else experts.shapes
    transformer, transformer_2 = load(model, dtype, mesh)
    image = makes_from_image({name: source.config for name, source in model.parts.items()})
    tokenizer.model_max_length = min(tokenizer.model_max_length, transformer.config.text_len)
    scheduler = read_scheduler(model.folder, image)
    if scheduler.chunks is not None and transformer_2 is not None:
        raise UserError(f"{model.path}: is causal and has two experts, which is not supported; load one of them")
    small = None
    if decoder is not None:
        small = load_part(find_model(decoder), "decoder", vae_dtype, experts.place(mesh, sharding.REPLICATED))
        check_fit({"transformer": transformer.config, "decoder": small.config}, str(decoder))
    return Pipeline(
        small_decoder=small,
        transformer=transformer,
        vae=experts.load_vae(model, vae_dtype, mesh),
        text_encoder=load_encoder(model, "text_encoder", dtype, experts.place(mesh, sharding.REPLICATED)),
        image_encoder=image_encoder,
        tokenizer=tokenizer,
        image_processor=image_processor,
        scheduler=scheduler,
        defaults=read_defaults(model.folder, image),
        transformer_2=transformer_2,
        boundary=0.0 if model.boundary is None else model.boundary,
        directory=model,
    )
