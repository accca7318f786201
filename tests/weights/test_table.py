"""The conversion tables: invertible operations, complete tables, and one line for every kind of mismatch."""

import dataclasses
import json
import math
from pathlib import Path

import diffusers
import numpy as np
import original_wan
import pytest
import torch
import transformers

from vpae_jax.models.clip import CLIPVisionConfig
from vpae_jax.models.presets import PRESETS
from vpae_jax.models.umt5 import UMT5Config
from vpae_jax.models.wan_dit import WanTransformerConfig
from vpae_jax.models.wan_vae import WanVAEConfig
from vpae_jax.types import UserError
from vpae_jax.weights.matching import check, match, rule, tensors
from vpae_jax.weights.names import NameRow, Op
from vpae_jax.weights.parts import PARTS, abstract, flat
from vpae_jax.weights.safetensors_file import StoredTensor

# An operation, a shape of ours, the shape of theirs.
OPS = [
    (Op(), (2, 3), (2, 3)),
    (Op(), (5,), (5,)),
    (Op(kernel=True), (5, 7), (7, 5)),
    (Op(kernel=True), (3, 4, 5, 7), (7, 5, 3, 4)),
    (Op(kernel=True), (2, 3, 4, 5, 7), (7, 5, 2, 3, 4)),
    (Op(trailing=2), (6,), (6, 1, 1)),
    (Op(trailing=3), (6,), (6, 1, 1, 1)),
    (Op(leading=2), (6,), (1, 1, 6)),
    (Op(leading=1), (4, 6), (1, 4, 6)),
    (Op(part=0, parts=3), (4,), (12,)),
    (Op(part=2, parts=3), (4,), (12,)),
    (Op(kernel=True, part=1, parts=3), (5, 4), (12, 5)),
    (Op(kernel=True, part=1, parts=2), (2, 3, 5, 4), (8, 5, 2, 3)),
    (Op(kernel=True, leading=1, trailing=1, part=1, parts=2), (5, 4), (1, 8, 5, 1)),
]


@pytest.mark.parametrize("op, ours, theirs", OPS)
def test_operations_are_inverse(op, ours, theirs):
    assert op.their_shape(ours) == theirs and op.our_shape(theirs) == ours
    whole = np.arange(math.prod(theirs)).reshape(theirs)
    piece = whole[op.their_index(ours)]
    value = op.to_ours(piece)
    assert value.shape == ours
    np.testing.assert_array_equal(op.to_theirs(value), piece)


@pytest.mark.parametrize("op, ours, theirs", OPS)
def test_a_slice_of_ours_is_found_in_theirs(op, ours, theirs):
    rng = np.random.default_rng(0)
    whole = np.arange(math.prod(theirs)).reshape(theirs)
    expected = op.to_ours(whole[op.their_index(ours)])
    for _ in range(50):
        bounds = [sorted(rng.integers(0, n + 1, 2).tolist()) for n in ours]
        index = tuple(slice(a if rng.random() < 0.8 else None, b if rng.random() < 0.8 else None) for a, b in bounds)
        index = index[: rng.integers(0, len(ours) + 1)]
        theirs_index = op.their_index(ours, index)
        assert all(type(s.start) is int and type(s.stop) is int and s.step is None for s in theirs_index)
        np.testing.assert_array_equal(op.to_ours(whole[theirs_index]), expected[index])


def test_fused_parts_make_up_their_tensor():
    whole = np.arange(12 * 5).reshape(12, 5)
    ops = [Op(kernel=True, part=part, parts=3) for part in range(3)]
    ours = [op.to_ours(whole[op.their_index((5, 4))]) for op in ops]
    np.testing.assert_array_equal(np.concatenate(ours, axis=1), whole.T)
    theirs = [op.to_theirs(value) for op, value in zip(ops, ours, strict=True)]
    np.testing.assert_array_equal(np.concatenate(theirs), whole)


def test_kernel_is_a_convolution_in_both_layouts():
    weight = np.arange(7 * 5 * 2 * 3).reshape(7, 5, 2, 3)  # out, in, rows, columns
    assert Op(kernel=True).to_ours(weight)[1, 2, 4, 6] == weight[6, 4, 1, 2]


def test_axes_follow_their_order():
    assert Op(kernel=True).their_axes(("row", "column", "in", "out")) == ("out", "in", "row", "column")
    assert Op(leading=1, trailing=2).their_axes(("a", "b")) == (None, "a", "b", None, None)


@pytest.mark.parametrize(
    "op, theirs",
    [
        (Op(kernel=True), (3,)),
        (Op(kernel=True), ()),
        (Op(), ()),
        (Op(parts=3), (10,)),
        (Op(trailing=1), (3, 2)),
        (Op(leading=2), (1, 2, 3)),
        (Op(trailing=2), (1,)),
        (Op(leading=1, trailing=1), (1,)),
    ],
)
def test_a_shape_that_an_operation_cannot_have(op, theirs):
    with pytest.raises(ValueError, match="does not fit"):
        op.our_shape(theirs)


ROWS = (
    NameRow("blocks/(a|b)/kernel", r"layers.{i}.\1.weight", r"l.{i}.\1", Op(kernel=True)),
    NameRow("head/(.+)/gamma", r"top.\1.gamma", r"t.\1", Op(trailing=3)),
    NameRow("table", "table", "tab"),
    NameRow("q", "q.weight", "qk", wan_op=Op(part=0, parts=2)),
    NameRow("k", "k.weight", "qk", wan_op=Op(part=1, parts=2)),
)
SHAPES = {"blocks/a/kernel": (3, 5, 7), "head/x/y/gamma": (4,), "table": (1, 2, 3), "k": (2, 6), "q": (2, 6)}
THEIRS = {
    "layers.0.a.weight": (7, 5),
    "layers.1.a.weight": (7, 5),
    "layers.2.a.weight": (7, 5),
    "top.x.y.gamma": (4, 1, 1, 1),
    "table": (1, 2, 3),
    "k.weight": (2, 6),
    "q.weight": (2, 6),
}
WAN = {"l.0.a": (7, 5), "l.1.a": (7, 5), "l.2.a": (7, 5), "t.x.y": (4, 1, 1, 1), "tab": (1, 2, 3), "qk": (4, 6)}


def shapes_of(parameters):
    """Shapes of all tensors of a plan, by name; every one of them held whole, by parts in order."""
    found = {}
    for name, holders in tensors(parameters).items():
        ops = [parameter.op for parameter, _ in holders]
        assert [op.part for op in ops] == list(range(ops[0].parts)), name
        [found[name]] = {op.their_shape(parameter.shape) for op, (parameter, _) in zip(ops, holders, strict=True)}
        assert all(parameter.names[layer] == name for parameter, layer in holders)
    return found


@pytest.mark.parametrize("layout, expected", [("diffusers", THEIRS), ("wan", WAN)])
def test_a_plan_names_every_tensor(layout, expected):
    parameters = match(ROWS, SHAPES, layout)
    assert {parameter.path: parameter.full_shape for parameter in parameters} == SHAPES
    assert [parameter.stacked for parameter in parameters] == [True, False, False, False, False]
    assert shapes_of(parameters) == expected


@pytest.mark.parametrize(
    "shapes, message",
    [
        ({"unheard/of": (1,)}, "0 rows describe parameter 'unheard/of'"),
        ({"table": (1,), "blocks/table/kernel": (1,)}, "0 rows"),
    ],
)
def test_a_parameter_without_a_row_is_a_mistake(shapes, message):
    with pytest.raises(ValueError, match=message):
        match(ROWS, shapes, "diffusers")


def test_ambiguous_rows_are_a_mistake():
    with pytest.raises(ValueError, match="2 rows describe parameter 'table'"):
        match((*ROWS, NameRow("tab.*", "other", "another")), {"table": (1,)}, "wan")
    with pytest.raises(ValueError, match="two parameters claim tensor 'one'"):
        match((NameRow("a|b", "one", "two"),), {"a": (1,), "b": (1,)}, "diffusers")
    with pytest.raises(ValueError, match="two parameters claim tensor 'two'"):
        match((NameRow("a|b", r"\g<0>", "two", wan_op=Op(parts=2)),), {"a": (1,), "b": (1,)}, "wan")


def found(shapes, **changes):
    """What a file holds: the names of `changes` have two underscores for every dot."""
    shapes = {**shapes, **{name.replace("__", "."): shape for name, shape in changes.items()}}
    return {
        name: StoredTensor(f"prefix.{name}", Path("file"), np.dtype(np.float32), shape)
        for name, shape in shapes.items()
        if shape is not None
    }


@pytest.mark.parametrize(
    "layout, holds, message",
    [
        ("diffusers", found(THEIRS, table=None), "folder: tensor 'table' of shape [1, 2, 3] is missing"),
        (
            "diffusers",
            found({"table": (1, 2, 3)}),
            "folder: tensor 'layers.0.a.weight' of shape [7, 5] is missing (and 5 more)",
        ),
        (
            "diffusers",
            found(THEIRS, layers__3__a__weight=(7, 5)),
            "file: tensor 'prefix.layers.3.a.weight' of shape [7, 5] is unknown to this architecture; "
            "does config.json belong to these weights?",
        ),
        (
            "diffusers",
            found(THEIRS, table=(1, 3, 2)),
            "file: tensor 'prefix.table' has shape [1, 3, 2], expected [1, 2, 3]; "
            "does config.json belong to these weights?",
        ),
        (
            "wan",
            found(WAN, qk=(2, 6), tab=(1,)),
            "file: tensor 'prefix.tab' has shape [1], expected [1, 2, 3] (and 1 more); "
            "does config.json belong to these weights?",
        ),
        ("wan", found(WAN, qk=None), "folder: tensor 'qk' of shape [4, 6] is missing"),
    ],
)
def test_mismatches_are_one_line(layout, holds, message):
    with pytest.raises(UserError) as error:
        check(match(ROWS, SHAPES, layout), holds, "folder")
    assert str(error.value) == message


@pytest.mark.parametrize("layout, expected", [("diffusers", THEIRS), ("wan", WAN)])
def test_a_match_passes(layout, expected):
    check(match(ROWS, SHAPES, layout), found(expected), "folder")


# Whole models, of which no weight is allocated.


def described(part, config, layout):
    """Names and shapes that a part's table gives, after every parameter was found in exactly one row."""
    spec = PARTS[part]
    rows, ours = spec.rows(config), flat(abstract(part, config)[1])
    for path in ours:
        rule(rows, path)
    names = shapes_of(match(rows, {path: tuple(leaf.shape) for path, leaf in ours.items()}, layout))
    assert sum(map(math.prod, names.values())) == sum(math.prod(leaf.shape) for leaf in ours.values())
    return names


def fields(config):
    """The config as config.json has it: lists in place of tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def diffusers_module(part, config):
    match part:
        case "transformer":
            known = {name: value for name, value in fields(config).items() if name != "text_len"}
            return diffusers.WanTransformer3DModel(**known)
        case "vae":
            return diffusers.AutoencoderKLWan(**fields(config))
        case "text_encoder":
            return transformers.UMT5EncoderModel(transformers.UMT5Config(**fields(config)))
        case _:
            return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**fields(config)))


def original_module(part, c):
    match part:
        case "transformer":
            image = c.image_dim is not None
            return original_wan.Transformer(
                "flf2v" if c.pos_embed_seq_len else "i2v" if image else "t2v",
                dim=c.width,
                ffn_dim=c.ffn_dim,
                freq_dim=c.freq_dim,
                in_dim=c.in_channels,
                out_dim=c.out_channels,
                num_heads=c.num_attention_heads,
                num_layers=c.num_layers,
                text_dim=c.text_dim,
                patch_size=c.patch_size,
                image_dim=c.image_dim or 1,
                image_tokens=(c.pos_embed_seq_len or 2) // 2,
            )
        case "vae":
            sizes = ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "temperal_downsample")
            return original_wan.VAE(**{name: getattr(c, name) for name in sizes})
        case "text_encoder":
            return original_wan.TextEncoder(
                vocab_size=c.vocab_size,
                dim=c.d_model,
                dim_attn=c.num_heads * c.d_kv,
                dim_ffn=c.d_ff,
                num_heads=c.num_heads,
                num_layers=c.num_layers,
                num_buckets=c.relative_attention_num_buckets,
            )
        case _:
            return original_wan.ImageEncoder(
                image_size=c.image_size,
                patch_size=c.patch_size,
                dim=c.hidden_size,
                mlp_ratio=c.intermediate_size // c.hidden_size,
                num_heads=c.num_attention_heads,
                num_layers=c.num_hidden_layers,
            )


FLF2V = dataclasses.replace(PRESETS["i2v-14b"].transformer, pos_embed_seq_len=514)
RELEASED = {
    **{f"transformer-{name}": ("transformer", preset.transformer) for name, preset in PRESETS.items()},
    "transformer-flf2v-14b": ("transformer", FLF2V),
    **{
        f"{part}-{name}": (part, getattr(PRESETS[name], part))
        for part in ("vae", "text_encoder", "image_encoder")
        for name in ("tiny", "i2v-14b")
    },
}
ODD = {
    "transformer-odd-t2v": (
        "transformer",
        WanTransformerConfig((1, 2, 2), 3, 14, 12, 8, text_dim=20, freq_dim=10, ffn_dim=22, num_layers=11),
    ),
    "transformer-odd-patch": (
        "transformer",
        WanTransformerConfig((2, 1, 3), 1, 6, text_dim=5, freq_dim=4, ffn_dim=7, num_layers=1),
    ),
    "transformer-odd-flf2v": (
        "transformer",
        WanTransformerConfig(
            num_attention_heads=5,
            attention_head_dim=6,
            in_channels=20,
            out_channels=8,
            text_dim=9,
            freq_dim=8,
            ffn_dim=33,
            num_layers=2,
            image_dim=15,
            added_kv_proj_dim=30,
            pos_embed_seq_len=22,
        ),
    ),
    "vae-deep": (
        "vae",
        WanVAEConfig(
            base_dim=6,
            dim_mult=(1, 3, 2, 5),
            num_res_blocks=3,
            temperal_downsample=(True, False, True),
            scale_factor_temporal=4,
            scale_factor_spatial=8,
        ),
    ),
    "vae-shallow": (
        "vae",
        WanVAEConfig(
            base_dim=4,
            z_dim=3,
            dim_mult=(2, 1),
            num_res_blocks=1,
            temperal_downsample=(False,),
            latents_mean=(0.0,) * 3,
            latents_std=(1.0,) * 3,
            scale_factor_temporal=1,
            scale_factor_spatial=2,
        ),
    ),
    "text_encoder-odd": (
        "text_encoder",
        UMT5Config(
            vocab_size=11, d_model=7, d_kv=3, d_ff=5, num_layers=12, num_heads=5, relative_attention_num_buckets=6
        ),
    ),
    "image_encoder-odd": (
        "image_encoder",
        CLIPVisionConfig(
            hidden_size=21,
            intermediate_size=63,
            num_hidden_layers=11,
            num_attention_heads=3,
            image_size=15,
            patch_size=5,
            hidden_act="gelu",
        ),
    ),
}
MODELS = {**RELEASED, **ODD}


@pytest.mark.parametrize("case", MODELS)
def test_every_tensor_of_diffusers_has_its_row(case):
    part, config = MODELS[case]
    with torch.device("meta"):
        theirs = diffusers_module(part, config).state_dict()
    theirs = {name.removeprefix("vision_model."): tuple(value.shape) for name, value in theirs.items()}
    assert described(part, config, "diffusers") == {n: s for n, s in theirs.items() if n not in PARTS[part].aliases}


@pytest.mark.parametrize("case", MODELS)
def test_every_tensor_of_wan_has_its_row(case):
    part, config = MODELS[case]
    with torch.device("meta"):
        theirs = original_module(part, config).state_dict()
    extras = {name for name in theirs if PARTS[part].is_extra("wan", name)}
    found = {PARTS[part].prefix["wan"] + name: shape for name, shape in described(part, config, "wan").items()}
    assert found == {name: tuple(value.shape) for name, value in theirs.items() if name not in extras}
    assert bool(extras) == (part == "image_encoder")
    assert all(name.startswith("textual.") or name in ("log_scale", "visual.head") for name in extras)
