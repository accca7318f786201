"""The sizes of the benchmarks: whole models for accelerators, thin slices of the 1.3B model for CPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from vpae_jax.models import presets
from vpae_jax.models.umt5 import UMT5Config
from vpae_jax.models.wan_dit import WanTransformerConfig
from vpae_jax.models.wan_vae import WanVAEConfig

N_IMAGE = 257  # tokens of Wan's image encoder


@dataclass(frozen=True)
class Size:
    """Sizes of the models and of their inputs.

    Attributes:
      transformer: the diffusion transformer.
      latents: latent frames, rows and columns that it reads.
      step_latents: the same in a training step.
      vae: the autoencoder.
      video: frames, rows and columns that it encodes, and decodes to.
      text_encoder: the text encoder.
      tokens: number of text tokens that it reads.
      dtype: of computation and weights; weights trained in a step are float32.
      remat: what a backward pass of the transformer recomputes.
      product: rows of the square matrices in the reference product.
    """

    transformer: WanTransformerConfig
    latents: tuple[int, int, int]
    step_latents: tuple[int, int, int]
    vae: WanVAEConfig
    video: tuple[int, int, int]
    text_encoder: UMT5Config
    tokens: int
    dtype: str
    remat: str
    product: int


# fmt: off
CPU = Size(
    transformer=replace(presets.T2V_1_3B.transformer, num_layers=2), latents=(4, 32, 32),
    step_latents=(4, 16, 16),
    vae=WanVAEConfig(), video=(9, 64, 64),
    text_encoder=UMT5Config(vocab_size=1000, d_model=2048, d_kv=64, d_ff=5120, num_layers=2, num_heads=32), tokens=512,
    dtype="float32", remat="none", product=3072,
)
WAN_480P = Size(
    transformer=presets.T2V_1_3B.transformer, latents=(21, 60, 104),
    step_latents=(21, 60, 104), vae=WanVAEConfig(), video=(81, 480, 832),
    text_encoder=presets.UMT5_XXL, tokens=512, dtype="bfloat16", remat="full", product=8192,
)
SIZES: Mapping[str, Size] = MappingProxyType({
    "tiny": Size(
        transformer=presets.TINY.transformer, latents=(3, 6, 6), step_latents=(3, 6, 6),
        vae=presets.TINY.vae, video=(9, 16, 16),
        text_encoder=presets.TINY.text_encoder, tokens=16, dtype="float32", remat="none", product=256,
    ),
    "cpu": CPU,
    # Attention's fraction of the time grows with the number of tokens.
    "cpu-long": replace(CPU, transformer=replace(CPU.transformer, num_layers=1), latents=(4, 64, 64)),
    "1.3b": WAN_480P,
    "14b": replace(WAN_480P, transformer=presets.T2V_14B.transformer),
})
# fmt: on


def find(name: str, layers: int | None) -> Size:
    """A size of `SIZES`, optionally with another number of transformer layers."""
    size = SIZES[name]
    return size if layers is None else replace(size, transformer=replace(size.transformer, num_layers=layers))
