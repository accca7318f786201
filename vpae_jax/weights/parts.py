"""The parts of a model: their classes, conversion tables and configs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from vpae_jax.config import build
from vpae_jax.models.clip import CLIPVision, CLIPVisionConfig
from vpae_jax.models.tiny_decoder import TinyDecoder, TinyDecoderConfig
from vpae_jax.models.umt5 import UMT5Config, UMT5Encoder
from vpae_jax.models.wan_dit import WanTransformer, WanTransformerConfig
from vpae_jax.models.wan_vae import WanVAE, WanVAEConfig
from vpae_jax.types import MASK_CHANNELS, UserError
from vpae_jax.weights import infer, matching, names
from vpae_jax.weights.filenames import VERSION
from vpae_jax.weights.names import Layout, NameRow
from vpae_jax.weights.safetensors_file import StoredTensor, quote

# fmt: off
# Keys of a transformers config.json that do not change what an encoder computes at inference.
_TRANSFORMERS_KEYS = frozenset({
    "architectures", "attention_dropout", "classifier_dropout", "decoder_start_token_id", "dropout", "dropout_rate",
    "dtype", "eos_token_id", "initializer_factor", "initializer_range", "is_encoder_decoder", "model_type",
    "num_decoder_layers", "output_past", "pad_token_id", "projection_dim", "scalable_attention",
    "scale_decoder_outputs", "tie_word_embeddings", "tokenizer_class", "torch_dtype", "transformers_version",
    "use_cache",
})
# fmt: on


@dataclass(frozen=True)
class Part:
    """One part of a model.

    Attributes:
      model: our class.
      config: its config class, with the fields of the diffusers layout's config.json.
      rows: gives its conversion table for a config.
      infer: gives the config fields that follow from shapes.
      mark: one of our parameters whose name identifies files with this part, in either layout.
      stem: file name of its weights in the diffusers layout, without suffix.
      wan_file: the same in the wan layout, with suffix.
      identity: entries of config.json that identify the class for diffusers or transformers.
      ignored: keys of config.json without effect here.
      fixed: keys of config.json for which only one value is supported.
      prefix: prefix of names in each layout; a file may have another prefix, or none.
      aliases: tensors of the diffusers layout that may replace another, or repeat it.
      extras: for each layout, a regular expression for tensors that no Wan model reads. They are kept unchanged, so
        that a complete file of the same layout can be written again.
      unwritten: fields of the config that diffusers does not know; written only if they differ from the default.
    """

    model: type
    config: type
    rows: Callable[[Any], tuple[NameRow, ...]]
    infer: Callable[[infer.Shapes], dict[str, Any]]
    mark: str
    stem: str
    wan_file: str
    identity: Mapping[str, Any]
    ignored: frozenset[str] = frozenset()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    prefix: Mapping[Layout, str] = field(default_factory=lambda: {"diffusers": "", "wan": ""})
    aliases: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[Layout, str] = field(default_factory=dict)
    unwritten: tuple[str, ...] = ()

    def is_extra(self, layout: Layout, name: str) -> bool:
        """Whether a tensor, by its full name, is one that no Wan model reads."""
        return layout in self.extras and re.search(self.extras[layout], name) is not None


# The second of two experts, for timesteps below the boundary; Diffusers' name.
LOW = "transformer_2"
_TRANSFORMER = Part(
    model=WanTransformer,
    config=WanTransformerConfig,
    rows=lambda config: names.TRANSFORMER_ROWS,
    infer=infer.transformer,
    mark="blocks/attn1/to_q/kernel",
    stem="diffusion_pytorch_model",
    wan_file="diffusion_pytorch_model.safetensors",
    identity={"_class_name": "WanTransformer3DModel", "_diffusers_version": VERSION},
    extras={"diffusers": r"\.attn2\.norm_added_q\.weight$"},
    unwritten=("text_len",),
)

PARTS: Mapping[str, Part] = {
    "transformer": _TRANSFORMER,
    LOW: _TRANSFORMER,
    "vae": Part(
        model=WanVAE,
        config=WanVAEConfig,
        rows=lambda config: names.vae_rows(len(config.dim_mult), config.num_res_blocks),
        infer=infer.vae,
        mark="encoder/mid_block/resnets/0/conv1/kernel",
        stem="diffusion_pytorch_model",
        wan_file="Wan2.1_VAE.pth",
        identity={"_class_name": "AutoencoderKLWan", "_diffusers_version": VERSION},
    ),
    "text_encoder": Part(
        model=UMT5Encoder,
        config=UMT5Config,
        rows=lambda config: names.TEXT_ENCODER_ROWS,
        infer=infer.text_encoder,
        mark="blocks/attention/relative_attention_bias/embedding",
        stem="model",
        wan_file="models_t5_umt5-xxl-enc-bf16.pth",
        identity={"architectures": ["UMT5EncoderModel"], "model_type": "umt5"},
        ignored=_TRANSFORMERS_KEYS,
        fixed={"dense_act_fn": "gelu_new", "is_gated_act": True, "is_decoder": False},
        aliases={"encoder.embed_tokens.weight": "shared.weight"},
        extras={"diffusers": r"^(spiece_model|decoder\..*|lm_head\.weight)$"},
    ),
    "image_encoder": Part(
        model=CLIPVision,
        config=CLIPVisionConfig,
        rows=lambda config: names.IMAGE_ENCODER_ROWS,
        infer=infer.image_encoder,
        mark="pre_layrnorm/scale",
        stem="model",
        wan_file="models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        identity={"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"},
        ignored=_TRANSFORMERS_KEYS,
        prefix={"diffusers": "vision_model.", "wan": "visual."},
        extras={
            "diffusers": r"(\.position_ids|^(visual_projection\.weight|text_model\..*|text_projection.*|logit_scale))$",
            "wan": r"^(textual\..*|log_scale|.*visual\.head(\..*)?)$",
        },
    ),
    "decoder": Part(
        model=TinyDecoder,
        config=TinyDecoderConfig,
        rows=lambda config: names.DECODER_ROWS,
        infer=infer.decoder,
        mark="levels/0/blocks/0/conv1/kernel",
        stem="diffusion_pytorch_model",
        wan_file="taew2_1.pth",
        identity={"_class_name": "TAEHV"},
        extras={"diffusers": r"^encoder\.", "wan": r"^encoder\."},
    ),
}

# Bounds far beyond any model, for fields that weights do not determine, or that are used before weights are checked.
MAX_LENGTH = 256
_LARGEST = {"num_res_blocks": 256, "text_len": 2**16, "rope_max_seq_len": 2**20}

# Keys of the wan layout's config.json, and the corresponding fields; all other keys must be without effect.
_WAN_KEYS = {
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "num_layers": "num_layers",
    "num_heads": "num_attention_heads",
    "text_dim": "text_dim",
    "patch_size": "patch_size",
    "eps": "eps",
    "text_len": "text_len",
    "cross_attn_norm": "cross_attn_norm",
    "dim": "width",
}
_WAN_MODEL_TYPES = ("t2v", "i2v", "flf2v")
CAUSAL = "CausalWanModel"
WAN_CLASSES = ("WanModel", CAUSAL)
# VideoX-Fun's classes of the same architecture, with names from Diffusers and keys from Wan.
_FUN_CLASSES = ("WanTransformer3DModel", "Wan2_2Transformer3DModel")
# Keys for which only one value is supported, and keys that do not affect weights: those of causal attention, whose
# models differ only in what their tokens see, and VideoX-Fun's, some of which keep their defaults for every model.
_WAN_FIXED = {"window_size": [-1, -1], "qk_norm": True, "add_control_adapter": False, "add_ref_conv": False}
_WAN_IGNORED = ("local_attn_size", "sink_size", "num_frame_per_block", "independent_first_frame", "in_channels")
_WAN_IGNORED += ("hidden_size", "in_dim_control_adapter", "downscale_factor_control_adapter", "in_dim_ref_conv")
_WAN_IGNORED += ("cross_attn_type",)


def kind_of(part: str) -> str:
    """The part that defines the class and table of a part: both experts are transformers."""
    return "transformer" if part == LOW else part


def makes_from_image(configs: Mapping[str, Any]) -> bool:
    """Whether parts with these configs belong to an image-to-video model."""
    transformer = configs.get("transformer", configs.get(LOW))
    return "image_encoder" in configs if transformer is None else transformer.in_channels > transformer.out_channels


def abstract(part: str, config: Any, dtype: DTypeLike = jnp.float32) -> tuple[nnx.GraphDef, nnx.State]:
    """A part's graph definition, and shapes in place of weights; nothing is allocated."""
    graph, state = _abstract(part, config, jnp.dtype(dtype))
    return graph, jax.tree.map(lambda leaf: leaf, state)  # the caller's own variables


@cache
def _abstract(part: str, config: Any, dtype: np.dtype) -> tuple[nnx.GraphDef, nnx.State]:
    kind = PARTS[part].model
    model = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype))
    return nnx.split(model, nnx.Param)


def flat(params: Any) -> dict[str, Any]:
    """Flattens nested dicts of arrays, or an `nnx.State`, to paths ("blocks/attn1/to_q/kernel")."""
    state = params if isinstance(params, nnx.State) else nnx.State(params)
    return {"/".join(str(key) for key in keys): value for keys, value in nnx.to_flat_state(state)}


def read_config(part: str, layout: Layout, values: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A part's config.json as fields of its config class (and `width`, in the wan layout).

    Keys that start with an underscore are ignored.

    Raises:
      UserError: another class, a key that this package does not know, a value that it does not support.
    """
    spec = PARTS[part]
    if layout == "wan":
        return _read_wan_config(values, path)
    for key in ("_class_name", "model_type"):
        expected = spec.identity.get(key)
        if expected is not None and values.get(key, expected) != expected:
            raise UserError(f"{path}: {key} is {quote(values[key])}, expected {expected!r}")
    for key, expected in spec.fixed.items():
        if values.get(key, expected) != expected:
            raise UserError(f"{path}: {key} is {quote(values[key])}, only {expected!r} is supported")
    skipped = spec.ignored | set(spec.fixed)
    return {key: value for key, value in values.items() if not key.startswith("_") and key not in skipped}


def is_wan_config(values: Mapping[str, Any]) -> bool:
    """Whether a transformer's config.json has Wan's own keys, and not those that Diffusers writes."""
    return values.get("_class_name") in WAN_CLASSES or "num_heads" in values


def config_notes(values: Mapping[str, Any], path: str) -> tuple[str, ...]:
    """Notes for the user about a model with this config.json."""
    if values.get("_class_name") != CAUSAL:
        return ()
    return (
        f"{path}: a {CAUSAL} is read as Wan's own model, whose frames see all others; it was trained with causal ones",
    )


def make_config(part: str, fields: Mapping[str, Any], sizes: Mapping[str, Any], path: str) -> Any:
    """Builds a part's config, and checks it against its weights.

    Args:
      part: a key of `PARTS`.
      fields: of the config class; `width`, which is not a field, is checked as well.
      sizes: fields that follow from the shapes of the weights (`Part.infer`).
      path: of the config, for messages.

    Raises:
      UserError: an unknown or ill-typed field, a size below 1, or a field that the weights contradict.
    """
    hints = get_type_hints(PARTS[part].config)
    for key, value in fields.items():
        if type(value) is int and value < 1 and hints.get(key) in (int, int | None):
            raise UserError(f"{path}: {key} is {value}, expected at least 1")
        if isinstance(value, list | tuple) and len(value) > MAX_LENGTH:
            raise UserError(f"{path}: {key} has {len(value)} entries, expected at most {MAX_LENGTH}")
    try:
        config = build(PARTS[part].config, {key: value for key, value in fields.items() if key != "width"}, path)
    except UserError as error:
        raise error if path in str(error) else UserError(f"{path}: {error}") from error
    for key, size in sizes.items():
        found = getattr(config, key)
        if key == "decoder_base_dim" and found == config.base_dim:
            found = None
        if found != size:
            raise UserError(f"{path}: {key} is {quote(found)}, but the weights imply {size!r}; which of them is wrong?")
    for key, most in _LARGEST.items():
        if getattr(config, key, 0) > most:
            raise UserError(f"{path}: {key} is {getattr(config, key)}, expected at most {most}")
    return config


def check_fit(configs: Mapping[str, Any], where: str, without: Container[str] = ()) -> None:
    """Raises `UserError` for parts that do not fit together. Missing parts are allowed, except the image encoder of an
    otherwise complete image-to-video model, unless it is listed in `without`."""
    transformer = configs.get("transformer")
    if transformer is None:
        return
    if configs.get(LOW, transformer) != transformer:
        raise UserError(f"{where}: {LOW} has another architecture than transformer; two experts must have the same")
    vae, text, image = (configs.get(name) for name in ("vae", "text_encoder", "image_encoder"))
    facts = []
    if text is not None:
        facts.append(("text_dim", transformer.text_dim, "text_encoder's d_model", text.d_model))
    if vae is not None:
        facts.append(("out_channels", transformer.out_channels, "vae's z_dim", vae.z_dim))
    if (decoder := configs.get("decoder")) is not None:
        facts.append(("out_channels", transformer.out_channels, "decoder's z_dim", decoder.z_dim))
    whole = text is not None and vae is not None and "image_encoder" not in without
    if image is not None or whole:
        width = None if image is None else image.hidden_size
        facts.append(("image_dim", transformer.image_dim, "image_encoder's hidden_size", width))
    for name, found, other, expected in facts:
        if found != expected:
            raise UserError(f"{where}: the transformer's {name} is {found}, but the {other} is {expected}")
    known = (transformer.out_channels, 2 * transformer.out_channels + MASK_CHANNELS)
    if transformer.in_channels not in known:
        raise UserError(
            f"{where}: the transformer's in_channels is {transformer.in_channels}, expected {known[0]} or {known[1]}"
        )


def config_json(config: Any, part: str) -> dict[str, Any]:
    """The config.json that diffusers or transformers read."""
    spec = PARTS[part]
    default = spec.config()
    values = dataclasses.asdict(config)
    hidden = [key for key in spec.unwritten if values[key] == getattr(default, key)]
    return {**spec.identity, **{key: value for key, value in values.items() if key not in hidden}}


def untold(part: str, config: Any) -> dict[str, Any]:
    """The fields of a part's config that cannot be recovered from a folder in the wan layout."""
    spec = PARTS[part]
    shapes = {path: tuple(leaf.shape) for path, leaf in flat(abstract(part, config)[1]).items()}
    parameters = matching.match(spec.rows(config), shapes, "wan")
    kind = np.dtype(np.float32)
    found = {name: StoredTensor(name, Path(), kind, p.op.their_shape(p.shape)) for p in parameters for name in p.names}
    guess = spec.infer(infer.Shapes(spec.rows(config), "wan", found, part))
    if kind_of(part) == "transformer":
        guess |= {field: getattr(config, field) for field in (*_WAN_KEYS.values(), "attention_head_dim")}
    else:  # Wan's constants, given the fields that have none
        guess = {**infer.assumed(kind_of(part), {**dataclasses.asdict(config), **guess}, part), **guess}
    default = spec.config()
    told = {key: guess.get(key, getattr(default, key)) for key in dataclasses.asdict(config)}
    return {key: value for key, value in dataclasses.asdict(config).items() if value != told[key]}


def wan_config_json(config: WanTransformerConfig) -> dict[str, Any]:
    """The config.json that Wan's own code reads."""
    kind = "t2v" if config.in_channels == config.out_channels else "i2v"
    kind = kind if config.pos_embed_seq_len is None else "flf2v"
    values = {ours: getattr(config, field) for ours, field in _WAN_KEYS.items()}
    # Wan's own configs leave these to defaults; write them only if they differ.
    default = WanTransformerConfig()
    hidden = [
        key for key in ("text_dim", "patch_size", "cross_attn_norm") if values[key] == getattr(default, _WAN_KEYS[key])
    ]
    values = {key: value for key, value in values.items() if key not in hidden}
    return {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": kind, **values}


def _read_wan_config(values: Mapping[str, Any], path: str) -> dict[str, Any]:
    name, kind = values.get("_class_name", "WanModel"), values.get("model_type", "t2v")
    if name not in (*WAN_CLASSES, *_FUN_CLASSES):
        raise UserError(f"{path}: _class_name is {quote(name)}, expected 'WanModel'")
    if kind not in _WAN_MODEL_TYPES:
        found = f"{values.get('_class_name')} of type {kind}"
        raise UserError(f"{path}: {quote(found)}, expected a WanModel of type {', '.join(_WAN_MODEL_TYPES)}")
    for key, expected in _WAN_FIXED.items():
        if values.get(key, expected) not in (expected, tuple(expected) if isinstance(expected, list) else expected):
            raise UserError(f"{path}: {key} is {quote(values[key])}, only {expected!r} is supported")
    known = {*_WAN_KEYS, *_WAN_FIXED, "model_type"}
    if unknown := [key for key in values if not key.startswith("_") and key not in {*known, *_WAN_IGNORED}]:
        raise UserError(f"{path}.{unknown[0]}: unknown key; expected one of {', '.join(sorted(known))}")
    fields = {field: values[key] for key, field in _WAN_KEYS.items() if key in values}
    width, heads = fields.get("width"), fields.get("num_attention_heads")
    if type(width) is not int or type(heads) is not int or heads < 1 or width % heads:
        raise UserError(
            f"{path}: dim is {quote(width)} and num_heads {quote(heads)}, expected dim to be a multiple of num_heads"
        )
    return {**fields, "attention_head_dim": width // heads}
