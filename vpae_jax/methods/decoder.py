"""Distillation of a small decoder from that of the video autoencoder.

    y = dec(z),  y' = small(z),    loss = l1 mean |y' - y| + l2 mean (y' - y)^2

z are latents of the user's clips, or pieces of them: both networks treat the same piece as a separate clip, so that
large clips need not be decoded whole. The autoencoder is frozen. TAEHV (github.com/madebyollin/taehv) and LightX2V's
LightTAE have published their decoders, but no recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vpae_jax.methods.base import Context, Method, Nets, Role, Update, averages
from vpae_jax.methods.common import check_at_least, example_mean, f32, named_keys, real_clips
from vpae_jax.types import Batch, Latents, Metrics, PerExample, PRNGKey, UserError


@dataclass(frozen=True)
class Decoder(Method):
    """Trains the decoder.

    Attributes:
      l1, l2: weights of the absolute and the squared error, of values in [-1, 1].
      frames: latent frames of a piece, from the first frame of the clip on; 0 uses all.
      side: latent rows and columns of a piece, whose position is drawn once for all clips of a batch; 0 uses all.
      ema: decay of the averaged weights; 0 keeps no average.
    """

    batch: ClassVar[type] = Batch

    l1: float = 1.0
    l2: float = 1.0
    frames: int = 0
    side: int = 0
    ema: float = 0.0

    def __post_init__(self) -> None:
        check_at_least("Decoder", 0, l1=self.l1, l2=self.l2, frames=self.frames, side=self.side)
        if not self.l1 and not self.l2:
            raise UserError("Decoder.l1 and l2 are both 0; set one")

    @property
    def roles(self) -> Mapping[str, Role]:
        return {
            "vae": Role("pretrained", part="vae"),
            "decoder": Role("fresh", trains=True, part="decoder", averages=averages(self.ema)),
        }

    @property
    def updates(self) -> tuple[Update, ...]:
        return (Update(("decoder",), self.loss),)

    def loss(self, nets: Nets, batch: Batch, context: Context) -> tuple[PerExample, Metrics]:
        """Error with respect to the autoencoder's decoding of the same latents."""
        latents = self.piece(real_clips(batch), context.batch)
        video = f32(jax.lax.stop_gradient(nets["vae"].decode(latents)))
        error = f32(nets["decoder"].decode_raw(latents)[0]) - video
        l1, l2 = example_mean(jnp.abs(error)), example_mean(error**2)
        # Videos span [-1, 1], so the peak is 2.
        metrics = {"l1": l1.mean(), "psnr": (10 * jnp.log10(4 / jnp.maximum(l2, 1e-10))).mean()}
        return self.l1 * l1 + self.l2 * l2, metrics

    def piece(self, latents: Latents, key: PRNGKey) -> Float[Array, "b frames rows columns c"]:
        """The piece of each clip that is decoded."""
        _, f, h, w, _ = latents.shape
        frames, rows, columns = (
            min(most, size) if most else size for most, size in ((self.frames, f), (self.side, h), (self.side, w))
        )
        keys = named_keys(key, "row", "column")
        top = jax.random.randint(keys.row, (), 0, h - rows + 1)
        left = jax.random.randint(keys.column, (), 0, w - columns + 1)
        piece = jax.lax.dynamic_slice_in_dim(latents[:, :frames], top, rows, axis=2)
        return jax.lax.dynamic_slice_in_dim(piece, left, columns, axis=3)
