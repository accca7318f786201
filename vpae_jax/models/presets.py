"""Sizes of whole pipelines: the embedded tiny one, and Wan 2.1's.

Wan's values are those of its released Diffusers folders (Wan-AI/Wan2.1-{T2V-1.3B,T2V-14B,I2V-14B}-Diffusers); what is
not spelt out here is a default of the part's config. A model directory's own `config.json` files win over these:
presets serve parts that start from random weights, planning, and tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from vpae_jax.config import nearest
from vpae_jax.models.clip import CLIPVisionConfig
from vpae_jax.models.heads import HeadsConfig, default_taps
from vpae_jax.models.tiny_decoder import TinyDecoderConfig
from vpae_jax.models.umt5 import UMT5Config
from vpae_jax.models.wan_dit import WanTransformerConfig
from vpae_jax.models.wan_vae import WanVAEConfig
from vpae_jax.types import UserError


@dataclass(frozen=True)
class Preset:
    """Sizes of every part of a pipeline.

    Attributes:
      transformer: the diffusion transformer.
      heads: discriminator heads on its features.
      vae: the video autoencoder.
      decoder: the small decoder that can replace that of the VAE.
      text_encoder: the text encoder.
      image_encoder: the image encoder; None for text-to-video.
    """

    transformer: WanTransformerConfig
    heads: HeadsConfig
    vae: WanVAEConfig
    text_encoder: UMT5Config
    image_encoder: CLIPVisionConfig | None
    decoder: TinyDecoderConfig = field(default_factory=TinyDecoderConfig)


# One transformer for text-to-video (zero image, zero first frame) and image-to-video.
TINY = Preset(
    transformer=WanTransformerConfig(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=36,
        text_dim=64,
        freq_dim=64,
        ffn_dim=512,
        num_layers=6,
        image_dim=64,
        added_kv_proj_dim=192,
    ),
    heads=HeadsConfig(width=192, taps=default_taps(6), num_heads=6),
    vae=WanVAEConfig(base_dim=8, dim_mult=(1, 2, 4, 8), num_res_blocks=1),
    text_encoder=UMT5Config(vocab_size=384, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
    image_encoder=CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    ),
    decoder=TinyDecoderConfig(widths=(32, 24, 12, 8)),
)

UMT5_XXL = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
CLIP_VIT_H = CLIPVisionConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=16,
    image_size=224,
    patch_size=14,
    hidden_act="gelu",
)

T2V_1_3B = Preset(
    transformer=WanTransformerConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    # As wide as the transformer, like APT's cross-attention blocks: 106 million parameters.
    heads=HeadsConfig(width=1536, hidden=1536, taps=default_taps(30), num_heads=12),
    vae=WanVAEConfig(),
    text_encoder=UMT5_XXL,
    image_encoder=None,
)
T2V_14B = replace(
    T2V_1_3B,
    transformer=WanTransformerConfig(),
    # A quarter as wide: 113 million parameters, about as many as for 1.3B. Heads as wide as the transformer would have
    # 1.2 billion random parameters, too many for a thousand small steps on 32 clips.
    heads=HeadsConfig(width=5120, hidden=1280, taps=default_taps(40), num_heads=10),
)
I2V_14B = replace(
    T2V_14B,
    transformer=WanTransformerConfig(in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
    image_encoder=CLIP_VIT_H,
)

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {"tiny": TINY, "t2v-1.3b": T2V_1_3B, "t2v-14b": T2V_14B, "i2v-14b": I2V_14B}
)


def find(name: str) -> Preset:
    """The preset of this name. Raises `UserError` if there is none."""
    if name not in PRESETS:
        raise UserError(f"config.model.preset: {name!r} does not exist{nearest(name, PRESETS)}")
    return PRESETS[name]
