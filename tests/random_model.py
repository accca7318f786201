"""Tiny Wan pipelines with random weights, built and saved by diffusers and transformers themselves."""

from pathlib import Path

import diffusers
import torch
import transformers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vpae_jax.tasks.digits.words import build_tokenizer

SIDE = 32


def transformer(image: bool) -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36 if image else 16,
        out_channels=16,
        text_dim=32,
        freq_dim=16,
        ffn_dim=40,
        num_layers=2,
        image_dim=24 if image else None,
        added_kv_proj_dim=24 if image else None,
    )


def vae() -> diffusers.AutoencoderKLWan:
    return diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)


def text_encoder() -> transformers.UMT5EncoderModel:
    return transformers.UMT5EncoderModel(
        transformers.UMT5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    )


def image_encoder() -> transformers.CLIPVisionModel:
    return transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            image_size=SIDE,
            patch_size=8,
            hidden_size=24,
            num_attention_heads=2,
            intermediate_size=32,
            num_hidden_layers=3,
            hidden_act="gelu",
        )
    )


def pipeline(folder: Path, image: bool) -> diffusers.DiffusionPipeline:
    """Saves a pipeline into `folder` and returns it."""
    torch.manual_seed(0)
    parts = {
        "transformer": transformer(image),
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": build_tokenizer(folder / "tokenizer"),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }
    if image:
        size = {"height": SIDE, "width": SIDE}
        parts["image_encoder"] = image_encoder()
        parts["image_processor"] = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
            for weight in part.parameters():  # far from the initial values, so that every term is seen
                weight.add_(0.05 * torch.randn_like(weight))
    made = (diffusers.WanImageToVideoPipeline if image else diffusers.WanPipeline)(**parts)
    made.save_pretrained(folder)
    return made
