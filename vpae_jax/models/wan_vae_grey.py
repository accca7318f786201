"""Latents of an image followed by grey frames, the input of image-to-video models, without repeated work.

All grey pieces are equal, and the encoder sees a finite number of earlier frames. So at each resolution, the finest
first, from some piece on the convolutions remember the same frames before and after it. From then on this resolution's
result equals that for the piece before, as long as this holds for the finer one. The latents equal those of an encoder
that processes all pieces; Wan's runs level 0 for 4 of a clip's 20 grey pieces, level 1 for 6, level 2 for 10.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vpae_jax.models.wan_vae import PRECISION, Cache, Stage, WanVAE
from vpae_jax.models.wan_vae_blocks import History, Volume
from vpae_jax.models.wan_vae_rows import Strip, all_devices_agree
from vpae_jax.types import Latents, Video, pytree


@pytree
class Level:
    """State of one resolution of the encoder after some pieces.

    Attributes:
      cache: the frames that its convolutions remember.
      out: its result for the last piece.
      settled: whether the last piece left the cache unchanged.
    """

    cache: Cache
    out: Volume
    settled: Bool[Array, ""]


# The levels, finest first.
Grey = list[Level]


def encode_first(vae: WanVAE, first: Video) -> tuple[Latents, Grey]:
    """Normalised latents of clips of one frame, and the state for encoding grey frames after it.

    Raises as `WanVAE.moments`.
    """
    space = vae.config.scale_factor_spatial
    vae.check_video(first)
    return vae.by_rows(_begin, first, None, first.shape[2] // space)


def encode_grey(vae: WanVAE, past: Grey, frames: int, rows: int) -> tuple[Latents, Grey]:
    """Latents of `frames` further latent frames of `rows` rows whose video is grey (zero), and the state after them."""
    last, time, space = past[-1].out, vae.config.scale_factor_temporal, vae.config.scale_factor_spatial

    def run(vae: WanVAE, grey: Volume, past: Grey, strip: Strip | None) -> tuple[Volume, Grey]:
        def step(past: Grey, _: None) -> tuple[Grey, Float[Array, "b h w c"]]:
            past = _advance(vae.encode_stages(), grey, past, strip)
            return past, past[-1].out[:, 0]

        past, latents = jax.lax.scan(step, past, length=frames)
        return jnp.moveaxis(latents, 0, 1), past

    b, _, _, w, _ = last.shape
    return vae.by_rows(run, jnp.zeros((b, time, rows * space, w * space, 3)), past, rows)


def _begin(vae: WanVAE, first: Volume, _: None, strip: Strip | None) -> tuple[Volume, Grey]:
    piece = jax.ShapeDtypeStruct((first.shape[0], vae.config.scale_factor_temporal, *first.shape[2:]), first.dtype)
    x, levels = first, []
    with jax.default_matmul_precision(PRECISION):
        for stage in vae.encode_stages():
            history = History(strip=strip)
            x = stage(x, history)
            piece = jax.eval_shape(lambda x, cache, stage=stage: stage(x, History(cache, strip)), piece, history.seen)
            # The result for a whole piece is not known yet; it is not read before the cache has settled.
            levels.append(Level(history.seen, jnp.zeros(piece.shape, piece.dtype), jnp.bool_(False)))
    return x, levels


def _advance(stages: list[Stage], grey: Volume, past: Grey, strip: Strip | None) -> Grey:
    """The levels after one more piece."""
    x, same, levels = grey, jnp.bool_(True), []
    for stage, level in zip(stages, past, strict=True):

        def run(x: Volume, level: Level, stage: Stage = stage) -> Level:
            history = History(level.cache, strip)
            with jax.default_matmul_precision(PRECISION):
                out = stage(x, history)
            kept = [(old == new).all() for old, new in zip(level.cache, history.seen, strict=True)]
            return Level(history.seen, out, all_devices_agree(jnp.stack(kept).all(), strip))

        # `same`: x equals this level's input for the piece before.
        same = same & level.settled
        level = jax.lax.cond(same, lambda x, level: level, run, x, level)
        levels.append(level)
        x = level.out
    return levels
