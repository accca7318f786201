"""A whole pipeline at the smallest sizes, with random weights."""

from flax import nnx

from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.models.clip import CLIPVision, CLIPVisionConfig
from vpae_jax.models.umt5 import UMT5Config, UMT5Encoder
from vpae_jax.models.wan_dit import WanTransformer, WanTransformerConfig
from vpae_jax.models.wan_vae import WanVAE, WanVAEConfig
from vpae_jax.weights.image_processor import ImageProcessor
from vpae_jax.weights.settings import Defaults, Scheduler


def make_pipeline(tokenizer, seed: int = 0, image: bool = True) -> Pipeline:
    rngs = nnx.Rngs(seed)
    vae = WanVAE(WanVAEConfig(base_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1), rngs=rngs)
    text = UMT5Encoder(UMT5Config(384, 16, d_kv=8, d_ff=16, num_layers=1, num_heads=2), rngs=rngs)
    vision = CLIPVision(CLIPVisionConfig(16, 16, 2, 2, image_size=16, patch_size=8), rngs=rngs)
    transformer = WanTransformerConfig(
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=36 if image else 16,
        text_dim=16,
        freq_dim=8,
        ffn_dim=8,
        num_layers=1,
        image_dim=16 if image else None,
        added_kv_proj_dim=12 if image else None,
    )
    return Pipeline(
        transformer=WanTransformer(transformer, rngs=rngs),
        vae=vae,
        text_encoder=text,
        image_encoder=vision if image else None,
        tokenizer=tokenizer,
        image_processor=ImageProcessor(16, (16, 16)) if image else None,
        scheduler=Scheduler("euler", 1.0),
        defaults=Defaults(num_frames=5, height=16, width=16),
    )
