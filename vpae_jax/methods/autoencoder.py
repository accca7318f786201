"""Training of the video autoencoder.

    z = mean + exp(logvar / 2) n,    loss = mean |y - x| + mean (y - x)^2 + kl_weight KL(N(mean, var) || N(0, 1))

where y is the decoder's output for z, unclipped. The KL is a mean over latent values, 1/2 (mean^2 + var - 1 - logvar).
Kingma and Welling (1312.6114); a small KL weight and latents that are normalised afterwards as in Rombach et al.
(2112.10752).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp

from vpae_jax.flow import draws
from vpae_jax.methods.base import Context, Method, Nets, Role, Update, averages
from vpae_jax.methods.common import example_mean, f32
from vpae_jax.types import Latents, Metrics, PerExample, PixelBatch, UserError, Video

# The bounds of diffusers' DiagonalGaussianDistribution: exp() stays finite early in training.
LOGVAR_RANGE = (-30.0, 20.0)


@runtime_checkable
class VideoCoder(Protocol):
    """An autoencoder of clips on raw (not normalised) latents."""

    def moments(self, video: Video) -> tuple[Latents, Latents]:
        """Mean and log-variance of the latents."""
        ...

    def decode_raw(self, z: Latents) -> Video:
        """The clip of raw latents, not clipped to [-1, 1]."""
        ...


@dataclass(frozen=True)
class Autoencoder(Method):
    """Trains encoder and decoder.

    Attributes:
      l1, l2: weights of the absolute and the squared error.
      kl_weight: weight of the KL divergence (mean over latent values).
      ema: decay of the averaged weights; 0 keeps no average.
    """

    batch: ClassVar[type] = PixelBatch

    l1: float = 1.0
    l2: float = 1.0
    kl_weight: float = 1e-4
    ema: float = 0.0

    def __post_init__(self) -> None:
        for name in ("l1", "l2", "kl_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"Autoencoder.{name} is {getattr(self, name)}, expected 0 or more")

    @property
    def roles(self) -> Mapping[str, Role]:
        return {"vae": Role("fresh", trains=True, part="vae", averages=averages(self.ema))}

    @property
    def updates(self) -> tuple[Update, ...]:
        return (Update(("vae",), self.loss),)

    def loss(self, nets: Nets, batch: PixelBatch, context: Context) -> tuple[PerExample, Metrics]:
        """Reconstruction plus KL of each clip."""
        coder: VideoCoder = nets["vae"]
        video = f32(batch.video)
        mean, logvar = (f32(moment) for moment in coder.moments(video))
        logvar = jnp.clip(logvar, *LOGVAR_RANGE)
        z = mean + jnp.exp(0.5 * logvar) * draws.normal(context.clips, mean.shape, mean.dtype)
        error = f32(coder.decode_raw(z)) - video
        l1, l2 = example_mean(jnp.abs(error)), example_mean(error**2)
        kl = example_mean(0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar))
        metrics = {
            "l1": l1.mean(),
            # Videos span [-1, 1], so the peak is 2.
            "psnr": (10 * jnp.log10(4 / jnp.maximum(l2, 1e-10))).mean(),
            "kl": kl.mean(),
            "latent_mean": mean.mean(),
            "latent_std": mean.std(),
        }
        return self.l1 * l1 + self.l2 * l2 + self.kl_weight * kl, metrics
