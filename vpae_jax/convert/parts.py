"""The parts of a model directory: their models, their tables, and what their `config.json` may say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vpae_jax.config import build
from vpae_jax.convert import table
from vpae_jax.convert.files import read_json
from vpae_jax.models.clip import CLIPVision, CLIPVisionConfig
from vpae_jax.models.umt5 import UMT5Config, UMT5Encoder
from vpae_jax.models.wan_dit import WanTransformer, WanTransformerConfig
from vpae_jax.models.wan_vae import WanVAE, WanVAEConfig
from vpae_jax.types import UserError

# fmt: off
# Keys of a transformers config.json that do not change what an encoder computes at inference.
_TRANSFORMERS_KEYS = frozenset({
    "architectures", "attention_dropout", "classifier_dropout", "decoder_start_token_id", "dropout", "dropout_rate",
    "dtype", "eos_token_id", "initializer_factor", "initializer_range", "is_encoder_decoder", "model_type",
    "num_decoder_layers", "output_past", "pad_token_id", "projection_dim", "scalable_attention",
    "tie_word_embeddings", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
})
# fmt: on


@dataclass(frozen=True)
class Part:
    """One sub-folder of a model directory.

    Attributes:
      model: our class.
      config: its config class, whose fields are those of config.json.
      rows: its conversion table.
      stem: its weights' file name, without suffix.
      identity: entries of config.json by which diffusers or transformers know the class.
      ignored: keys of config.json that change nothing here.
      fixed: keys of config.json for which only one value is supported.
      prefix: start of every tensor name that some versions of the other library leave out.
      aliases: tensors that may stand for another, or repeat it.
      unused: suffixes of tensors that the other library does not use either.
    """

    model: type
    config: type
    rows: tuple[table.Row, ...]
    stem: str
    identity: Mapping[str, Any]
    ignored: frozenset[str] = frozenset()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


PARTS: Mapping[str, Part] = {
    "transformer": Part(
        model=WanTransformer,
        config=WanTransformerConfig,
        rows=table.TRANSFORMER_ROWS,
        stem="diffusion_pytorch_model",
        identity={"_class_name": "WanTransformer3DModel", "_diffusers_version": "0.33.0"},
        unused=(".attn2.norm_added_q.weight",),
    ),
    "vae": Part(
        model=WanVAE,
        config=WanVAEConfig,
        rows=table.VAE_ROWS,
        stem="diffusion_pytorch_model",
        identity={"_class_name": "AutoencoderKLWan", "_diffusers_version": "0.33.0"},
    ),
    "text_encoder": Part(
        model=UMT5Encoder,
        config=UMT5Config,
        rows=table.TEXT_ENCODER_ROWS,
        stem="model",
        identity={"architectures": ["UMT5EncoderModel"], "model_type": "umt5"},
        ignored=_TRANSFORMERS_KEYS,
        fixed={"dense_act_fn": "gelu_new", "is_gated_act": True, "is_decoder": False},
        aliases={"encoder.embed_tokens.weight": "shared.weight"},
    ),
    "image_encoder": Part(
        model=CLIPVision,
        config=CLIPVisionConfig,
        rows=table.IMAGE_ENCODER_ROWS,
        stem="model",
        identity={"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"},
        ignored=_TRANSFORMERS_KEYS,
        prefix="vision_model.",
        unused=(".position_ids",),
    ),
}


def read_config(path: Path, part: Part) -> Any:
    """A part's config.json as its config dataclass.

    Keys that start with an underscore are ignored; lists become tuples.

    Raises:
      UserError: a missing file, another class, a key that this package does not know, a value that it does not support.
    """
    values = read_json(path)
    for key in ("_class_name", "model_type"):
        expected = part.identity.get(key)
        if expected is not None and values.get(key, expected) != expected:
            raise UserError(f"{path}: {key} is {values[key]!r}, expected {expected!r}")
    for key, expected in part.fixed.items():
        if values.get(key, expected) != expected:
            raise UserError(f"{path}: {key} is {values[key]!r}, only {expected!r} is supported")
    skipped = part.ignored | set(part.fixed)
    known = {key: value for key, value in values.items() if not key.startswith("_") and key not in skipped}
    try:
        return build(part.config, known, str(path))
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from error


def config_json(config: Any, part: Part) -> dict[str, Any]:
    """The config.json that diffusers or transformers read."""
    return {**part.identity, **dataclasses.asdict(config)}
