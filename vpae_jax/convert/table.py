"""Which tensor of a published model is which of our parameters: one table a part, used in both directions.

A row reads `(our path, their name, operation)`. Our path is a regular expression that must match a whole path; their
name is a template that may use its groups, and `{i}` for the layer when our parameter stacks all layers along a
leading axis. Names are those of the safetensors files that diffusers and transformers write. `parts.py` says which
table belongs to which part of a model directory.

Every path must be met by exactly one row, and every tensor by exactly one path: `plan` and `check` raise otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
from jaxtyping import Shaped

from vpae_jax.types import UserError

Op = Literal["same", "kernel", "gamma2", "gamma3"]
Shape = tuple[int, ...]
Array = Shaped[np.ndarray, "..."]


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
      ours: regular expression of our parameter's whole path.
      theirs: template of their tensor's name; `{i}` is the layer number of a stacked parameter, and slashes that a
        group brings in become dots.
      op: how the two arrays differ. "same": not at all. "kernel": theirs is `[out, in, *window]`, ours
        `[*window, in, out]`. "gamma2" and "gamma3": theirs has that many trailing axes of size 1.
    """

    ours: str
    theirs: str
    op: Op = "same"


@dataclass(frozen=True)
class Entry:
    """One of our parameters and the tensors that it is made of.

    Attributes:
      path: our parameter's path.
      names: their tensors: one, or one a layer.
      shape: the shape of each of them.
      op: see `Row`.
      stacked: whether our parameter has a leading layer axis.
    """

    path: str
    names: tuple[str, ...]
    shape: Shape
    op: Op
    stacked: bool


def to_ours(op: Op, value: Array) -> Array:
    """Their array in our layout."""
    if op == "kernel":
        return value.transpose(*range(2, value.ndim), 1, 0)
    if op in ("gamma2", "gamma3"):
        return value.reshape(value.shape[0])
    return value


def to_theirs(op: Op, value: Array) -> Array:
    """Our array in their layout; the inverse of `to_ours`."""
    if op == "kernel":
        last = value.ndim - 1
        return value.transpose(last, last - 1, *range(last - 1))
    return value.reshape(their_shape(op, value.shape))


def their_shape(op: Op, shape: Shape) -> Shape:
    """The shape that our shape has in their file."""
    if op == "kernel":
        return (shape[-1], shape[-2], *shape[:-2])
    if op in ("gamma2", "gamma3"):
        return (*shape, *(1,) * int(op[-1]))
    return shape


def plan(rows: Sequence[Row], shapes: Mapping[str, Shape]) -> tuple[Entry, ...]:
    """Matches our parameters with their tensors.

    Args:
      rows: one part's table.
      shapes: our parameters' paths and shapes.

    Raises:
      ValueError: a parameter that no row, or more than one, describes, or two that claim one tensor: a mistake in the
        table, not in any file.
    """
    entries = []
    for path, shape in shapes.items():
        found = [(row, m) for row in rows if (m := re.fullmatch(row.ours, path))]
        if len(found) != 1:
            raise ValueError(f"conversion table: {len(found)} rows describe parameter {path!r}, expected 1")
        row, match = found[0]
        name = match.expand(row.theirs).replace("/", ".")
        if stacked := "{i}" in name:
            names, one = tuple(name.replace("{i}", str(i)) for i in range(shape[0])), shape[1:]
        else:
            names, one = (name,), shape
        entries.append(Entry(path, names, their_shape(row.op, one), row.op, stacked))
    claimed = sorted(name for entry in entries for name in entry.names)
    if twice := [name for name, group in groupby(claimed) if len(list(group)) > 1]:
        raise ValueError(f"conversion table: two parameters claim tensor {twice[0]!r}")
    return tuple(entries)


def check(entries: Sequence[Entry], found: Mapping[str, Shape], where: Mapping[str, str], folder: str) -> None:
    """Compares a plan with what files hold.

    Args:
      entries: a plan.
      found: the tensors' names and shapes.
      where: each tensor's file.
      folder: named where a tensor is missing altogether.

    Raises:
      UserError: a missing, unknown or misshapen tensor; the line names the first and counts the rest.
    """
    expected = {name: entry.shape for entry in entries for name in entry.names}
    if missing := [name for name in expected if name not in found]:
        shape = list(expected[missing[0]])
        raise UserError(f"{folder}: tensor {missing[0]!r} of shape {shape} is missing{_others(missing)}")
    if unknown := [name for name in found if name not in expected]:
        name = unknown[0]
        raise UserError(
            f"{where[name]}: tensor {name!r} of shape {list(found[name])} is unknown to this architecture"
            f"{_others(unknown)}; does config.json belong to these weights?"
        )
    if misshapen := [name for name in expected if tuple(found[name]) != tuple(expected[name])]:
        name = misshapen[0]
        raise UserError(
            f"{where[name]}: tensor {name!r} has shape {list(found[name])}, expected {list(expected[name])}"
            f"{_others(misshapen)}; does config.json belong to these weights?"
        )


def gather(entry: Entry, fetch: Callable[[str], Array], dtype: np.dtype | None) -> Array:
    """Our parameter, read tensor by tensor.

    Args:
      entry: the parameter.
      fetch: returns one of their tensors by name.
      dtype: of the result; None keeps the tensors' own (the widest, where layers differ).
    """
    first = to_ours(entry.op, fetch(entry.names[0]))
    if not entry.stacked:
        return np.ascontiguousarray(first, dtype)
    out = np.empty((len(entry.names), *first.shape), first.dtype if dtype is None else dtype)
    out[0] = first
    for i, name in enumerate(entry.names[1:], 1):
        one = to_ours(entry.op, fetch(name))
        if dtype is None and one.dtype != out.dtype:
            out = out.astype(np.promote_types(out.dtype, one.dtype), copy=False)
        out[i] = one
    return out


def scatter(entry: Entry, value: Array) -> Iterator[tuple[str, Array]]:
    """Their tensors, by name, from our parameter."""
    for name, one in zip(entry.names, value if entry.stacked else (value,), strict=True):
        yield name, np.ascontiguousarray(to_theirs(entry.op, one))


def _others(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _affine(ours: str, theirs: str, op: Op = "kernel") -> tuple[Row, Row]:
    """A layer with a matrix or convolution kernel, and its bias."""
    return Row(f"{ours}/kernel", f"{theirs}.weight", op), Row(f"{ours}/bias", f"{theirs}.bias")


def _norm(ours: str, theirs: str) -> tuple[Row, Row]:
    """A layer norm's scale and bias."""
    return Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")


_EMBEDDER, _IMAGE = "condition_embedder", "condition_embedder/image_embedder"

TRANSFORMER_ROWS: tuple[Row, ...] = (
    *_affine("(patch_embedding|proj_out)", r"\1"),
    *_affine(f"{_EMBEDDER}/(time|text)_embedder/(linear_[12])", rf"{_EMBEDDER}.\1_embedder.\2"),
    *_affine(f"{_EMBEDDER}/time_proj", f"{_EMBEDDER}.time_proj"),
    *_norm(f"{_IMAGE}/(norm[12])", rf"{_EMBEDDER}.image_embedder.\1"),
    *_affine(f"{_IMAGE}/ff/proj_in", f"{_EMBEDDER}.image_embedder.ff.net.0.proj"),
    *_affine(f"{_IMAGE}/ff/proj_out", f"{_EMBEDDER}.image_embedder.ff.net.2"),
    Row(f"{_IMAGE}/pos_embed", f"{_EMBEDDER}.image_embedder.pos_embed"),
    Row("scale_shift_table", "scale_shift_table"),
    Row("blocks/scale_shift_table", "blocks.{i}.scale_shift_table"),
    *_norm("blocks/norm2", "blocks.{i}.norm2"),
    *_affine("blocks/(attn[12])/(to_[qkv]|add_[kv]_proj)", r"blocks.{i}.\1.\2"),
    *_affine("blocks/(attn[12])/to_out", r"blocks.{i}.\1.to_out.0"),
    Row("blocks/(attn[12])/(norm_[qk]|norm_added_k)/scale", r"blocks.{i}.\1.\2.weight"),
    *_affine("blocks/ffn/proj_in", "blocks.{i}.ffn.net.0.proj"),
    *_affine("blocks/ffn/proj_out", "blocks.{i}.ffn.net.2"),
)

VAE_ROWS: tuple[Row, ...] = (
    *_affine("(.+/conv_in|.+/conv_out|(?:post_)?quant_conv)", r"\1"),
    *_affine("(.+/(?:conv1|conv2|conv_shortcut|time_conv|to_qkv|proj))", r"\1"),
    *_affine("(.+/resample)", r"\1.1"),  # their Sequential pads or upsamples first
    Row("(.+/(?:norm1|norm2|norm_out)/gamma)", r"\1", "gamma3"),
    Row("(.+/attentions/.+/norm/gamma|.+/down_blocks/.+/norm/gamma)", r"\1", "gamma2"),
)

TEXT_ENCODER_ROWS: tuple[Row, ...] = (
    Row("shared/embedding", "shared.weight"),
    Row("blocks/attention/([qkvo])/kernel", r"encoder.block.{i}.layer.0.SelfAttention.\1.weight", "kernel"),
    Row(
        "blocks/attention/relative_attention_bias/embedding",
        "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    Row("blocks/attention/norm/scale", "encoder.block.{i}.layer.0.layer_norm.weight"),
    Row("blocks/feed_forward/(wi_[01]|wo)/kernel", r"encoder.block.{i}.layer.1.DenseReluDense.\1.weight", "kernel"),
    Row("blocks/feed_forward/norm/scale", "encoder.block.{i}.layer.1.layer_norm.weight"),
    Row("final_layer_norm/scale", "encoder.final_layer_norm.weight"),
)

IMAGE_ENCODER_ROWS: tuple[Row, ...] = (
    Row("embeddings/class_embedding", "vision_model.embeddings.class_embedding"),
    Row("embeddings/patch_embedding/kernel", "vision_model.embeddings.patch_embedding.weight", "kernel"),
    Row("embeddings/position_embedding/embedding", "vision_model.embeddings.position_embedding.weight"),
    *_norm("(pre_layrnorm|post_layernorm)", r"vision_model.\1"),
    *_norm("layers/(layer_norm[12])", r"vision_model.encoder.layers.{i}.\1"),
    *_affine("layers/([qkv]_proj|out_proj)", r"vision_model.encoder.layers.{i}.self_attn.\1"),
    *_affine("layers/(fc[12])", r"vision_model.encoder.layers.{i}.mlp.\1"),
)
