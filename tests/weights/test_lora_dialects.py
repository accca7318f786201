"""LoRA files as others write them: every dialect, prefix and way to keep a scale."""

import re

import diffusers
import numpy as np
import peft
import pytest
import torch
from lora_models import FILE, assert_merges_as, assert_same, layers, silent
from safetensors.numpy import load_file, save_file

from vpae_jax.types import Note, UserError
from vpae_jax.weights.lora import Adapter, Lora, Merged, write_lora
from vpae_jax.weights.lora_reading import _targets, read_lora

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers", "ignore::DeprecationWarning:diffusers")


def test_no_two_parameters_share_a_name(i2v):
    targets = _targets(i2v.config)
    reached = {(entry.path, layer) for entry, layer in targets.values()}
    assert reached == set(layers(i2v.teacher))
    names = {name.replace("_", ".") for name in targets}
    assert len(names) == len(targets)


def test_dialects(t2v, tmp_path):
    draw = np.random.default_rng(3).standard_normal
    down, up = draw((4, 24), np.float32), draw((40, 4), np.float32)
    wan, theirs = "blocks.1.ffn.0", "blocks.1.ffn.net.0.proj"
    kohya = f"lora_unet_{wan.replace('.', '_')}"
    pairs = {
        "peft": (f"transformer.{theirs}.lora_A.weight", f"transformer.{theirs}.lora_B.weight", None, 1),
        "no prefix": (f"{theirs}.lora_A.weight", f"{theirs}.lora_B.weight", None, 1),
        "named adapter": (f"{wan}.lora_A.default.weight", f"{wan}.lora_B.default.weight", None, 1),
        "peft's prefix": (
            f"base_model.model.{theirs}.lora_A.weight",
            f"base_model.model.{theirs}.lora_B.weight",
            None,
            1,
        ),
        "comfy": (f"diffusion_model.{wan}.lora_down.weight", f"diffusion_model.{wan}.lora_up.weight", None, 1),
        "comfy with alpha": (
            f"diffusion_model.{wan}.lora_down.weight",
            f"diffusion_model.{wan}.lora_up.weight",
            (f"diffusion_model.{wan}.alpha", np.asarray(8, np.int64)),
            2,
        ),
        "original names": (f"diffusion_model.{wan}.lora_A.weight", f"diffusion_model.{wan}.lora_B.weight", None, 1),
        "one more prefix": (
            f"model.diffusion_model.{wan}.lora_A.weight",
            f"model.diffusion_model.{wan}.lora_B.weight",
            None,
            1,
        ),
        "kohya": (
            f"{kohya}.lora_down.weight",
            f"{kohya}.lora_up.weight",
            (f"{kohya}.alpha", np.asarray([2], np.float16)),
            0.5,
        ),
    }
    for first, second, alpha, scale in pairs.values():
        save_file({first: down, second: up, **dict([alpha] if alpha else [])}, tmp_path / FILE)
        expected = Adapter(down.T, up.T * np.float32(scale))
        assert_same(read_lora(tmp_path / FILE, t2v.config), Lora({("blocks/ffn/proj_in", 1): expected}))


def test_kohya_as_diffusers_reads_it(i2v, tmp_path, caplog):
    write_lora(tmp_path / "wan.safetensors", i2v.lora, "wan")
    tensors = {}
    for name, value in load_file(tmp_path / "wan.safetensors").items():
        if name.startswith("diffusion_model.blocks."):
            module, end = re.fullmatch(r"diffusion_model\.(.+)(\.alpha|\.lora_.*)", name).groups()
            tensors[f"lora_unet_{module.replace('.', '_')}{end}"] = np.asarray(value / 4) if end == ".alpha" else value
    save_file(tensors, tmp_path / FILE)
    with silent(caplog):
        i2v.pipe.load_lora_weights(tmp_path / FILE)
    i2v.pipe.unload_lora_weights()
    found = read_lora(tmp_path / FILE, i2v.config)
    blocks = {key: a for key, a in i2v.lora.adapters.items() if key[0].startswith("blocks/")}
    assert_same(found, Lora({key: Adapter(a.a, a.b / 4) for key, a in blocks.items()}))


def test_whole_differences(t2v, tmp_path):
    draw = np.random.default_rng(4).standard_normal
    values = {
        "blocks.0.self_attn.q.diff": (24, 24),
        "blocks.0.self_attn.q.diff_b": (24,),
        "blocks.1.norm3.diff": (24,),
        "blocks.1.norm3.diff_b": (24,),
        "blocks.1.self_attn.norm_k.diff": (24,),
        "blocks.1.diff_m": (1, 6, 24),
        "head.modulation.diff": (1, 2, 24),
        "head.head.diff": (64, 24),
        "patch_embedding.diff": (24, 16, 1, 2, 2),
        "patch_embedding.diff_b": (24,),
    }
    values = {f"diffusion_model.{name}": draw(shape, np.float32) for name, shape in values.items()}
    save_file(values, tmp_path / FILE)
    lora = read_lora(tmp_path / FILE, t2v.config)
    assert not lora.adapters
    found = [(path, layer, value.shape) for (path, layer), value in lora.differences.items()]
    assert sorted(found) == [
        ("blocks/attn1/norm_k/scale", 1, (24,)),
        ("blocks/attn1/to_q/bias", 0, (24,)),
        ("blocks/attn1/to_q/kernel", 0, (24, 24)),
        ("blocks/norm2/bias", 1, (24,)),
        ("blocks/norm2/scale", 1, (24,)),
        ("blocks/scale_shift_table", 1, (1, 6, 24)),
        ("patch_embedding/bias", 0, (24,)),
        ("patch_embedding/kernel", 0, lora.differences["patch_embedding/kernel", 0].shape),
        ("proj_out/kernel", 0, (24, 64)),
        ("scale_shift_table", 0, (1, 2, 24)),
    ]
    kernel = values["diffusion_model.blocks.0.self_attn.q.diff"].T
    np.testing.assert_array_equal(lora.differences["blocks/attn1/to_q/kernel", 0], kernel)
    merged = Merged(t2v.teacher, lora, 2.0)
    for path, layer in layers(t2v.teacher):
        change = lora.differences.get((path, layer), np.float32(0))
        np.testing.assert_array_equal(merged.read(path, layer), t2v.teacher.read(path, layer) + 2 * change)


def test_an_adapter_of_the_patch_embedding(t2v, tmp_path):
    draw = np.random.default_rng(5).standard_normal
    down, up = draw((4, 16, 1, 2, 2), np.float32), draw((24, 4, 1, 1, 1), np.float32)
    name = "diffusion_model.patch_embedding"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": np.float32(2)}
    save_file({key: np.asarray(value) for key, value in tensors.items()}, tmp_path / FILE)
    whole = np.einsum("rithw,or->oithw", down, up[:, :, 0, 0, 0]) / 2
    save_file({f"{name}.diff": whole}, tmp_path / "whole.safetensors")
    found, expected = (read_lora(tmp_path / file, t2v.config) for file in (FILE, "whole.safetensors"))
    assert found.differences.keys() == {("patch_embedding/kernel", 0)}
    key = ("patch_embedding/kernel", 0)
    np.testing.assert_allclose(found.differences[key], expected.differences[key], atol=1e-5)


def peft_config(**more) -> peft.LoraConfig:
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["to_q", "to_k", "ffn.net.2", "proj_out"]}
    patterns = {"rank_pattern": {"to_k": 6}, "alpha_pattern": {"attn2.to_k": 3, r"^proj_out": 5}}
    return peft.LoraConfig(init_lora_weights=False, **settings, **patterns, **more)


@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape:peft.PeftWarning")  # of the biases
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}])
def test_alphas_that_peft_keeps_apart(t2v, options, tmp_path):
    torch.manual_seed(1)
    module = diffusers.WanTransformer3DModel(**t2v.pipe.transformer.config)
    module.load_state_dict(t2v.pipe.transformer.state_dict())
    module.add_adapter(peft_config(**options))
    if options.get("lora_bias"):
        for name, weight in module.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                torch.nn.init.normal_(weight)
    tensors = peft.get_peft_model_state_dict(module)
    metadata = module.peft_config["default"].to_dict()
    type(t2v.pipe).save_lora_weights(tmp_path, tensors, transformer_lora_adapter_metadata=metadata)
    found = read_lora(tmp_path / FILE, t2v.config)
    beside = tmp_path / "beside"
    beside.mkdir()
    renamed = {f"base_model.model.{name}": value.numpy() for name, value in tensors.items()}
    save_file(renamed, beside / "adapter_model.safetensors")
    module.peft_config["default"].save_pretrained(beside)
    assert_same(read_lora(beside / "adapter_model.safetensors", t2v.config), found)
    module.fuse_lora()
    module.unload_lora()
    assert_merges_as(Merged(t2v.teacher, found), module, tmp_path)


DOWN, UP = np.ones((2, 24), np.float32), np.full((24, 2), 0.5, np.float32)
LAYER = ("blocks/attn1/to_q", 0)
PREFIXES = ["", "diffusion_model.", "model.diffusion_model.", "transformer.", "unet.", "pipe.dit.", "model.", "net."]
PREFIXES += ["base_model.model.", "base_model.model.model.", "generator.", "generator.model.", "_orig_mod.", "module."]
PREFIXES += ["lora_unet_", "lora_unet__", "lora_transformer_", "lora_dit_", "pipe.dit._fsdp_wrapped_module."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(t2v, tmp_path, prefix):
    layer = "blocks.0.self_attn.q".replace(".", "_" if prefix.startswith("lora_") else ".")
    names = {f"{prefix}{layer}.lora_down.weight": DOWN, f"{prefix}{layer}.lora_up.weight": UP}
    save_file(names, tmp_path / FILE)
    assert_same(read_lora(tmp_path / FILE, t2v.config), Lora({LAYER: Adapter(DOWN.T, UP.T)}))


def test_the_prefix_of_another_network_is_none(t2v, tmp_path):
    for prefix in ("vace_", "controlnet.", "text_encoder."):
        save_file({f"{prefix}blocks.0.self_attn.q.diff_b": UP[:, 0].copy()}, tmp_path / FILE)
        with pytest.raises(
            UserError, match=rf"tensor '{prefix}blocks.0.self_attn.q.diff_b' is for a layer that this model"
        ):
            read_lora(tmp_path / FILE, t2v.config)


def test_the_adapters_of_a_generator_beside_its_critics(t2v, tmp_path):
    """As LongLive's checkpoints have them, from PEFT under FSDP."""
    layer = "base_model.model.blocks.0._fsdp_wrapped_module.self_attn.q"
    ours = {f"{layer}.lora_A.default.weight": torch.tensor(DOWN), f"{layer}.lora_B.default.weight": torch.tensor(UP)}
    expected = Lora({LAYER: Adapter(DOWN.T, UP.T)})
    torch.save({"generator_lora": ours, "step": 3}, tmp_path / "lora.pt")
    assert_same(read_lora(tmp_path / "lora.pt", t2v.config), expected)
    critics = {name: 2 * value for name, value in ours.items()}
    torch.save({"generator_lora": ours, "critic_lora": critics, "step": 3}, tmp_path / "lora.pt")
    with pytest.warns(Note, match="lora.pt: read without 2 tensors of the critic's adapters"):
        found = read_lora(tmp_path / "lora.pt", t2v.config)
    assert_same(found, expected)
