"""A discriminator on pixels: heads on the hidden states of a frozen image encoder, which sees decoded frames.

ADD (2311.17042) reads decoded images with DINOv2, following StyleGAN-T (2301.09515). Here x0 is decoded by the frozen
autoencoder of the model directory, and read by a frozen image encoder, by default the CLIP tower that image-to-video
models contain anyway. The gradient passes through both, to x0 and from there to the generator:

    D(x0) = heads(h_taps(E(crop(resize(dec(x0)_[0, k])))))

dec(x0)_[0, k] are a clip's first video frame and the four of one latent frame k, identical to those from decoding the
whole clip (`models.wan_vae.WanVAE.decode_at`). k, uniform in 1 ... f - 1, and the position of the crop are drawn once
for all clips of an update (real, generated and perturbed), so that D differs between them by the clips alone.

Clips are shown without noise: the encoder was trained on clean images, and is told no timestep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from vpae_jax.methods.adversarial import DiscriminatorNoise
from vpae_jax.methods.base import Context, FrameDecoder, Nets, PixelEncoder, Role
from vpae_jax.methods.common import named_keys
from vpae_jax.methods.scores import ScoreDistillation
from vpae_jax.types import Condition, Features, Latents, Times, UserError

DECODER, ENCODER = "vae", "image_encoder"
ROLES: Mapping[str, Role] = {
    DECODER: Role("pretrained", part="vae"),
    ENCODER: Role("pretrained", part="image_encoder"),
}
# Separates the draws of a discriminator on pixels from all other draws of a batch's key, none of which has this number.
DRAWS = 2**31


@dataclass(frozen=True)
class Look:
    """A clip's frames as the backbone of a discriminator (`base.FeatureExtractor`).

    Attributes:
      decoder, encoder: the frozen networks.
      frame: the latent frame whose video frames are read, in addition to the first one.
      place: position of the encoder's square crop, in [0, 1).
    """

    decoder: FrameDecoder
    encoder: PixelEncoder
    frame: Int[Array, ""]
    place: Float[Array, ""]

    def features(self, x: Latents, t: Times, condition: Condition, taps: tuple[int, ...]) -> Features:
        """Hidden states of the frames of clean clips; timestep and condition are ignored."""
        return self.encoder.features(self.decoder.decode_at(x, self.frame), self.place, taps)


def look(nets: Nets, frames: int, context: Context) -> Look:
    """A `Look` at clips of `frames` latent frames, drawn from the batch's key."""
    keys = named_keys(jax.random.fold_in(context.batch, jnp.uint32(DRAWS)), "frame", "place")
    frame = jax.random.randint(keys.frame, (), 1, max(frames, 2), jnp.int32)
    return Look(nets[DECODER], nets[ENCODER], frame, jax.random.uniform(keys.place, (), jnp.float32))


def check_noise(owner: str, noise: DiscriminatorNoise) -> None:
    """Raises `UserError` unless clips are shown without noise."""
    if noise.kind != "clean":
        raise UserError(
            f"{owner}.noise.kind is {noise.kind!r}, but an image encoder needs clean clips; set noise.kind='clean'"
        )


def check_distance(owner: str, csds: ScoreDistillation) -> None:
    """Raises `UserError` for a distance to the teacher at the discriminator's timesteps, which do not exist here."""
    if csds.weight and csds.times == "discriminator":
        raise UserError(
            f"{owner}.csds.times is 'discriminator', but an image encoder is told no timestep; set csds.times='own'"
        )
