"""A discriminator on pixels: heads on the hidden states of a frozen image encoder, which sees decoded frames.

ADD (2311.17042) judges decoded images by DINOv2, after StyleGAN-T (2301.09515). Here x0 is decoded by the frozen
autoencoder of the model directory, and read by a frozen image encoder, by default the CLIP tower that image-to-video
models hold anyhow. The gradient passes through both, to x0 and from there to the generator:

    D(x0) = heads(h_taps(E(crop(resize(dec(x0)_[0, k])))))

dec(x0)_[0, k] are a clip's first video frame and the four of one latent frame k, which are as the whole clip's decoding
makes them (`models.wan_vae.WanVAE.decode_at`). k, uniform in 1 ... f - 1, and the place of the crop are drawn once for
all clips of an update, real and generated and perturbed ones, so that D differs between them by the clips alone.

Clips are shown as they are: the encoder knows no noise, and is told no time.
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
# Sets the draws of a discriminator on pixels apart from all others of a batch's key, none of which has this number.
DRAWS = 2**31


@dataclass(frozen=True)
class Look:
    """A clip's frames as the backbone of a discriminator (`base.FeatureExtractor`).

    Attributes:
      decoder, encoder: the frozen networks.
      frame: the latent frame whose video frames are looked at, beside the first one.
      place: where the encoder's square is cut out of them, in [0, 1).
    """

    decoder: FrameDecoder
    encoder: PixelEncoder
    frame: Int[Array, ""]
    place: Float[Array, ""]

    def features(self, x: Latents, t: Times, condition: Condition, taps: tuple[int, ...]) -> Features:
        """Hidden states of the frames of clean clips; time and condition are not looked at."""
        return self.encoder.features(self.decoder.decode_at(x, self.frame), self.place, taps)


def look(nets: Nets, frames: int, context: Context) -> Look:
    """One look at clips of so many latent frames, drawn by the batch's key."""
    keys = named_keys(jax.random.fold_in(context.batch, jnp.uint32(DRAWS)), "frame", "place")
    frame = jax.random.randint(keys.frame, (), 1, max(frames, 2), jnp.int32)
    return Look(nets[DECODER], nets[ENCODER], frame, jax.random.uniform(keys.place, (), jnp.float32))


def check_noise(owner: str, noise: DiscriminatorNoise) -> None:
    """Raises `UserError` unless clips are shown as they are."""
    if noise.kind != "clean":
        raise UserError(
            f"{owner}.noise.kind is {noise.kind!r}, but an image encoder knows clean clips only; set noise.kind='clean'"
        )


def check_distance(owner: str, csds: ScoreDistillation) -> None:
    """Raises `UserError` for a distance to the teacher at times that an image encoder is not told."""
    if csds.weight and csds.times == "discriminator":
        raise UserError(
            f"{owner}.csds.times is 'discriminator', but an image encoder is told no time; set csds.times='own'"
        )
