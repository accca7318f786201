"""Presets: every part can be built, and the real sizes are those of the released models."""

import jax
import pytest
import torch
import transformers
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from flax import nnx

from vpae_jax.models.clip import CLIPVision
from vpae_jax.models.heads import DiscriminatorHeads, default_taps
from vpae_jax.models.presets import CLIP_VIT_H, PRESETS, UMT5_XXL
from vpae_jax.models.umt5 import UMT5Encoder
from vpae_jax.models.wan_dit import WanTransformer
from vpae_jax.models.wan_vae import WanVAE


def count(model) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def build(make, config):
    """The model's shapes, without its values."""
    return nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0)))


def on_paper(make) -> int:
    """Parameters of a PyTorch model that is never given memory."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in make().parameters())


# What the released `transformer/config.json` files say beyond Diffusers' defaults, and their parameters.
RELEASED = {
    "t2v-1.3b": (1_418_996_800, {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
    "t2v-14b": (14_288_491_584, {}),
    "i2v-14b": (16_394_878_784, {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}),
}


@pytest.mark.parametrize("name", RELEASED)
def test_transformers_have_the_released_sizes(name):
    expected, config = RELEASED[name]
    assert on_paper(lambda: WanTransformer3DModel(**config)) == expected
    assert count(build(WanTransformer, PRESETS[name].transformer)) == expected


def test_encoders_have_the_released_sizes():
    config = transformers.UMT5Config(
        vocab_size=256384,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    assert count(build(UMT5Encoder, UMT5_XXL)) == on_paper(lambda: transformers.UMT5EncoderModel(config))
    assert count(build(WanVAE, PRESETS["i2v-14b"].vae)) == on_paper(AutoencoderKLWan)
    config = transformers.CLIPVisionConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14
    )
    assert count(build(CLIPVision, CLIP_VIT_H)) == on_paper(lambda: transformers.CLIPVisionModel(config))


@pytest.mark.parametrize("name", PRESETS)
def test_parts_fit_each_other(name):
    preset = PRESETS[name]
    transformer = preset.transformer
    assert transformer.text_dim == preset.text_encoder.d_model
    assert transformer.out_channels == preset.vae.z_dim
    assert preset.heads.width == transformer.width
    assert preset.heads.taps == default_taps(transformer.num_layers)
    assert count(build(DiscriminatorHeads, preset.heads)) > 0
    if preset.image_encoder is None:
        assert transformer.image_dim is None and transformer.in_channels == preset.vae.z_dim
    else:
        assert transformer.image_dim == preset.image_encoder.hidden_size
        assert transformer.in_channels == 2 * preset.vae.z_dim + preset.vae.scale_factor_temporal
