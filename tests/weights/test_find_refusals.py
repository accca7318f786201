"""Models whose parts, tensors or configs do not fit: one line each. And unusual ones that do."""

import shutil

import diffusers
import jax.numpy as jnp
import original_wan
import pytest
import torch
from finding import HUGE, opened, prefixed, refused
from folders import bits, edit_json, same, tensors, values, write

from vpae_jax.models.wan_vae import WanVAEConfig
from vpae_jax.weights import orbax
from vpae_jax.weights.filenames import write_json
from vpae_jax.weights.find import find_model
from vpae_jax.weights.parts import config_json

# Refusals.


def test_a_part_twice(wan, wan_folder):
    shutil.copy(wan / original_wan.VAE_FILE, wan / "copy.pth")
    assert same(values(wan, "vae"), values(wan_folder, "vae"))  # the usual place decides
    (wan / original_wan.VAE_FILE).rename(wan / "another.pth")
    assert refused(wan) == (f"{wan}: another.pth and copy.pth both hold the vae; name one of them, or remove one")


def test_variants_beside_the_usual_file(theirs):
    path = theirs / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(path, path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert find_model(theirs).part("vae").files == (path,)


def test_a_part_twice_in_one_file(tmp_path, wide):
    state = prefixed("model.", wide) | prefixed("ema.", wide)
    message = refused(write(tmp_path / "x.safetensors", state))
    assert message.startswith(str(tmp_path)) and "both hold the transformer" in message


def test_an_orbax_part_is_found_and_may_not_be_there_twice(theirs, tmp_path):
    config = find_model(theirs).part("vae").config
    folder = tmp_path / "ours" / "vae"
    folder.mkdir(parents=True)
    orbax.save(folder / "params", {"a": jnp.ones(2)})
    write_json(folder / "config.json", config_json(config, "vae"))
    source = find_model(tmp_path / "ours").part("vae")
    assert source.layout == "orbax" and source.config == config and source.folder == folder
    with pytest.raises(ValueError, match="holds our own arrays"), source.open():
        pass
    shutil.copytree(folder / "params", theirs / "vae" / "params")
    assert "both hold the vae" in refused(theirs)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"transformer_2": ["diffusers", "WanTransformer3DModel"]},
            "boundary_ratio is None, expected a number between 0 and 1",
        ),
        ({"expand_timesteps": True}, "expand_timesteps is set, as in Wan 2.2's 5B model"),
        ({"_class_name": "FluxPipeline"}, "_class_name is 'FluxPipeline', expected 'WanPipeline' or"),
        ({"_class_name": ["WanPipeline"]}, "_class_name is ['WanPipeline'], expected"),
    ],
)
def test_other_pipelines_are_refused(theirs, changes, message):
    edit_json(theirs / "model_index.json", transformer_2=[None, None], expand_timesteps=False)
    find_model(theirs)
    edit_json(theirs / "model_index.json", **changes)
    assert "model_index.json" in refused(theirs) and message in refused(theirs)


def test_plain_float8_is_read(tmp_path, wide):
    state = {n: v.to(torch.float8_e4m3fn) if n.endswith("ffn.0.weight") else v for n, v in wide.items()}
    write(tmp_path / "fp8.safetensors", state)
    found = values(tmp_path, "transformer")["blocks/ffn/proj_in/kernel[0]"]
    assert found.dtype == jnp.float8_e4m3fn
    expected = state["blocks.0.ffn.0.weight"].float().numpy().T
    assert (found.astype(jnp.float32) == expected).all()


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.bool, torch.int64])
def test_integers_are_refused(tmp_path, wide, kind):
    name = "blocks.1.ffn.0.weight"
    path = write(tmp_path / "int8.safetensors", wide | {name: torch.ones(16, 128, dtype=kind)})
    called = str(kind).removeprefix("torch.")
    assert refused(path, "transformer") == (
        f"{path}: tensor '{name}' has dtype {called}, expected floating point; quantised weights cannot be loaded"
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("blocks.1.ffn.0.weight"), "tensor 'blocks.1.ffn.0.weight' of shape [16, 128] is missing"),
        (
            lambda t: t.pop("blocks.0.ffn.0.weight"),
            "tensor 'blocks.0.ffn.0.weight' is missing; fetch the weights again",
        ),
        (lambda t: t.pop("patch_embedding.weight"), "tensor 'patch_embedding.weight' is missing"),
        (
            lambda t: [t.pop(n) for n in list(t) if n.startswith("blocks.1.") and "norm" in n],
            "tensor 'blocks.1.self_attn.norm_k.weight' of shape [128] is missing (and 5 more)",
        ),
        (lambda t: t.update({"vace.weight": torch.ones(3)}), "tensor 'vace.weight' of shape [3] is unknown"),
        (
            lambda t: t.update({"blocks.1.ffn.0.weight": torch.ones(16, 127)}),
            "tensor 'blocks.1.ffn.0.weight' has shape [16, 127], expected [16, 128]",
        ),
        (
            lambda t: t.update({"patch_embedding.weight": torch.ones(3)}),
            "tensor 'patch_embedding.weight' has shape [3], which no Wan 2.1 model has",
        ),
        (
            lambda t: t.update({"patch_embedding.weight": torch.ones(128, 16, 1, 0, 2)}),
            "tensor 'patch_embedding.weight' has shape [128, 16, 1, 0, 2], which no Wan 2.1 model has",
        ),
        (
            lambda t: t.update({"blocks.999999999999.ffn.0.weight": t.pop("blocks.1.ffn.0.weight")}),
            "tensor 'blocks.2.self_attn.norm_k.weight' of shape [128] is missing (and 27 more)",
        ),
    ],
)
def test_spoilt_tensors_are_one_line(tmp_path, wide, change, message):
    state = dict(wide)
    change(state)
    path = write(tmp_path / "x.safetensors", state)
    found = refused(path, "transformer")
    assert str(path) in found and message in found


# Configs.


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_layers": HUGE}, f"num_layers is {HUGE}, but the weights imply 2; which of them is wrong?"),
        ({"ffn_dim": HUGE}, f"ffn_dim is {HUGE}, but the weights imply 40"),
        ({"dim": HUGE}, f"added_kv_proj_dim is 24, expected the model's width {HUGE}"),
        ({"num_heads": HUGE}, f"dim is 24 and num_heads {HUGE}, expected dim to be a multiple of num_heads"),
        ({"num_heads": 0}, "num_heads 0, expected dim to be a multiple"),
        ({"num_heads": 24}, "attention_head_dim is 1, expected an even number"),
        ({"dim": "24"}, "dim is '24' and num_heads 2"),
        ({"dim": None}, "dim is None and num_heads 2"),
        ({"num_layers": 2.5}, "num_layers: expected int, found 2.5"),
        ({"in_dim": -1}, "in_channels is -1, expected at least 1"),
        ({"patch_size": [1, 1, 1]}, "patch_size is (1, 1, 1), but the weights imply (1, 2, 2)"),
        ({"text_dim": 31}, "text_dim is 31, but the weights imply 32"),
        ({"model_type": "vace"}, "expected a WanModel of type t2v, i2v, flf2v"),
        ({"_class_name": "VaceWanModel"}, "_class_name is 'VaceWanModel', expected"),
        ({"qk_norm": False}, "qk_norm is False, only True is supported"),
        ({"window_size": [5, 5]}, "window_size is [5, 5], only [-1, -1] is supported"),
        ({"num_layer": 2}, "config.json.num_layer: unknown key"),
    ],
)
def test_a_config_of_wan_that_the_weights_contradict(wan, changes, message):
    edit_json(wan / "config.json", **changes)
    found = refused(wan)
    assert str(wan / "config.json") in found and message in found


@pytest.mark.parametrize(
    "part, changes, message",
    [
        ("transformer", {"num_layers": HUGE}, f"num_layers is {HUGE}, but the weights imply 2"),
        ("transformer", {"num_attention_heads": HUGE}, "added_kv_proj_dim is 24, expected the model's width"),
        (
            "transformer",
            {"image_dim": None, "added_kv_proj_dim": None},
            "image_dim is None, but the weights imply 24",
        ),
        ("transformer", {"cross_attn_norm": False}, "cross_attn_norm is False, but the weights imply True"),
        ("vae", {"num_res_blocks": HUGE}, f"num_res_blocks is {HUGE}, but the weights imply 1"),
        ("vae", {"dim_mult": [1, 2, 2, HUGE]}, "but the weights imply (1, 2, 2, 2)"),
        ("vae", {"temperal_downsample": [True, True, False]}, "but the weights imply (False, True, True)"),
        ("text_encoder", {"vocab_size": HUGE}, f"vocab_size is {HUGE}, but the weights imply 384"),
        ("text_encoder", {"num_layers": HUGE}, f"num_layers is {HUGE}, but the weights imply 2"),
        ("image_encoder", {"num_hidden_layers": HUGE}, f"num_hidden_layers is {HUGE}, but the weights imply 3"),
        ("image_encoder", {"image_size": 8 * HUGE}, f"image_size is {8 * HUGE}, but the weights imply 32"),
        ("image_encoder", {"num_attention_heads": 5}, "hidden_size 24 is not a multiple of num_attention_heads 5"),
    ],
)
def test_a_config_of_diffusers_that_the_weights_contradict(theirs, part, changes, message):
    path = theirs / part / "config.json"
    edit_json(path, **changes)
    found = refused(theirs)
    assert str(path) in found and message in found


def test_a_wan_model_of_bare_weights(wan, wan_folder):
    """Without config.json, all that shapes do not tell comes from vpae_jax.json."""
    (wan / "config.json").unlink()
    assert "the width 24 is not a multiple" in refused(wan)
    edit_json(wan / "vpae_jax.json", parts={"transformer": {"num_attention_heads": 2, "attention_head_dim": 12}})
    assert opened(wan, "transformer") == find_model(wan_folder).part("transformer").config


@pytest.mark.parametrize("dim, heads", [(24, 3), (40, 8)])
def test_an_image_encoder_of_other_heads(tmp_path, dim, heads):
    torch.manual_seed(0)
    state = original_wan.ImageEncoder(dim=dim, num_heads=heads).state_dict()
    write(tmp_path / "clip.pth", state)
    message = refused(tmp_path)
    assert f"the width {dim} is not a multiple of Wan's 16 heads; give num_attention_heads in vpae_jax.json" in message
    edit_json(tmp_path / "vpae_jax.json", parts={"image_encoder": {"num_attention_heads": heads}})
    assert opened(tmp_path, "image_encoder").num_attention_heads == heads
    assert opened(tmp_path / "clip.pth", "image_encoder").hidden_size == dim
    for parts, message in (
        ({"image_encoder": {"hidden_size": 48}}, f"hidden_size is 48, but the weights imply {dim}"),
        ({"image_encoder": {"num_attention_heads": heads, "head": 3}}, ".head: unknown key"),
        ([], "parts is [], expected an object of objects"),
        ({"image_encoder": 3}, "expected an object of objects"),
    ):
        edit_json(tmp_path / "vpae_jax.json", parts=parts)
        assert message in refused(tmp_path)


DEPTHS = [
    dict(num_res_blocks=1),
    dict(num_res_blocks=3, base_dim=6, dim_mult=(1, 2, 1), temperal_downsample=(True, True)),
    dict(num_res_blocks=2, dim_mult=(2, 1, 3), temperal_downsample=(True, False)),
    dict(num_res_blocks=1, dim_mult=(1, 2), temperal_downsample=(False,)),
    dict(num_res_blocks=1, dim_mult=(1, 1, 2, 2, 3), temperal_downsample=(True, True, False, True)),
]


@pytest.mark.parametrize("sizes", DEPTHS)
@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_autoencoders_of_other_depths(tmp_path, layout, sizes):
    torch.manual_seed(0)
    original = original_wan.VAE(**sizes)
    state = original.state_dict()
    if layout == "diffusers":
        state = original_wan.vae_reference(state, **sizes).state_dict()
    config = opened(write(tmp_path / "vae.safetensors", prefixed("vae.", state)), "vae")
    expected = {name: tuple(v) if isinstance(v, list) else v for name, v in original.sizes.items()}
    assert {name: getattr(config, name) for name in expected} == expected
    time = expected["temperal_downsample"]
    assert config == WanVAEConfig(**expected, scale_factor_spatial=2 ** len(time), scale_factor_temporal=2 ** sum(time))


def test_autoencoders_of_other_kinds(tmp_path):
    torch.manual_seed(0)
    sizes = dict(base_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, decoder_base_dim=6, attn_scales=[0.5, 0.25])
    state = diffusers.AutoencoderKLWan(**sizes).state_dict()
    config = opened(write(tmp_path / "vae.safetensors", state), "vae")
    assert (config.base_dim, config.decoder_base_dim, config.attn_scales) == (4, 6, (0.5, 0.25))
    write(tmp_path / "z" / "vae.pth", original_wan.VAE(z_dim=3).state_dict())
    assert "3 latent channels, but Wan's mean and deviation are for 16; give latents_mean" in refused(tmp_path / "z")
    moments = {"latents_mean": [0.0, 1.0, 2.0], "latents_std": [1.0, 2.0, 3.0]}
    edit_json(tmp_path / "z" / "vpae_jax.json", parts={"vae": moments})
    assert opened(tmp_path / "z", "vae").latents_std == (1.0, 2.0, 3.0)


def test_uneven_autoencoders_are_refused(tmp_path):
    first, second = (original_wan.VAE(num_res_blocks=n, dim_mult=(1, 1, 1, 1)).state_dict() for n in (1, 2))
    assert "is unknown" in refused(
        write(tmp_path / "gap.pth", second | {"encoder.downsamples.1.x": torch.ones(1)}), "vae"
    )
    blocks = "encoder.downsamples."
    # Levels of 1, 1, 1 and 2 blocks.
    uneven = {n: v for n, v in second.items() if not n.startswith(blocks)} | first
    uneven |= {n.replace(f"{blocks}6.", f"{blocks}7."): v for n, v in first.items() if n.startswith(f"{blocks}6.")}
    message = refused(write(tmp_path / "vae.pth", uneven))
    assert "vae.pth" in message and "no Wan 2.1 VAE has" in message


def test_written_bits_are_those_of_the_files(wan_folder):
    """What the other tests of this file compare is not empty."""
    found = values(wan_folder, "transformer")
    assert len(found) == len(bits(tensors(wan_folder, "transformer"))) and found["proj_out/bias[0]"].any()
