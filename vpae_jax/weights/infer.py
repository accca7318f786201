"""Infers a part's sizes from the shapes of its tensors, for files without a config and to check those with one.

What shapes do not show is taken from Wan 2.1: heads of 128 channels in the transformer, 16 heads in the image encoder,
its normalisation of latents. `parts` in a `vpae_jax.json` next to the files overrides these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vpae_jax.types import UserError
from vpae_jax.weights.matching import template
from vpae_jax.weights.names import Layout, NameRow, Shape, vae_rows
from vpae_jax.weights.safetensors_file import StoredTensor

HEAD_DIM, IMAGE_HEADS, LATENT_CHANNELS = 128, 16, 16


class Shapes:
    """Shapes of our parameters, looked up in a file by their names in a layout.

    Args:
      rows: the part's conversion table.
      layout: the layout of the names in the file.
      found: its tensors, by their names in the table.
      where: the file, for messages.
    """

    def __init__(self, rows: Sequence[NameRow], layout: Layout, found: Mapping[str, StoredTensor], where: str):
        self.rows, self.found, self.where = rows, found, where
        self.layout: Layout = layout

    def get(self, path: str, rank: int) -> Shape | None:
        """Shape of a parameter without its layer axis; None if it is missing. Raises as `__call__`."""
        name, op = template(self.rows, path, self.layout)
        one = self.found.get(name.replace("{i}", "0"))
        if one is None:
            return None
        try:
            shape = op.our_shape(one.shape)
        except ValueError:
            shape = ()
        if len(shape) != rank or min(shape, default=0) < 1:
            raise UserError(f"{one.file}: tensor {one.name!r} has shape {list(one.shape)}, which no Wan 2.1 model has")
        return shape

    def __call__(self, path: str, rank: int) -> Shape:
        """The same for a parameter that every model has.

        Raises:
          UserError: it is missing, or its shape does not have `rank` axes in our layout.
        """
        shape = self.get(path, rank)
        if shape is None:
            name = template(self.rows, path, self.layout)[0].replace("{i}", "0")
            raise UserError(f"{self.where}: tensor {name!r} is missing; fetch the weights again")
        return shape

    def count(self, path: str) -> int:
        """Number of layers that have this parameter."""
        start = template(self.rows, path, self.layout)[0].split("{i}")[0]
        layers = {name[len(start) :].partition(".")[0] for name in self.found if name.startswith(start)}
        return sum(layer.isdecimal() for layer in layers)


def transformer(shapes: Shapes) -> dict[str, Any]:
    """Fields of `WanTransformerConfig` that follow from shapes."""
    *patch, in_channels, width = shapes("patch_embedding/kernel", 5)
    image = shapes.get("condition_embedder/image_embedder/norm1/scale", 1)
    positions = shapes.get("condition_embedder/image_embedder/pos_embed", 3)
    out = shapes("proj_out/kernel", 2)[1]
    return {
        "patch_size": tuple(patch),
        "in_channels": in_channels,
        "out_channels": out // math.prod(patch),
        "text_dim": shapes("condition_embedder/text_embedder/linear_1/kernel", 2)[0],
        "freq_dim": shapes("condition_embedder/time_embedder/linear_1/kernel", 2)[0],
        "ffn_dim": shapes("blocks/ffn/proj_in/kernel", 2)[1],
        "num_layers": shapes.count("blocks/ffn/proj_in/kernel"),
        "cross_attn_norm": shapes.get("blocks/norm2/scale", 1) is not None,
        "image_dim": None if image is None else image[0],
        "added_kv_proj_dim": None if image is None else width,
        "pos_embed_seq_len": None if positions is None else positions[1],
        "width": width,
    }


def vae(shapes: Shapes) -> dict[str, Any]:
    """Fields of `WanVAEConfig` that follow from shapes."""
    base = shapes("encoder/conv_in/kernel", 5)[-1]
    levels: list[tuple[int, int]] = [(0, 0)]  # residual blocks and channels of each
    temporal: list[bool] = []
    attention = set()
    block, path = 0, "encoder/down_blocks/{}/{}/kernel"
    while True:
        conv = shapes.get(path.format(block, "conv2"), 5)
        if conv is not None:
            levels[-1] = (levels[-1][0] + 1, conv[-1])
        elif shapes.get(path.format(block, "to_qkv"), 4) is not None:
            attention.add(0.5 ** (len(levels) - 1))
        elif shapes.get(path.format(block, "resample"), 4) is not None:
            temporal.append(shapes.get(path.format(block, "time_conv"), 5) is not None)
            levels.append((0, 0))
        else:
            break
        block += 1
    counts = {count for count, _ in levels}
    if len(counts) != 1 or 0 in counts or any(channels % base for _, channels in levels):
        raise UserError(f"{shapes.where}: the encoder's levels have {levels} blocks and channels; no Wan 2.1 VAE has")
    if attention and shapes.layout == "wan":
        raise UserError(f"{shapes.where}: attention outside the middle block is supported in the diffusers layout only")
    mult = tuple(channels // base for _, channels in levels)
    decoder_width = shapes("decoder/norm_out/gamma", 1)[0]
    return {
        "base_dim": base,
        "decoder_base_dim": None if decoder_width == base * mult[0] else decoder_width // mult[0],
        "z_dim": shapes("post_quant_conv/kernel", 5)[-1],
        "dim_mult": mult,
        "num_res_blocks": counts.pop(),
        "attn_scales": tuple(sorted(attention, reverse=True)),
        "temperal_downsample": tuple(temporal),
        "scale_factor_temporal": 2 ** sum(temporal),
        "scale_factor_spatial": 2 ** len(temporal),
    }


def text_encoder(shapes: Shapes) -> dict[str, Any]:
    """Fields of `UMT5Config` that follow from shapes."""
    vocabulary, width = shapes("shared/embedding", 2)
    buckets, heads = shapes("blocks/attention/relative_attention_bias/embedding", 2)
    inner = shapes("blocks/attention/q/kernel", 2)[1]
    if inner % heads:
        raise UserError(f"{shapes.where}: {inner} channels of attention do not divide into {heads} heads")
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": shapes("blocks/feed_forward/wi_0/kernel", 2)[1],
        "num_layers": shapes.count("blocks/feed_forward/wi_0/kernel"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def image_encoder(shapes: Shapes) -> dict[str, Any]:
    """Fields of `CLIPVisionConfig` that follow from shapes."""
    rows, _, channels, width = shapes("embeddings/patch_embedding/kernel", 4)
    patches = shapes("embeddings/position_embedding/embedding", 2)[0] - 1
    side = math.isqrt(max(patches, 0))
    if side * side != patches:
        raise UserError(f"{shapes.where}: {patches + 1} positions are not a square of patches plus a class token")
    return {
        "hidden_size": width,
        "intermediate_size": shapes("layers/fc1/kernel", 2)[1],
        "num_hidden_layers": shapes.count("layers/fc1/kernel"),
        "num_channels": channels,
        "image_size": side * rows,
        "patch_size": rows,
    }


def decoder(shapes: Shapes) -> dict[str, Any]:
    """Fields of `TinyDecoderConfig` that follow from shapes."""
    grown = [shapes(f"levels/{level}/grow/kernel", 4) for level in range(3)]
    if any(out % width for *_, width, out in grown):
        raise UserError(f"{shapes.where}: the decoder makes a fractional number of frames from one, unlike TAEHV")
    return {
        "z_dim": shapes("conv_in/kernel", 4)[-2],
        "widths": (*[width for *_, width, _ in grown], shapes("conv_out/kernel", 4)[-2]),
        "grows": tuple(out // width for *_, width, out in grown),
    }


def vae_table(layout: Layout, found: Mapping[str, StoredTensor], where: str) -> tuple[NameRow, ...]:
    """The autoencoder's conversion table, whose names depend on its depth."""
    sizes = vae(Shapes(vae_rows(1, 1), layout, found, where))
    return vae_rows(len(sizes["dim_mult"]), sizes["num_res_blocks"])


def assumed(part: str, sizes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Wan 2.1's values for fields that shapes do not show.

    Args:
      part: a key of `parts.PARTS`.
      sizes: known fields.
      where: the file, for messages.

    Raises:
      UserError: sizes that these values do not fit; the message says where to write the right number.
    """
    if part == "transformer":
        if sizes["width"] % HEAD_DIM and not {"num_attention_heads", "attention_head_dim"} <= set(sizes):
            raise UserError(
                f"{where}: no config.json, and the width {sizes['width']} is not a multiple of Wan's {HEAD_DIM} "
                "channels per head; add the model's config.json"
            )
        return {"num_attention_heads": sizes["width"] // HEAD_DIM, "attention_head_dim": HEAD_DIM}
    if part == "vae" and sizes["z_dim"] != LATENT_CHANNELS and not {"latents_mean", "latents_std"} <= set(sizes):
        raise UserError(
            f"{where}: {sizes['z_dim']} latent channels, but Wan's mean and deviation are for {LATENT_CHANNELS}; give "
            f"latents_mean and latents_std in vpae_jax.json"
        )
    if part == "image_encoder":
        if sizes["hidden_size"] % IMAGE_HEADS and "num_attention_heads" not in sizes:
            raise UserError(
                f"{where}: no config.json, and the width {sizes['hidden_size']} is not a multiple of Wan's "
                f"{IMAGE_HEADS} heads; give num_attention_heads in vpae_jax.json"
            )
        return {"num_attention_heads": IMAGE_HEADS, "hidden_act": "gelu"}
    return {}
