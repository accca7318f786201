"""LoRA files in both forms: loaded and fused by diffusers, read back, refused."""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from lora_models import FILE, RANK, assert_merges_as, assert_same, silent, velocities
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from vpae_jax.types import UserError
from vpae_jax.weights.extraction import extract
from vpae_jax.weights.find import find_model
from vpae_jax.weights.loading import load_part
from vpae_jax.weights.lora import Adapter, Lora, Merged, write_lora
from vpae_jax.weights.lora_reading import read_lora
from vpae_jax.weights.writing import verify_part, write_part

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers", "ignore::DeprecationWarning:diffusers")


@pytest.mark.parametrize("form", ["diffusers", "wan"])
def test_diffusers_computes_what_we_merge(made, form, tmp_path, caplog):
    write_lora(tmp_path / "lora" / FILE, made.lora, form)
    found = read_lora(tmp_path / "lora" / FILE, made.config)
    assert_same(found, made.lora)
    merged = Merged(made.teacher, found)
    write_part(tmp_path / "merged", "transformer", merged)
    verify_part(find_model(tmp_path / "merged"), "transformer", merged, None)
    with silent(caplog):
        made.pipe.load_lora_weights(tmp_path / "lora")
    try:
        base = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "merged" / "transformer")
        ours = load_part(tmp_path / "merged", "transformer")
        of_ours, of_lora, of_base = velocities(made.config, [made.pipe.transformer, base], [ours])
        np.testing.assert_allclose(of_lora, of_base, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(of_lora, of_ours, atol=1e-4, rtol=1e-4)
        made.pipe.disable_lora()
        [of_teacher] = velocities(made.config, [made.pipe.transformer], [])
        assert np.abs(of_teacher - of_lora).max() > 0.1
    finally:
        made.pipe.unload_lora_weights()


@pytest.mark.parametrize("form", ["diffusers", "wan"])
def test_merged_as_diffusers_fuses(made, form, tmp_path):
    write_lora(tmp_path / FILE, made.lora, form)
    module = diffusers.WanTransformer3DModel(**made.pipe.transformer.config)
    module.load_state_dict(made.pipe.transformer.state_dict())
    module.load_lora_adapter(type(made.pipe).lora_state_dict(tmp_path / FILE))
    module.fuse_lora(lora_scale=0.5)
    module.unload_lora()
    assert_merges_as(Merged(made.teacher, read_lora(tmp_path / FILE, made.config), 0.5), module, tmp_path)


def test_names_of_both_forms(i2v, tmp_path):
    for form in ("diffusers", "wan"):
        write_lora(tmp_path / f"{form}.safetensors", i2v.lora, form, jnp.bfloat16)
    adapter = i2v.lora.adapters["blocks/ffn/proj_in", 1]
    theirs, wan = (load_torch(tmp_path / f"{form}.safetensors") for form in ("diffusers", "wan"))
    down = theirs["transformer.blocks.1.ffn.net.0.proj.lora_A.weight"]
    assert (down.dtype, tuple(down.shape)) == (torch.bfloat16, (RANK, 24))
    assert torch.equal(down, torch.tensor(adapter.a.T).bfloat16())
    assert torch.equal(down, wan["diffusion_model.blocks.1.ffn.0.lora_down.weight"])
    up = wan["diffusion_model.blocks.1.ffn.0.lora_up.weight"]
    assert torch.equal(up, theirs["transformer.blocks.1.ffn.net.0.proj.lora_B.weight"])
    assert wan["diffusion_model.blocks.1.ffn.0.alpha"] == RANK
    assert tuple(wan["diffusion_model.time_embedding.0.lora_down.weight"].shape) == (16, 16)
    assert "diffusion_model.head.head.alpha" not in wan  # diffusers would refuse the file
    assert len(theirs) == 2 * len(i2v.lora.adapters)


def test_whole_differences_in_the_wan_form(made, tmp_path, caplog):
    lora = extract(made.student, made.teacher, RANK, differences=True).lora
    write_lora(tmp_path / FILE, lora, "wan")
    assert_same(read_lora(tmp_path / FILE, made.config), lora)
    tensors = load_file(tmp_path / FILE)
    assert tensors["diffusion_model.blocks.0.norm3.diff_b"].shape == (24,)
    assert tensors["diffusion_model.blocks.0.modulation.diff"].shape == (1, 6, 24)
    assert tensors["diffusion_model.patch_embedding.diff"].shape == (24, made.config.in_channels, 1, 2, 2)
    with silent(caplog):
        made.pipe.load_lora_weights(tmp_path / FILE)
    made.pipe.unload_lora_weights()
    with pytest.raises(UserError, match=r"has \d+ \(such as \S+\); write the wan form"):
        write_lora(tmp_path / "other.safetensors", lora, "diffusers")
    assert not (tmp_path / "other.safetensors").exists()


def test_writing_refuses(t2v, tmp_path):
    with pytest.raises(UserError, match=r"out.pt: a LoRA is one safetensors file"):
        write_lora(tmp_path / "out.pt", t2v.lora, "wan")
    with pytest.raises(UserError, match="nothing to write, since no layer differs"):
        write_lora(tmp_path / FILE, Lora({}), "wan")
    bad = Lora({("proj_out", 0): Adapter(np.full((24, 2), np.nan, np.float32), np.zeros((2, 64), np.float32))})
    with pytest.raises(UserError, match=r"tensor 'transformer.proj_out.lora_A.weight' would hold NaN or infinity"):
        write_lora(tmp_path / FILE, bad, "diffusers")
    large = Lora({("proj_out", 0): Adapter(np.full((24, 2), 1e6, np.float32), np.zeros((2, 64), np.float32))})
    with pytest.raises(UserError, match="would hold NaN or infinity; write float32"):
        write_lora(tmp_path / FILE, large, "wan", np.float16)
    assert list(tmp_path.iterdir()) == []
