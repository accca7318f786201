"""Classifier-free guidance, one convention: `v_u + w (v_c - v_u)`.

w = 1 is no guidance and w = 5 is Wan's default. About half of the public distillation code (the diffusers LCM script,
PCM, DCM, FastVideo, CausVid, Self-Forcing) writes `v_c + s (v_c - v_u)` instead, with s = w - 1. Guiding velocities is
the same as guiding x0 predictions, because x0 = x_t - t v is affine in v.
"""

from __future__ import annotations

from jax import Array
from jaxtyping import Float

from vpae_jax.flow.schedule import Signal


def guided(v_uncond: Signal, v_cond: Signal, w: float | Float[Array, ""]) -> Signal:
    """The guided prediction, of velocities or of x0.

    Args:
      v_uncond: prediction under the negative prompt.
      v_cond: prediction under the prompt.
      w: guidance; 0 gives the unconditional prediction, 1 the conditional one.
    """
    return v_uncond + w * (v_cond - v_uncond)
