"""Contrastive training of the text and image encoders.

    logits_ij = exp(logit_scale) <u_i, w_j>,   loss_i = 1/2 (CE(logits_i., i) + CE(logits_.i, i))

where u_i and w_j are the normalised embeddings of clip i and caption j: the symmetric InfoNCE of CLIP (2103.00020).
Several clips of a batch often share a caption; such pairs are not negatives, so they are left out of both softmaxes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array
from jax.nn import logsumexp
from jaxtyping import Bool, Float

from vpae_jax.methods.base import Context, Method, Nets, Role, Update, averages
from vpae_jax.methods.common import f32
from vpae_jax.types import CaptionedFrames, Metrics, PerExample, TokenIds, UserError


@runtime_checkable
class PairEncoder(Protocol):
    """Encoders of clips and captions into one space."""

    def __call__(self, batch: CaptionedFrames) -> tuple[Float[Array, "b k"], Float[Array, "b k"], Float[Array, ""]]:
        """Clip embeddings, caption embeddings (of any length), and the logarithm of the inverse temperature."""
        ...


def same_caption(ids: TokenIds) -> Bool[Array, "b b"]:
    """True where two captions are identical; true on the diagonal."""
    return (ids[:, None, :] == ids[None, :, :]).all(-1)


def _normalised(x: Float[Array, "b k"]) -> Float[Array, "b k"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


@dataclass(frozen=True)
class Contrastive(Method):
    """Trains the encoders to match clips with their captions.

    Attributes:
      max_scale: upper bound of the inverse temperature (CLIP: 100).
      ema: decay of the averaged weights; 0 keeps no average.
    """

    batch: ClassVar[type] = CaptionedFrames
    whole_batch: ClassVar[bool] = True

    max_scale: float = 100.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        if self.max_scale <= 0:
            raise UserError(f"Contrastive.max_scale is {self.max_scale}, expected a positive number")

    @property
    def roles(self) -> Mapping[str, Role]:
        return {"encoders": Role("fresh", trains=True, part="encoders", averages=averages(self.ema))}

    @property
    def updates(self) -> tuple[Update, ...]:
        return (Update(("encoders",), self.loss),)

    def loss(self, nets: Nets, batch: CaptionedFrames, context: Context) -> tuple[PerExample, Metrics]:
        """Symmetric InfoNCE of each pair."""
        del context
        clips, captions, logit_scale = nets["encoders"](batch)
        scale = jnp.minimum(jnp.exp(f32(logit_scale)), self.max_scale)
        logits = scale * _normalised(f32(clips)) @ _normalised(f32(captions)).T
        right = jnp.eye(len(logits), dtype=bool)
        logits = jnp.where(same_caption(batch.ids) & ~right, -jnp.inf, logits)
        matched = jnp.diagonal(logits)
        loss = 0.5 * (logsumexp(logits, axis=1) + logsumexp(logits, axis=0)) - matched
        accuracy = (logits.argmax(1) == jnp.arange(len(logits))).astype(jnp.float32).mean()
        return loss, {"accuracy": accuracy, "scale": scale}
