"""The text and image encoders with projections into a common space, to be trained against each other.

Only for training a model's encoders from scratch (the embedded tiny model): the projections and the temperature are
dropped afterwards. A clip is represented by its first and last frame, so that captions of motion can be distinguished.
The hidden states that are pooled and trained are those that a Wan transformer will read: all text states and the image
tower's penultimate layer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from vpae_jax.models.clip import CLIPVision, CLIPVisionConfig
from vpae_jax.models.umt5 import UMT5Config, UMT5Encoder
from vpae_jax.types import CaptionedFrames

# CLIP's preprocessing, for frames already in [-1, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class PairEncoder(nnx.Module):
    """Embeds (first frame, last frame) and captions.

    Args:
      text: sizes of the text encoder.
      image: sizes of the image encoder.
      width: dimension of the common space.
    """

    def __init__(self, text: UMT5Config, image: CLIPVisionConfig, width: int = 64, *, rngs: nnx.Rngs):
        self.image_size = image.image_size
        self.text_encoder = UMT5Encoder(text, rngs=rngs)
        self.image_encoder = CLIPVision(image, rngs=rngs)
        self.text_projection = nnx.Linear(text.d_model, width, rngs=rngs)
        self.clip_projection = nnx.Linear(2 * image.hidden_size, width, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.log(jnp.float32(10.0)))

    def __call__(self, batch: CaptionedFrames) -> tuple[Float[Array, "b k"], Float[Array, "b k"], Float[Array, ""]]:
        """Clip embeddings, caption embeddings, logarithm of the inverse temperature."""
        ends = jnp.concatenate([self._frame(batch.first), self._frame(batch.last)], axis=-1)
        states = self.text_encoder(batch.ids, batch.mask)
        weights = batch.mask / jnp.sum(batch.mask, axis=-1, keepdims=True)
        caption = jnp.einsum("bsd,bs->bd", states, weights)
        return self.clip_projection(ends), self.text_projection(caption), self.logit_scale[...]

    def _frame(self, frame: Float[Array, "b height width 3"]) -> Float[Array, "b e"]:
        size = (frame.shape[0], self.image_size, self.image_size, 3)
        pixels = (jax.image.resize(frame, size, "cubic") + 1) / 2
        return self.image_encoder((pixels - jnp.array(MEAN)) / jnp.array(STD)).mean(axis=1)
