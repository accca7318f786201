"""Reads LoRA files of every dialect, recognised by the tensor names.

    PEFT      [transformer.]<module>.lora_A[.default].weight [rank, in]   .lora_B[.default].weight [out, rank]
    ComfyUI   diffusion_model.<module>.lora_down.weight                   .lora_up.weight   .alpha  .diff  .diff_b
    kohya     lora_unet_<module with _ for .>.lora_down.weight            .lora_up.weight   .alpha

`dialects.py` lists further prefixes. Modules may have the names of either layout. B times A is multiplied by alpha /
rank, or by 1 without an alpha. A `.diff` is the whole change of a weight, a `.diff_b` that of a bias, and LightX2V's
`.diff_m` that of a modulation.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np

from vpae_jax.models.wan_dit import WanTransformerConfig
from vpae_jax.types import HostArray, Note, UserError
from vpae_jax.weights import dialects, matching
from vpae_jax.weights.filenames import read_json
from vpae_jax.weights.lora import KERNEL_SUFFIX, Adapter, Change, Lora
from vpae_jax.weights.matching import LayerKey, Parameter
from vpae_jax.weights.names import TRANSFORMER_ROWS, Layout
from vpae_jax.weights.parts import abstract, flat
from vpae_jax.weights.safetensors_file import one_line, parse_json, quote
from vpae_jax.weights.tensors import Tensors, open_tensors

# Kinds of tensors by the end of their names: half an adapter (PEFT inserts the adapter's own name), its scale, or a
# whole change.
_KINDS = {
    "down": r"\.lora_(?:A|down)(?:\.\w+)?\.weight",
    "up": r"\.lora_(?:B|up)(?:\.\w+)?\.weight",
    "up_bias": r"\.lora_B(?:\.\w+)?\.bias",
    "alpha": r"\.alpha",
    "diff": r"\.diff",
    "diff_b": r"\.diff_b",
    "diff_m": r"\.diff_m",
}
_KIND = re.compile("(?P<module>.+?)(?:" + "|".join(f"(?P<{kind}>{end})" for kind, end in _KINDS.items()) + ")")
_SUFFIX = {"up_bias": "_bias", "diff_b": "_bias", "diff_m": "_modulation"}
_BLOCK = re.compile(r"blocks_(\d+)_")
_DOUBT = "; is the LoRA for another model?"
_EXPECTED = "lora_A, lora_B, lora_down, lora_up, alpha, diff, diff_b, diff_m"
# A layer's name in PEFT's patterns.
_PATTERN = re.compile(r"(?P<start>\^?)(?P<name>(?:\w|\\?\.)+)\$?")
METADATA, PEFT_CONFIG = "lora_adapter_metadata", "adapter_config.json"


def read_lora(path: Path, config: WanTransformerConfig) -> Lora:
    """Reads a LoRA file of any dialect, recognised by its content.

    Args:
      path: a safetensors file, or a PyTorch checkpoint.
      config: of the transformer that it is for.

    Raises:
      UserError: a file that cannot be read, or is not a LoRA; a tensor of unknown kind, or for a layer that the model
        does not have; half an adapter; a shape that does not fit; a value that is not finite.
    """
    adapters: dict[LayerKey, Adapter] = {}
    differences: dict[LayerKey, Change] = {}
    scales: dict[LayerKey, float] = {}
    with open_tensors(path) as tensors:
        peft = _peft(path, tensors)
        pieces = _pieces(path, tensors, config)
        for (ours, layer), piece in pieces.items():
            if "down" not in piece.names:
                continue
            down, up = _pair(tensors, piece)
            scales[ours, layer] = _scale(path, tensors, piece, peft)
            up = _scaled(tensors, piece.names["up"], up, scales[ours, layer])
            if down.ndim == 2:
                adapters[ours.removesuffix(KERNEL_SUFFIX), layer] = Adapter(down.T, up.T)
            else:  # a convolution
                product = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
                product = product.reshape(len(up), *down.shape[1:])
                differences[ours, layer] = piece.parameter.op.to_ours(product)
        for (ours, layer), piece in pieces.items():
            if "down" not in piece.names:
                beside = scales.get((ours.removesuffix("/bias") + KERNEL_SUFFIX, layer))
                differences[ours, layer] = _whole(tensors, piece, beside)
    return Lora(adapters, differences)


@dataclass(frozen=True)
class _Piece:
    """The tensors of a file for one parameter of one layer.

    Attributes:
      parameter: the parameter.
      module: its name in the file, without prefix.
      names: the tensors that change it, by kind.
    """

    parameter: Parameter
    module: str
    names: dict[str, str] = field(default_factory=dict)


def _pieces(path: Path, tensors: Tensors, config: WanTransformerConfig) -> dict[LayerKey, _Piece]:
    """All tensors of a file, grouped by the parameter that they change."""
    targets, pieces = _targets(config), {}
    names = [name for name in tensors if not dialects.is_critic(name)]
    if not any(_KIND.fullmatch(name) for name in names):
        raise UserError(f"{path}: none of its {len(tensors)} tensors is part of a LoRA; is it a whole model?")
    if left := len(tensors) - len(names):
        warnings.warn(f"{path}: read without {left} tensors of the critic's adapters", Note, stacklevel=3)
    for name in names:
        if (match := _KIND.fullmatch(name)) is None or (kind := match.lastgroup) is None:
            raise _bad(
                tensors, name, f"is of unknown kind, expected one of {_EXPECTED}; no other adapters are supported"
            )
        module = dialects.without_lora_prefix(match["module"])
        plain = module.replace(".", "_")
        target = targets.get(plain + _SUFFIX.get(kind, "_weight")) or (targets.get(plain) if kind == "diff" else None)
        if target is None:
            block, last = _BLOCK.match(plain), config.num_layers - 1
            beyond = (
                f"block {block[1]}, but the last of this model is {last}" if block and int(block[1]) > last else None
            )
            raise _bad(tensors, name, f"is for {beyond or 'a layer that this model does not have'}{_DOUBT}")
        parameter, layer = target
        piece = pieces.setdefault((parameter.path, layer), _Piece(parameter, module))
        if kind in piece.names:
            raise _bad(tensors, name, f"and {quote(piece.names[kind])} are for the same layer; remove one")
        piece.names[kind] = name
    for piece in pieces.values():
        _check_kinds(tensors, piece)
    return pieces


def _targets(config: WanTransformerConfig) -> dict[str, tuple[Parameter, int]]:
    """Parameter and layer of every tensor of either layout, by its name with underscores for dots, as in kohya."""
    shapes = {path: tuple(leaf.shape) for path, leaf in flat(abstract("transformer", config)[1]).items()}
    return {
        name.replace(".", "_"): (parameter, layer)
        for layout in get_args(Layout)
        for parameter in matching.match(TRANSFORMER_ROWS, shapes, layout)
        for layer, name in enumerate(parameter.names)
    }


def _check_kinds(tensors: Tensors, piece: _Piece) -> None:
    """Raises `UserError` for half an adapter, and for changes that conflict."""
    names = piece.names
    adapter = {kind: name for kind, name in names.items() if kind in ("down", "up", "alpha")}
    first = next(iter(names.values()))
    if adapter and not {"down", "up"} <= adapter.keys():
        missing = "down (or A)" if "down" not in names else "up (or B)"
        raise _bad(tensors, first, f"has no matching lora_{missing}; the file is incomplete, fetch it again")
    if len(names) > max(len(adapter), 1):
        others = " and ".join(quote(name) for name in names.values())
        raise UserError(
            f"{tensors[first].file}: {others} change one parameter, expected one kind of change; remove one"
        )
    if adapter and not piece.parameter.op.kernel:
        raise _bad(tensors, first, f"is half an adapter, but {piece.parameter.path} is not a linear layer")


def _pair(tensors: Tensors, piece: _Piece) -> tuple[Change, Change]:
    """Both halves of an adapter, A first, in the file's layout."""
    out, *inner = piece.parameter.op.their_shape(piece.parameter.shape)
    down, up = _read(tensors, piece.names["down"]), _read(tensors, piece.names["up"])
    rank, ones = max((*down.shape, 1)[0], 1), [1] * (len(inner) - 1)
    for half, value, expected in (("down", down, [rank, *inner]), ("up", up, [out, rank, *ones])):
        found, name = list(value.shape), piece.names[half]
        if found == expected:
            continue
        if half == "up" and len(found) == len(expected) and [found[0], *found[2:]] == [out, *ones]:
            other = quote(piece.names["down"])
            raise _bad(tensors, name, f"has rank {found[1]}, but {other} has {rank}; fetch the file again")
        raise _bad(tensors, name, f"has shape {found}, expected {expected}{_DOUBT}")
    return down, up


def _whole(tensors: Tensors, piece: _Piece, beside: float | None) -> Change:
    """The whole change of a parameter, in our layout; `beside` is the scale of the same layer's adapter."""
    [(kind, name)] = piece.names.items()
    value, op = _read(tensors, name), piece.parameter.op
    if value.shape != (expected := op.their_shape(piece.parameter.shape)):
        raise _bad(tensors, name, f"has shape {list(value.shape)}, expected {list(expected)}{_DOUBT}")
    if kind == "up_bias":
        if beside is None:
            raise _bad(tensors, name, "has no matching adapter; the file is incomplete, fetch it again")
        value = _scaled(tensors, name, value, beside)
    return op.to_ours(value)


def _scale(path: Path, tensors: Tensors, piece: _Piece, peft: Mapping[str, Any]) -> float:
    """The factor of an adapter's product."""
    rank = tensors[piece.names["down"]].shape[0]
    if (name := piece.names.get("alpha")) is not None:
        value = _float32(tensors.read(name))
        if value.size != 1 or not np.isfinite(value).all():
            raise _bad(tensors, name, f"of shape {list(value.shape)} is not one finite number, expected an alpha")
        return value.item() / rank
    if "lora_alpha" not in peft:
        return 1.0
    try:
        patterns = dict(peft.get("alpha_pattern") or {}).items()
        matching = [alpha for pattern, alpha in patterns if _matches(pattern, piece.module)]
        alpha = float([*matching, peft["lora_alpha"]][0])
        if not abs(alpha) <= float(np.finfo(np.float32).max):
            raise ValueError(f"{alpha} is not a finite float32")
        return alpha / (math.sqrt(rank) if peft.get("use_rslora") else rank)
    except (OverflowError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: PEFT's alphas cannot be read ({one_line(str(error))}); correct or remove them"
        ) from error


def _matches(pattern: str, module: str) -> bool:
    """Whether a PEFT pattern is the name of a module, or the end of it; `^` anchors it at the start.

    PEFT runs patterns as regular expressions, which may take forever if they come from an untrusted file.

    Raises:
      ValueError: a pattern that is more than such a name.
    """
    if (match := _PATTERN.fullmatch(pattern)) is None:
        raise ValueError(f"alpha_pattern has {quote(pattern)}, expected the name of a layer")
    name = match["name"].replace("\\", "")
    return module == name or (not match["start"] and module.endswith("." + name))


def _peft(path: Path, tensors: Tensors) -> Mapping[str, Any]:
    """PEFT's configuration: from the file's metadata (written by diffusers), or from a file next to it (by PEFT)."""
    beside = path.parent / PEFT_CONFIG
    if METADATA in tensors.metadata:
        try:
            found = parse_json(tensors.metadata[METADATA].encode())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: its PEFT configuration is not valid JSON; correct or remove it") from error
    else:
        found = read_json(beside) if path.stem.startswith("adapter_model") and beside.is_file() else {}
    found = {key.removeprefix("transformer."): value for key, value in found.items()}
    if found.get("use_dora"):
        raise UserError(f"{path}: is a DoRA, which is not just a product of two matrices; expected a LoRA")
    return found


def _read(tensors: Tensors, name: str) -> Change:
    """A tensor in float32."""
    stored = tensors[name]
    if not jnp.issubdtype(stored.dtype, jnp.floating):
        raise _bad(
            tensors, name, f"has dtype {stored.dtype}, expected floating point; quantised LoRAs cannot be loaded"
        )
    value = _float32(tensors.read(name))
    if not np.isfinite(value).all():
        raise _bad(tensors, name, "holds NaN or infinity; the file is damaged, fetch it again")
    return value


def _float32(value: HostArray) -> Change:
    """A value in float32; infinity where it overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        return value.astype(np.float32)


def _scaled(tensors: Tensors, name: str, value: Change, scale: float) -> Change:
    """A tensor of a file times an adapter's scale."""
    with np.errstate(over="ignore", invalid="ignore"):
        value = value * np.float32(scale)
    if not np.isfinite(value).all():
        raise _bad(tensors, name, f"times its scale {scale:.3g} overflows float32; the file is damaged")
    return value


def _bad(tensors: Tensors, name: str, what: str) -> UserError:
    return UserError(f"{tensors[name].file}: tensor {quote(name)} {what}")
