"""What other programs add to weight files and tensor names, in one table for all readers.

words in names     FSDP, activation checkpointing and torch.compile wrap modules at any depth; whole networks get
                   prefixes: any prefix is accepted for a model, those on a list for a LoRA
scales             of float8 weights (ComfyUI, LightX2V): the weight is their product
ignored            markers and scales of float8 products in other programs, Transformer Engine's state
skipped, noted     gates of FastWan's sparse attention
rejected           tensors that no Wan model computes with, and integer quantisation
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from vpae_jax.weights.names import Shape

# Attribute names under which wrapper modules keep the wrapped module.
_WRAPPERS = re.compile(r"(^|\.)(?:(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|_forward_module)\.)+")
# Prefixes of layer names in LoRA files, in any number and order.
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
# A student's critic or discriminator, which training programs save along with it.
_CRITIC = re.compile(r"(critic|fake_score|discriminator)\w*\.")

_SCALE = re.compile(r"(?P<layer>.+)\.(?:scale_weight|weight_scale)")
_IDLE = re.compile(r"(?:.*\.)?(?:_extra_state|scaled_fp8|scale_input|input_scale|comfy_quant)")
_TOKENIZER = re.compile(r"(?:.*\.)?spiece_model")
_GATE = re.compile(r"(?:.*\.)?to_gate_compress\.(?:weight|bias)")
_REFUSED = (
    (r"int8_weight", "is quantised to int8, as by TurboDiffusion; fetch the unquantised weights"),
    (
        r"proj_l\.(?:weight|bias)",
        "belongs to sparse-linear attention (TurboDiffusion's SLA), which Wan does not have; fetch weights without it",
    ),
    (
        r"weight_scale_2|weight_scale_inv|qweight|wscales|weight\.(?:absmax|quant_map)|SCB",
        "belongs to weights that are quantised in blocks or to integers; fetch float8 or wider ones",
    ),
)
_REFUSALS = tuple((re.compile(rf"(?:.*\.)?(?:{pattern})"), what) for pattern, what in _REFUSED)

PATCH = (1, 2, 2)  # patch size of every Wan 2.1 model


def plain(name: str) -> str:
    """A tensor's name without the words of wrapper modules."""
    return _WRAPPERS.sub(r"\1", name)


def without_lora_prefix(name: str) -> str:
    """A layer's name in a LoRA file, without its prefixes."""
    return _LORA_PREFIX.sub("", name, count=1)


def is_critic(name: str) -> bool:
    """Whether a tensor belongs to a student's critic."""
    return _CRITIC.match(name) is not None


def is_idle(name: str) -> bool:
    """Whether a tensor can be ignored."""
    return _IDLE.fullmatch(name) is not None


def is_tokenizer(name: str) -> bool:
    """Whether a tensor holds the bytes of a sentencepiece model, which ComfyUI stores with its text encoder."""
    return _TOKENIZER.fullmatch(name) is not None


def is_gate(name: str) -> bool:
    """Whether a tensor belongs to a gate of FastWan's sparse attention."""
    return _GATE.fullmatch(name) is not None


def refusal(name: str) -> str | None:
    """Why a model with this tensor cannot be read; None if it can."""
    return next((what for pattern, what in _REFUSALS if pattern.fullmatch(name)), None)


def scaled(name: str) -> str | None:
    """The name of the tensor that a scale of this name applies to; None if it is not a scale."""
    match = _SCALE.fullmatch(name)
    return None if match is None else f"{match['layer']}.weight"


def shape(name: str, found: Shape) -> Shape:
    """A tensor's shape as in the released models: rCM and TurboDiffusion store the patch embedding as a matrix."""
    if f".{name}".endswith(".patch_embedding.weight") and len(found) == 2 and found[1] % math.prod(PATCH) == 0:
        return (found[0], found[1] // math.prod(PATCH), *PATCH)
    return found


def words(names: Iterable[str]) -> list[str]:
    """Prefixes of tensor names as users refer to them: their first words, if these are distinct."""
    whole = [name.rstrip(".") or "one without a name" for name in names]
    first = [name.partition(".")[0] for name in whole]
    return first if len(set(first)) == len(first) else whole
