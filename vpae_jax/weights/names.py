"""The conversion tables between tensors of published models and our parameters, one per part, used in both directions.

A row gives one of our parameters its name in each layout:

    diffusers   the folders of diffusers and transformers
    wan         Wan 2.1's own files, and the single files that others make from them

Our path is a regular expression that must match a whole path. A name is a template that may use its groups, and `{i}`
for the layer if our parameter stacks all layers along a leading axis. `Op` is the operation between the arrays.
`matching.py` applies the rows; `parts.py` assigns them to the parts of a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from vpae_jax.types import HostArray

Layout = Literal["diffusers", "wan"]
Shape = tuple[int, ...]
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Op:
    """An invertible operation between an array in a published model ("theirs") and one of our parameters ("ours").

    Attributes:
      kernel: theirs is `[out, in, *window]`, ours `[*window, in, out]`.
      leading: number of axes of size 1 at the start of theirs.
      trailing: number of axes of size 1 at the end of theirs.
      part: which part of their first axis is ours.
      parts: number of our parameters that theirs holds, one after the other.
    """

    kernel: bool = False
    leading: int = 0
    trailing: int = 0
    part: int = 0
    parts: int = 1

    def to_ours(self, value: HostArray) -> HostArray:
        """Our array, from our part of theirs."""
        value = value.reshape(value.shape[self.leading : value.ndim - self.trailing])
        return value.transpose(*range(2, value.ndim), 1, 0) if self.kernel else value

    def to_theirs(self, value: HostArray) -> HostArray:
        """Our part of their array; the inverse of `to_ours`."""
        if self.kernel:
            value = value.transpose(value.ndim - 1, value.ndim - 2, *range(value.ndim - 2))
        return value.reshape((*(1,) * self.leading, *value.shape, *(1,) * self.trailing))

    def their_shape(self, shape: Shape) -> Shape:
        """The shape of their whole array, given that of ours."""
        first, *rest = self._turned(shape)
        return (*(1,) * self.leading, first * self.parts, *rest, *(1,) * self.trailing)

    def our_shape(self, shape: Shape) -> Shape:
        """The shape of our array, given that of their whole array; raises `ValueError` if it does not fit."""
        inner = shape[self.leading : len(shape) - self.trailing]
        ones = shape[: self.leading] + shape[len(shape) - self.trailing :]
        if not inner or inner[0] % self.parts or any(size != 1 for size in ones) or (self.kernel and len(inner) < 2):
            raise ValueError(f"a tensor of shape {list(shape)} does not fit {self}")
        inner = (inner[0] // self.parts, *inner[1:])
        return (*inner[2:], inner[1], inner[0]) if self.kernel else inner

    def their_index(self, shape: Shape, index: Index = ()) -> Index:
        """The index into their array for an index into ours, which has this shape; by default all of ours."""
        full = [slice(*s.indices(n)[:2]) for s, n in zip((*index, *[slice(None)] * len(shape)), shape, strict=False)]
        first, *rest = self._turned(full)
        offset = self.part * self._turned(shape)[0]
        one = slice(0, 1)
        shifted = slice(first.start + offset, first.stop + offset)
        return (*[one] * self.leading, shifted, *rest, *[one] * self.trailing)

    def their_axes(self, axes: tuple[Any, ...]) -> tuple[Any, ...]:
        """Values for each of our axes (such as the mesh axes that shard it), in the order of their axes."""
        return (*[None] * self.leading, *self._turned(axes), *[None] * self.trailing)

    def _turned(self, axes: Any) -> tuple[Any, ...]:
        return (axes[-1], axes[-2], *axes[:-2]) if self.kernel else tuple(axes)


SAME, KERNEL = Op(), Op(kernel=True)


@dataclass(frozen=True)
class NameRow:
    """One line of a table.

    Attributes:
      ours: regular expression for our parameter's whole path.
      diffusers, wan: templates of tensor names; slashes from a group become dots.
      op: the operation between the arrays.
      wan_op: the operation for the wan layout, if it differs.
    """

    ours: str
    diffusers: str
    wan: str
    op: Op = SAME
    wan_op: Op | None = None

    def name(self, layout: Layout) -> str:
        return self.diffusers if layout == "diffusers" else self.wan

    def operation(self, layout: Layout) -> Op:
        return self.wan_op if layout == "wan" and self.wan_op is not None else self.op


def _affine(ours: str, diffusers: str, wan: str, part: int = 0, parts: int = 1) -> tuple[NameRow, NameRow]:
    """A layer with a matrix or convolution kernel, and its bias; `part` of `parts` in the wan layout."""
    fused = parts > 1
    return (
        NameRow(
            f"{ours}/kernel",
            f"{diffusers}.weight",
            f"{wan}.weight",
            KERNEL,
            Op(kernel=True, part=part, parts=parts) if fused else None,
        ),
        NameRow(
            f"{ours}/bias", f"{diffusers}.bias", f"{wan}.bias", SAME, Op(part=part, parts=parts) if fused else None
        ),
    )


def _norm(ours: str, diffusers: str, wan: str) -> tuple[NameRow, NameRow]:
    """A layer norm's scale and bias."""
    return (
        NameRow(f"{ours}/scale", f"{diffusers}.weight", f"{wan}.weight"),
        NameRow(f"{ours}/bias", f"{diffusers}.bias", f"{wan}.bias"),
    )


def _transformer() -> tuple[NameRow, ...]:
    embedder = "condition_embedder"
    image = f"{embedder}/image_embedder"
    theirs = f"{embedder}.image_embedder"
    rows = [
        *_affine("patch_embedding", "patch_embedding", "patch_embedding"),
        *_affine("proj_out", "proj_out", "head.head"),
        *_affine(f"{embedder}/time_proj", f"{embedder}.time_proj", "time_projection.1"),
        *_norm(f"{image}/norm1", f"{theirs}.norm1", "img_emb.proj.0"),
        *_affine(f"{image}/ff/proj_in", f"{theirs}.ff.net.0.proj", "img_emb.proj.1"),
        *_affine(f"{image}/ff/proj_out", f"{theirs}.ff.net.2", "img_emb.proj.3"),
        *_norm(f"{image}/norm2", f"{theirs}.norm2", "img_emb.proj.4"),
        NameRow(f"{image}/pos_embed", f"{theirs}.pos_embed", "img_emb.emb_pos"),
        NameRow("scale_shift_table", "scale_shift_table", "head.modulation"),
        NameRow("blocks/scale_shift_table", "blocks.{i}.scale_shift_table", "blocks.{i}.modulation"),
        *_norm("blocks/norm2", "blocks.{i}.norm2", "blocks.{i}.norm3"),
        *_affine("blocks/ffn/proj_in", "blocks.{i}.ffn.net.0.proj", "blocks.{i}.ffn.0"),
        *_affine("blocks/ffn/proj_out", "blocks.{i}.ffn.net.2", "blocks.{i}.ffn.2"),
        *_affine("blocks/attn2/add_([kv])_proj", r"blocks.{i}.attn2.add_\1_proj", r"blocks.{i}.cross_attn.\1_img"),
        NameRow(
            "blocks/attn2/norm_added_k/scale",
            "blocks.{i}.attn2.norm_added_k.weight",
            "blocks.{i}.cross_attn.norm_k_img.weight",
        ),
    ]
    for number, name in (("1", "self_attn"), ("2", "cross_attn")):
        ours, diffusers, wan = f"blocks/attn{number}", f"blocks.{{i}}.attn{number}", f"blocks.{{i}}.{name}"
        rows += [
            *_affine(f"{ours}/to_([qkv])", rf"{diffusers}.to_\1", rf"{wan}.\1"),
            *_affine(f"{ours}/to_out", f"{diffusers}.to_out.0", f"{wan}.o"),
            NameRow(f"{ours}/norm_([qk])/scale", rf"{diffusers}.norm_\1.weight", rf"{wan}.norm_\1.weight"),
        ]
    for kind in ("time", "text"):
        for number, index in (("1", "0"), ("2", "2")):
            layer = f"{kind}_embedder{{0}}linear_{number}"
            rows += _affine(
                f"{embedder}/{layer.format('/')}", f"{embedder}.{layer.format('.')}", f"{kind}_embedding.{index}"
            )
    return tuple(rows)


TRANSFORMER_ROWS = _transformer()


def vae_rows(levels: int, num_res_blocks: int) -> tuple[NameRow, ...]:
    """The autoencoder's table. The wan layout numbers all blocks of the decoder consecutively across levels.

    Args:
      levels: length of `dim_mult`.
      num_res_blocks: residual blocks per encoder level; a decoder level has one more, followed by an upsampling.
    """
    rows = [
        *_affine("quant_conv", "quant_conv", "conv1"),
        *_affine("post_quant_conv", "post_quant_conv", "conv2"),
        *_affine("(encoder|decoder)/conv_in", r"\1.conv_in", r"\1.conv1"),
        *_affine("(encoder|decoder)/conv_out", r"\1.conv_out", r"\1.head.2"),
        NameRow("(encoder|decoder)/norm_out/gamma", r"\1.norm_out.gamma", r"\1.head.0.gamma", Op(trailing=3)),
        *_attention(r"(encoder|decoder)/mid_block/attentions/0", r"\1.mid_block.attentions.0", r"\1.middle.1"),
        *_attention(r"encoder/down_blocks/(\d+)", r"encoder.down_blocks.\1", r"encoder.downsamples.\1"),
        *_resnet(r"encoder/down_blocks/(\d+)", r"encoder.down_blocks.\1", r"encoder.downsamples.\1"),
        *_resample(r"encoder/down_blocks/(\d+)", r"encoder.down_blocks.\1", r"encoder.downsamples.\1"),
    ]
    for number, index in ((0, 0), (1, 2)):
        ours, theirs = f"(encoder|decoder)/mid_block/resnets/{number}", rf"\1.mid_block.resnets.{number}"
        rows += _resnet(ours, theirs, rf"\1.middle.{index}")
    for level in range(levels):
        ours, theirs, first = f"decoder/up_blocks/{level}", f"decoder.up_blocks.{level}", level * (num_res_blocks + 2)
        for number in range(num_res_blocks + 1):
            name = f"resnets{{0}}{number}"
            rows += _resnet(
                f"{ours}/{name.format('/')}", f"{theirs}.{name.format('.')}", f"decoder.upsamples.{first + number}"
            )
        last = f"decoder.upsamples.{first + num_res_blocks + 1}"
        rows += _resample(f"{ours}/upsamplers/0", f"{theirs}.upsamplers.0", last)
    return tuple(rows)


def _resnet(ours: str, diffusers: str, wan: str) -> list[NameRow]:
    """A residual block of the autoencoder."""
    gamma = Op(trailing=3)
    return [
        NameRow(f"{ours}/norm1/gamma", f"{diffusers}.norm1.gamma", f"{wan}.residual.0.gamma", gamma),
        *_affine(f"{ours}/conv1", f"{diffusers}.conv1", f"{wan}.residual.2"),
        NameRow(f"{ours}/norm2/gamma", f"{diffusers}.norm2.gamma", f"{wan}.residual.3.gamma", gamma),
        *_affine(f"{ours}/conv2", f"{diffusers}.conv2", f"{wan}.residual.6"),
        *_affine(f"{ours}/conv_shortcut", f"{diffusers}.conv_shortcut", f"{wan}.shortcut"),
    ]


def _attention(ours: str, diffusers: str, wan: str) -> list[NameRow]:
    """An attention block of the autoencoder; its layers have the same names in all layouts."""
    return [
        NameRow(f"{ours}/norm/gamma", f"{diffusers}.norm.gamma", f"{wan}.norm.gamma", Op(trailing=2)),
        *_affine(f"{ours}/to_qkv", f"{diffusers}.to_qkv", f"{wan}.to_qkv"),
        *_affine(f"{ours}/proj", f"{diffusers}.proj", f"{wan}.proj"),
    ]


def _resample(ours: str, diffusers: str, wan: str) -> list[NameRow]:
    """A change of resolution in the autoencoder; element 0 of their Sequential pads or upsamples."""
    return [
        *_affine(f"{ours}/resample", f"{diffusers}.resample.1", f"{wan}.resample.1"),
        *_affine(f"{ours}/time_conv", f"{diffusers}.time_conv", f"{wan}.time_conv"),
    ]


def _text_encoder() -> tuple[NameRow, ...]:
    layer = "encoder.block.{i}.layer"
    names = {"wi_0": "ffn.gate.0", "wi_1": "ffn.fc1", "wo": "ffn.fc2"}
    return (
        NameRow("shared/embedding", "shared.weight", "token_embedding.weight"),
        NameRow(
            "blocks/attention/([qkvo])/kernel",
            rf"{layer}.0.SelfAttention.\1.weight",
            r"blocks.{i}.attn.\1.weight",
            KERNEL,
        ),
        NameRow(
            "blocks/attention/relative_attention_bias/embedding",
            f"{layer}.0.SelfAttention.relative_attention_bias.weight",
            "blocks.{i}.pos_embedding.embedding.weight",
        ),
        NameRow("blocks/attention/norm/scale", f"{layer}.0.layer_norm.weight", "blocks.{i}.norm1.weight"),
        *(
            NameRow(
                f"blocks/feed_forward/{ours}/kernel",
                f"{layer}.1.DenseReluDense.{ours}.weight",
                f"blocks.{{i}}.{wan}.weight",
                KERNEL,
            )
            for ours, wan in names.items()
        ),
        NameRow("blocks/feed_forward/norm/scale", f"{layer}.1.layer_norm.weight", "blocks.{i}.norm2.weight"),
        NameRow("final_layer_norm/scale", "encoder.final_layer_norm.weight", "norm.weight"),
    )


TEXT_ENCODER_ROWS = _text_encoder()


def _image_encoder() -> tuple[NameRow, ...]:
    layer, wan = "encoder.layers.{i}", "transformer.{i}"
    embeddings = "embeddings"
    rows = [
        NameRow("embeddings/class_embedding", f"{embeddings}.class_embedding", "cls_embedding", SAME, Op(leading=2)),
        NameRow(
            "embeddings/patch_embedding/kernel",
            f"{embeddings}.patch_embedding.weight",
            "patch_embedding.weight",
            KERNEL,
        ),
        NameRow(
            "embeddings/position_embedding/embedding",
            f"{embeddings}.position_embedding.weight",
            "pos_embedding",
            SAME,
            Op(leading=1),
        ),
        *_norm("pre_layrnorm", "pre_layrnorm", "pre_norm"),
        *_norm("post_layernorm", "post_layernorm", "post_norm"),
        *_norm("layers/layer_norm([12])", rf"{layer}.layer_norm\1", rf"{wan}.norm\1"),
        *_affine("layers/out_proj", f"{layer}.self_attn.out_proj", f"{wan}.attn.proj"),
        *_affine("layers/fc1", f"{layer}.mlp.fc1", f"{wan}.mlp.0"),
        *_affine("layers/fc2", f"{layer}.mlp.fc2", f"{wan}.mlp.2"),
    ]
    for part, name in enumerate("qkv"):
        rows += _affine(f"layers/{name}_proj", f"{layer}.self_attn.{name}_proj", f"{wan}.attn.to_qkv", part, 3)
    return tuple(rows)


IMAGE_ENCODER_ROWS = _image_encoder()


def _decoder() -> tuple[NameRow, ...]:
    """TAEHV's decoder, a sequence of modules: input; per level three blocks, an upsampling, a multiplication of frames
    and a change of width; output. Its names are the same in both layouts."""
    rows = [*_affine("conv_in", "decoder.1", "decoder.1"), *_affine("conv_out", "decoder.22", "decoder.22")]
    for level in range(3):
        first = 3 + 6 * level
        for block in range(3):
            for number in range(3):
                theirs = f"decoder.{first + block}.conv.{2 * number}"
                rows += _affine(f"levels/{level}/blocks/{block}/conv{number + 1}", theirs, theirs)
        for ours, theirs in (("grow", f"decoder.{first + 4}.conv"), ("conv", f"decoder.{first + 5}")):
            rows += _affine(f"levels/{level}/{ours}", theirs, theirs)
    return tuple(rows)


DECODER_ROWS = _decoder()
