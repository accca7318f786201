"""What other programs put into files of weights beside the weights, and into their names: one table for all readers.

words in names     FSDP, activation checkpointing and torch.compile wrap modules at any depth; whole networks get
                   prefixes, which a model's reader accepts whatever they are, and a LoRA's from a list
scales             of float8 weights (ComfyUI, LightX2V): the value is their product
of no use here     marks and scales of others' float8 products, Transformer Engine's state
left out, and said gates of FastWan's sparse attention
refused            what no Wan model computes with, and what is quantised to integers
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from vpae_jax.weights.names import Shape

# Modules that others wrap around modules, by the names under which they keep them.
_WRAPPERS = re.compile(r"(^|\.)(?:(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|_forward_module)\.)+")
# What LoRA files put before the name of a layer, in any number and order.
_LORA_WORDS = (
    "base_model",
    "diffusion_model",
    "dit",
    "generator",
    "generator_ema",
    "generator_lora",
    "model",
    "module",
)
_LORA_WORDS += ("net", "net_ema", "pipe", "transformer", "unet")
_LORA_PREFIX = re.compile(rf"(?:(?:{'|'.join(_LORA_WORDS)})\.)*(?:lora_(?:unet|transformer|dit)_+)?")
# A student's adversary or critic, which training programs keep beside it.
_CRITIC = re.compile(r"(critic|fake_score|discriminator)\w*\.")

_SCALE = re.compile(r"(?P<layer>.+)\.(?:scale_weight|weight_scale)")
_IDLE = re.compile(r"(?:.*\.)?(?:_extra_state|scaled_fp8|scale_input|input_scale|comfy_quant)")
_TOKENIZER = re.compile(r"(?:.*\.)?spiece_model")
_GATE = re.compile(r"(?:.*\.)?to_gate_compress\.(?:weight|bias)")
_REFUSED = (
    (r"int8_weight", "is quantised to int8, as TurboDiffusion does; fetch the weights before they were quantised"),
    (
        r"proj_l\.(?:weight|bias)",
        "is of sparse-linear attention (TurboDiffusion's SLA), which Wan does not have; fetch weights without it",
    ),
    (
        r"weight_scale_2|weight_scale_inv|qweight|wscales|weight\.(?:absmax|quant_map)|SCB",
        "belongs to weights that are quantised in blocks or to integers; fetch float8 or wider ones",
    ),
)
_REFUSALS = tuple((re.compile(rf"(?:.*\.)?(?:{pattern})"), what) for pattern, what in _REFUSED)

PATCH = (1, 2, 2)  # of every Wan 2.1 model


def plain(name: str) -> str:
    """A tensor's name without the words of wrapping modules."""
    return _WRAPPERS.sub(r"\1", name)


def without_lora_prefix(name: str) -> str:
    """The name of the layer that a LoRA file calls so."""
    return _LORA_PREFIX.sub("", name, count=1)


def is_critic(name: str) -> bool:
    """Whether a tensor is of a student's critic."""
    return _CRITIC.match(name) is not None


def is_idle(name: str) -> bool:
    """Whether a tensor is of no use here."""
    return _IDLE.fullmatch(name) is not None


def is_tokenizer(name: str) -> bool:
    """Whether a tensor is the bytes of a sentencepiece model, as ComfyUI keeps a tokenizer with its text encoder."""
    return _TOKENIZER.fullmatch(name) is not None


def is_gate(name: str) -> bool:
    """Whether a tensor belongs to a gate of FastWan's sparse attention."""
    return _GATE.fullmatch(name) is not None


def refusal(name: str) -> str | None:
    """Why no model with this tensor can be read; None where that is no reason."""
    return next((what for pattern, what in _REFUSALS if pattern.fullmatch(name)), None)


def scaled(name: str) -> str | None:
    """The tensor that another, of this name, scales; None for one that is no scale."""
    match = _SCALE.fullmatch(name)
    return None if match is None else f"{match['layer']}.weight"


def shape(name: str, found: Shape) -> Shape:
    """A tensor's shape as the released models have it: rCM and TurboDiffusion make patches tokens by a matrix."""
    if f".{name}".endswith(".patch_embedding.weight") and len(found) == 2 and found[1] % math.prod(PATCH) == 0:
        return (found[0], found[1] // math.prod(PATCH), *PATCH)
    return found


def words(names: Iterable[str]) -> list[str]:
    """Prefixes of names as a user calls them: their first words, where these tell them apart."""
    whole = [name.rstrip(".") or "one without a name" for name in names]
    first = [name.partition(".")[0] for name in whole]
    return first if len(set(first)) == len(first) else whole
