"""The oracles of the original layout: against diffusers' own converters, and against what is known of the release."""

import hashlib
import json

import original_vae
import original_wan
import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors.torch import load_file
from transformers import AutoTokenizer


def bits(state):
    return {
        name: (value.dtype, value.shape, value.flatten().view(torch.uint8).tolist()) for name, value in state.items()
    }


def diffusers_transformer(ours):
    """Diffusers' transformer, its weights named by diffusers' own converter."""
    c, image = ours.sizes, ours.sizes["model_type"] != "t2v"
    flf2v = ours.sizes["model_type"] == "flf2v"
    theirs = WanTransformer3DModel(
        patch_size=ours.patch_size,
        num_attention_heads=c["num_heads"],
        attention_head_dim=c["dim"] // c["num_heads"],
        in_channels=c["in_dim"],
        out_channels=c["out_dim"],
        text_dim=ours.text_dim,
        freq_dim=c["freq_dim"],
        ffn_dim=c["ffn_dim"],
        num_layers=c["num_layers"],
        eps=c["eps"],
        image_dim=ours.image_dim if image else None,
        added_kv_proj_dim=c["dim"] if image else None,
        pos_embed_seq_len=2 * ours.image_tokens if flf2v else None,
    )
    state = convert_wan_transformer_to_diffusers(dict(ours.state_dict()))
    if flf2v:  # which diffusers' converter of single files leaves out
        state["condition_embedder.image_embedder.pos_embed"] = state.pop("img_emb.emb_pos")
    theirs.load_state_dict(state, strict=True)
    return theirs.eval()


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"dim": 48, "ffn_dim": 20, "freq_dim": 32, "num_heads": 4, "num_layers": 3, "text_len": 9, "eps": 1e-4},
        {"model_type": "i2v"},
        {"model_type": "i2v", "dim": 36, "num_heads": 3, "out_dim": 8, "text_dim": 24, "image_dim": 28},
        {"model_type": "flf2v", "num_layers": 1, "image_dim": 20, "image_tokens": 10},
    ],
)
@torch.no_grad()
def test_transformer_is_that_of_diffusers(sizes):
    torch.manual_seed(0)
    ours = original_wan.Transformer(**sizes)
    c, batch = ours.sizes, 2
    x, t = torch.randn(batch, c["out_dim"], 3, 4, 6), torch.tensor([999.0, 37.5])
    text = torch.randn(batch, 7, ours.text_dim)
    padded = F.pad(text, (0, 0, 0, c["text_len"] - 7))
    y = image = None
    if c["model_type"] != "t2v":
        y = torch.randn(batch, c["in_dim"] - c["out_dim"], 3, 4, 6)
        frames = 2 if c["model_type"] == "flf2v" else 1
        image = torch.randn(frames * batch, ours.image_tokens, ours.image_dim)
    found = ours(x, t, text, image, y)
    expected = diffusers_transformer(ours)(x if y is None else torch.cat([x, y], 1), t, padded, image).sample
    assert found.shape == expected.shape == x.shape
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_vae_is_named_as_by_diffusers():
    torch.manual_seed(0)
    sizes = {"num_res_blocks": 2, "base_dim": 6, "dim_mult": (1, 2, 4, 4)}  # the only depths that the converter knows
    state = original_vae.vae_state(**sizes)
    found = original_vae.vae_reference(state, **sizes).state_dict()
    expected = convert_wan_vae_to_diffusers(dict(state))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("num_res_blocks", [1, 3])
@pytest.mark.parametrize("temperal_downsample", [(True, False, True), (False, True, True)])
def test_vae_of_other_depths(num_res_blocks, temperal_downsample):
    sizes = {"num_res_blocks": num_res_blocks, "temperal_downsample": temperal_downsample, "dim_mult": (2, 4, 2, 6)}
    state = original_vae.vae_state(**sizes)
    model = original_vae.vae_reference(state, **sizes)  # raises where a weight is left over, on either side
    assert model.encode(torch.rand(1, 3, 5, 16, 16)).latent_dist.mode().shape == (1, 16, 2, 2, 2)


def test_sizes_of_the_release():
    with torch.device("meta"):
        transformer = original_wan.Transformer(
            dim=1536, ffn_dim=8960, freq_dim=256, num_heads=12, num_layers=30, text_dim=4096
        )
        text = original_wan.TextEncoder(
            vocab_size=256384, dim=4096, dim_attn=4096, dim_ffn=10240, num_heads=64, num_layers=24
        )
        vae = original_vae.VAE(base_dim=96, dim_mult=(1, 2, 4, 4), num_res_blocks=2)
    # Tensors and bytes of Wan2.1-T2V-1.3B; the files are less than 100 kB longer. Text in bfloat16, others in float32.
    for module, tensors, size, width in (
        (transformer, 825, 5_676_070_424, 4),
        (text, 242, 11_361_920_418, 2),
        (vae, 194, 507_609_880, 4),
    ):
        values = module.state_dict().values()
        assert len(values) == tensors
        assert 0 <= size - width * sum(value.numel() for value in values) < 1e5
    config = json.dumps(transformer.config_json(), indent=2) + "\n"
    digest = "ab37994c43740513f94b3ba6233a784035a67b43c8cde83c8f31aa90468c67ce"
    assert hashlib.sha256(config.encode()).hexdigest() == digest


@pytest.mark.parametrize("image", [False, True])
def test_folder_holds_the_modules(tmp_path, image):
    dtypes = {"text_encoder": torch.bfloat16}
    sizes = {"transformer": {"num_layers": 3}, "vae": {"base_dim": 6}}
    made = original_wan.save_folder(tmp_path, image=image, dtype=dtypes, **sizes)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    shards = [f"{original_wan.STEM}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    expected = {*shards, f"{original_wan.STEM}.safetensors.index.json", "config.json"}
    expected |= {original_wan.TEXT_FILE, original_wan.VAE_FILE}
    expected |= {f"google/umt5-xxl/{name}.json" for name in ("tokenizer", "tokenizer_config")}
    if image:
        names = ("tokenizer", "tokenizer_config", "special_tokens_map")
        expected |= {original_wan.IMAGE_FILE, *(f"xlm-roberta-large/{name}.json" for name in names)}
    assert files == expected
    assert json.loads((tmp_path / "config.json").read_text()) == made.transformer.config_json()

    parts = [load_file(tmp_path / name) for name in shards]
    where = json.loads((tmp_path / f"{original_wan.STEM}.safetensors.index.json").read_text())["weight_map"]
    assert where == {name: shard for shard, part in zip(shards, parts, strict=True) for name in part}
    assert bits(parts[0] | parts[1]) == bits(made.transformer.state_dict())
    text = torch.load(tmp_path / original_wan.TEXT_FILE, weights_only=True)
    assert {value.dtype for value in text.values()} == {torch.bfloat16}
    assert bits({name: value.float() for name, value in text.items()}) == bits(made.text_encoder.state_dict())
    vae = torch.load(tmp_path / original_wan.VAE_FILE, weights_only=True)
    again = original_vae.vae_reference(vae, **sizes["vae"])
    assert bits(again.state_dict()) == bits(made.vae.state_dict())
    assert (made.image_encoder is not None) == image
    if image:
        state = torch.load(tmp_path / original_wan.IMAGE_FILE, weights_only=True)
        assert bits(state) == bits(made.image_encoder.state_dict())
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / original_wan.IMAGE_TOKENIZER)
        assert type(tokenizer).__name__.startswith("XLMRobertaTokenizer")
        assert made.transformer.image_dim == made.image_encoder.dim


def test_single_files(tmp_path):
    made = original_wan.save_folder(tmp_path / "one", image=False, shards=1)
    state = bits(made.transformer.state_dict())
    assert bits(load_file(tmp_path / "one" / f"{original_wan.STEM}.safetensors")) == state
    original_wan.single_file(tmp_path / "model.safetensors", made.transformer)
    prefixed = bits(load_file(tmp_path / "model.safetensors"))
    assert prefixed == {f"model.diffusion_model.{name}": value for name, value in state.items()}
