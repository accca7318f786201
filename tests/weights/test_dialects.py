"""Files of transformers as training and serving programs leave them: names, sets, shapes, scales."""

import re

import numpy as np
import pytest
import torch
from finding import opened, prefixed, refused
from folders import edit_json, same, tensors, values, write

from vpae_jax.types import Note, UserError
from vpae_jax.weights.find import find_model

BIAS = "head.head.bias"


def bumped(state, by):
    """The same weights, one of which tells them apart."""
    return {**state, BIAS: state[BIAS] + by}


def wrapped(state):
    """Names as FSDP and activation checkpointing leave them, around the network and around every block of it."""
    inner = r"\g<0>_fsdp_wrapped_module._checkpoint_wrapped_module."
    return {f"model._fsdp_wrapped_module.{re.sub(r'^blocks.[0-9]+.', inner, n)}": v for n, v in state.items()}


def bias(path, weights=None):
    """What tells which weights were found."""
    return values(find_model(path, weights=weights), "transformer")["proj_out/bias[0]"]


@pytest.mark.parametrize(
    "rename",
    [
        wrapped,
        lambda state: prefixed("_orig_mod.", state),
        lambda state: prefixed("module._orig_mod.", state),
        lambda state: {n.replace("self_attn.", "_orig_mod.self_attn._forward_module."): v for n, v in state.items()},
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_wrapping_modules_leave_no_trace(tmp_path, wide, rename, suffix):
    path = write(tmp_path / f"x.{suffix}", rename(wide))
    assert same(values(path, "transformer"), values(write(tmp_path / "plain.pt", wide), "transformer"))


def test_a_name_twice_but_for_wrapping_modules(tmp_path, wide):
    path = write(tmp_path / "x.safetensors", wide | {f"_orig_mod.{BIAS}": wide[BIAS]})
    assert re.search(r"tensor '\S*head.head.bias' is '\S*head.head.bias' once more; remove one", refused(path))


def sets(wide):
    """Checkpoints with several sets of weights: by name, which of them those names choose."""
    generator, average = prefixed("model.", wide), wrapped(bumped(wide, 1))
    critic = prefixed("model.", bumped(wide, 3)) | {"cls_pred_branch.weight": torch.ones(2)}
    return {
        "self_forcing": (
            {"generator": generator, "critic": critic, "generator_ema": average, "step": 3},
            {"generator": 0, "generator_ema": 1, "ema": 1, "critic": 3},
        ),
        "model_and_ema": (
            {"model": wide, "ema": bumped(wide, 1), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
            {"model": 0, "ema": 1},
        ),
        "shadow": ({"model": wide, "ema": {"decay": 0.9, "shadow": bumped(wide, 1)}}, {"model": 0, "ema": 1}),
        "flat": (prefixed("net.", wide) | prefixed("net_ema.", bumped(wide, 1)), {"net": 0, "net_ema": 1, "ema": 1}),
        "inner": ({"state_dict": {"student": wide, "ema": bumped(wide, 1)}}, {"student": 0, "ema": 1}),
    }


@pytest.mark.parametrize("case", ["self_forcing", "model_and_ema", "shadow", "flat", "inner"])
def test_one_of_several_sets(tmp_path, wide, case):
    found, names = sets(wide)[case]
    torch.save(found, tmp_path / "x.pt")
    for name, offset in names.items():
        np.testing.assert_array_equal(bias(tmp_path / "x.pt", name), wide[BIAS].numpy() + np.float32(offset))
    line = refused(tmp_path / "x.pt")
    assert line.startswith(str(tmp_path)) and "hold the transformer; convert one of them with --weights=" in line
    assert line == refused(tmp_path)  # of the folder, too
    with pytest.raises(UserError, match=r"--weights=none: .* has no such set of weights; it has"):
        find_model(tmp_path / "x.pt", weights="none")


def test_a_set_alone_needs_no_name(tmp_path, wide):
    torch.save({"generator": prefixed("model.", wide), "step": torch.tensor(3)}, tmp_path / "x.pt")
    np.testing.assert_array_equal(bias(tmp_path / "x.pt"), wide[BIAS].numpy())
    np.testing.assert_array_equal(bias(tmp_path / "x.pt", "generator"), wide[BIAS].numpy())


def test_a_file_of_thousands_of_sets_is_refused(tmp_path):
    state = {f"a{i}.blocks.0.self_attn.q.weight": torch.ones(1) for i in range(65)}
    assert "holds 65 sets of weights, expected at most 64" in refused(write(tmp_path / "x.safetensors", state))


# rCM, TurboDiffusion, FastWan


@pytest.mark.parametrize("in_dim", [16, 36])
def test_patches_by_a_matrix(tmp_path, in_dim):
    state = wide_of(in_dim=in_dim)
    expected = values(write(tmp_path / "a" / "x.pt", state), "transformer")
    flat = {n: v.flatten(1) if n == "patch_embedding.weight" else v for n, v in state.items()}
    path = write(tmp_path / "b" / "x.pt", prefixed("net.", flat))
    assert same(values(path, "transformer"), expected)
    assert opened(path, "transformer").in_channels == in_dim
    with find_model(path).part("transformer").open() as found:
        rows = found.read("patch_embedding.weight", (slice(3, 5), slice(1, 4), slice(None), slice(0, 1)))
    np.testing.assert_array_equal(rows, state["patch_embedding.weight"][3:5, 1:4, :, :1].numpy())


def wide_of(**sizes):
    import original_wan

    torch.manual_seed(0)
    usual = {"dim": 128, "ffn_dim": 16, "freq_dim": 8, "num_heads": 1, "num_layers": 1, "text_dim": 8}
    return dict(original_wan.Transformer(**usual, **sizes).state_dict())


@pytest.mark.parametrize(
    "name, kind, message",
    [
        ("blocks.0.self_attn.attn_op.local_attn.proj_l.weight", torch.float32, "belongs to sparse-linear attention"),
        ("blocks.0.ffn.0.int8_weight", torch.int8, "is quantised to int8, as by TurboDiffusion"),
        ("blocks.0.ffn.0.weight_scale_2", torch.float32, "belongs to weights that are quantised in blocks"),
        ("blocks.0.ffn.0.weight_scale_inv", torch.float32, "belongs to weights that are quantised in blocks"),
        ("blocks.0.ffn.0.qweight", torch.int32, "belongs to weights that are quantised in blocks"),
    ],
)
def test_tensors_that_no_model_here_computes_with(tmp_path, wide, name, kind, message):
    path = write(tmp_path / "x.safetensors", wide | {name: torch.ones(2, dtype=kind)})
    assert refused(path).startswith(f"{path}: tensor '{name}' {message}")


def test_gates_of_sparse_attention_are_left_out_and_said(theirs, diffusers_folder):
    (path,) = (theirs / "transformer").glob("*.safetensors")
    gates = {f"blocks.{i}.to_gate_compress.{end}": torch.ones(24) for i in range(2) for end in ("weight", "bias")}
    write(path, tensors(theirs, "transformer") | gates)
    edit_json(theirs / "model_index.json", _class_name="WanDMDPipeline")
    with pytest.warns(Note) as notes:
        model = find_model(theirs)
    assert [str(note.message) for note in notes] == [
        f"{theirs / 'model_index.json'} is FastVideo's WanDMDPipeline, whose three steps are not in any file: "
        "sample it with --steps=3 --guidance=1 --solver=consistency",
        f"{path}: read without the 4 tensors of the gates of FastWan's sparse attention (to_gate_compress), and "
        "computed with full attention",
    ]
    assert same(values(model, "transformer"), values(diffusers_folder, "transformer"))


def test_what_is_of_no_use_is_left_out(tmp_path, wide):
    idle = {"scaled_fp8": torch.zeros(2), "blocks.0.ffn.0.comfy_quant": torch.ones(3, dtype=torch.uint8)}
    idle |= {"blocks.0.self_attn._extra_state": torch.ones(0), "blocks.0.ffn.0.input_scale": torch.ones(())}
    assert opened(write(tmp_path / "x.safetensors", wide | idle), "transformer").num_layers == 2


# Scaled float8


def scaled(state, name, shape):
    """Weights of blocks in float8 with scales, and the values that they stand for."""
    torch.manual_seed(1)
    found, expected = dict(state), dict(state)
    for key, value in state.items():
        if key.startswith("blocks.") and value.shape[:1] == (128,) and value.ndim == 2:
            scale = 0.001 + 0.01 * torch.rand(shape)
            wide = scale.reshape(-1, 1) if scale.numel() > 1 else scale
            found[key] = (value / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
            found[f"{key.removesuffix('weight')}{name}"] = scale
            expected[key] = found[key].float() * wide
    return found, expected


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    "name, shape", [("scale_weight", ()), ("scale_weight", (1,)), ("weight_scale", (128, 1)), ("weight_scale", (128,))]
)
def test_scaled_float8_is_the_product(tmp_path, wide, prefix, name, shape):
    found, expected = scaled(wide, name, shape)
    marks = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn), "blocks.0.self_attn.q.scale_input": torch.ones(())}
    path = write(tmp_path / "fp8.safetensors", prefixed(prefix, found | marks))
    right = values(write(tmp_path / "right.safetensors", expected), "transformer")
    assert same(values(path, "transformer"), right)
    with find_model(path).part("transformer").open() as tensors:
        part = tensors.read("blocks.1.ffn.2.weight", (slice(5, 9), slice(2, 3)))
    np.testing.assert_array_equal(part, expected["blocks.1.ffn.2.weight"][5:9, 2:3].numpy())


@pytest.mark.parametrize(
    "scale", [torch.ones(7), torch.ones(1, 128), torch.ones(128, 2), torch.ones(2, dtype=torch.uint8)]
)
def test_scales_that_do_not_fit(tmp_path, wide, scale):
    name = "blocks.0.self_attn.q"
    state = wide | {f"{name}.weight": wide[f"{name}.weight"].to(torch.float8_e4m3fn), f"{name}.scale_weight": scale}
    message = refused(write(tmp_path / "fp8.safetensors", state), "transformer")
    assert f"tensor '{name}.scale_weight' of shape {list(scale.shape)} scales '{name}.weight' of shape" in message


def test_scales_that_are_not_finite(tmp_path, wide):
    name = "blocks.0.self_attn.q"
    state = wide | {f"{name}.weight": wide[f"{name}.weight"].to(torch.float8_e4m3fn)}
    path = write(tmp_path / "fp8.safetensors", state | {f"{name}.scale_weight": torch.tensor(torch.inf)})
    with (
        find_model(path).part("transformer").open() as tensors,
        pytest.raises(UserError, match="holds NaN or infinity"),
    ):
        tensors.read(f"{name}.weight")


def test_integers_are_refused_by_their_name(tmp_path, wide):
    """Also where their scales lie beside them."""
    name = "blocks.0.ffn.0"
    state = wide | {f"{name}.weight": torch.ones(16, 128, dtype=torch.int8), f"{name}.weight_scale": torch.ones(16, 1)}
    message = refused(write(tmp_path / "int8.safetensors", state), "transformer")
    assert f"tensor '{name}.weight' has dtype int8, expected floating point" in message


# Configs


@pytest.mark.parametrize(
    "changes, note",
    [
        ({"_class_name": "CausalWanModel", "local_attn_size": 21, "sink_size": 3}, "a CausalWanModel is read as"),
        (
            {
                "_class_name": "WanTransformer3DModel",
                "add_control_adapter": False,
                "add_ref_conv": False,
                "in_channels": 16,
            }
            | {"hidden_size": 2048, "in_dim_control_adapter": 24, "downscale_factor_control_adapter": 8}
            | {"in_dim_ref_conv": 16, "cross_attn_type": None, "patch_size": [1, 2, 2], "cross_attn_norm": True},
            None,
        ),
    ],
)
def test_configs_of_others(wan, wan_folder, changes, note):
    expected = opened(wan_folder, "transformer")
    edit_json(wan / "config.json", **changes)
    if note is None:
        assert opened(wan, "transformer") == expected
    else:
        with pytest.warns(Note, match=note):
            assert opened(wan, "transformer") == expected


@pytest.mark.parametrize("key", ["add_control_adapter", "add_ref_conv"])
def test_configs_of_more_than_wan(wan, key):
    edit_json(wan / "config.json", _class_name="WanTransformer3DModel", **{key: True})
    assert f"{key} is True, only False is supported" in refused(wan)
