"""Shapes, batches and errors used by all packages.

Axis letters used in shape annotations and einops patterns:

    b  clip in a batch          f  latent frame (4 video frames; the first stands for 1)
    t  video frame              h  latent row (8 pixels)      w  latent column (8 pixels)
    c  channel                  s  text token                 n  image or video token
    d  model width              e  image-encoder width

Videos are `[b, t, height, width, 3]` in [-1, 1]; latents are `[b, f, h, w, c]`, normalised by the VAE's
per-channel mean and standard deviation. Channels always come last inside the package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Metric
from jax import Array
from jaxtyping import Bool, Float, Int, Key, PyTree, Shaped, UInt8, UInt32

# Arrays of a batch: numpy on the host, JAX once they are on the devices.
if TYPE_CHECKING:
    AnyArray = Any
else:
    AnyArray = Array | np.ndarray

HostArray = Shaped[np.ndarray, "..."]
Video = Float[Array, "b t height width 3"]
Frames = UInt8[Array, "t height width 3"]
Latents = Float[Array, "b f h w c"]
Times = Float[Array, "b"]
# A timestep for each latent frame, as in causal models.
FrameTimes = Float[Array, "b f"]
Tokens = Float[Array, "b n d"]
PerExample = Float[Array, "b"]
TokenIds = Int[Array, "b s"]
Mask = Bool[Array, "b s"]
# One key, or one per clip (`flow.draws`).
PRNGKey = Key[Array, "..."]
# Weights by path; in abstract trees their shapes or shardings instead.
Params = PyTree[Any]
# Metrics of a part of a batch. Their mean over the parts is that of the batch, or a clu metric says how to merge them.
Metrics = Mapping[str, Array | Metric]


# Channels of the mask of given frames: one for each video frame in a latent frame.
MASK_CHANNELS = 4


class UserError(Exception):
    """Bad input, described in one line: what is wrong, where, what was expected, what to do.

    Programs print the message without a traceback and exit with status 2.
    """


class Note(UserWarning):
    """Something the user should know about a result that is produced anyway; programs print it on one line."""


T = TypeVar("T")


def static(**options: Any) -> Any:
    """Declares a field of a `pytree` that is not an array but part of its structure: programs are compiled for its
    value. Options are those of `dataclasses.field`."""
    return dataclasses.field(metadata={"static": True}, **options)


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def pytree(cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass and a JAX pytree; every field is a tree of arrays, or `static`.

    JAX also builds such objects from placeholders for arrays (shapes, shardings, None). It bypasses `__init__`, so the
    shape annotations, which the tests check, only apply to objects built by a caller.
    """
    made: Any = dataclasses.dataclass(frozen=True)(cls)
    fixed = [f.name for f in dataclasses.fields(made) if f.metadata.get("static")]
    names = [f.name for f in dataclasses.fields(made) if f.name not in fixed]

    def structure(tree: T) -> tuple[Any, ...]:
        return tuple(getattr(tree, name) for name in fixed)

    def put_together(structure: tuple[Any, ...], values: Iterable[Any]) -> T:
        result = object.__new__(made)
        for name, value in zip([*fixed, *names], [*structure, *values], strict=True):
            object.__setattr__(result, name, value)
        return result

    jax.tree_util.register_pytree_with_keys(
        made,
        lambda tree: ([(jax.tree_util.GetAttrKey(name), getattr(tree, name)) for name in names], structure(tree)),
        put_together,
        lambda tree: ([getattr(tree, name) for name in names], structure(tree)),
    )
    return made


@pytree
class Condition:
    """What a Wan transformer is conditioned on.

    Attributes:
      text: text-encoder states, zero after the end of each prompt.
      text_mask: true at the prompt's tokens.
      image: image-encoder states (CLIP, penultimate layer); zeros mean "no image". None for a text-to-video model.
      frames: 4 mask channels (1 where a frame is given), then 16 latent channels of the given first frame followed by
        grey frames. Zeros mean "no frame given". None for a text-to-video model.
    """

    text: Float[AnyArray, "b s d_text"]
    text_mask: Bool[AnyArray, "b s"]
    image: Float[AnyArray, "b n_image e"] | None = None
    frames: Float[AnyArray, "b f h w c_frames"] | None = None


@pytree
class Batch:
    """Real clips and their conditions, as distillation methods receive them; or conditions alone.

    Attributes:
      latents: clean video latents x0. None for prompts alone, whose clips have yet to be generated; only methods that
        need no real clips are given such batches (`Method.needs_clips`).
      condition: the clips' conditions.
      null_text: text-encoder states of the negative prompt, shared by all clips.
      null_mask: true at the negative prompt's tokens.
      seed: for clips made by a teacher, the seed of the noise that each was sampled from (`flow.draws.noise_of_seeds`).
        None if the method does not ask for it (`Method.known_noise`).
      size: [f, h, w, c] of the latents to generate if `latents` is None; otherwise None.
    """

    latents: Float[AnyArray, "b f h w c"] | None
    condition: Condition
    null_text: Float[AnyArray, "s d_text"]
    null_mask: Bool[AnyArray, "s"]
    seed: UInt32[AnyArray, "b"] | None = None
    size: tuple[int, int, int, int] | None = static(default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape [b, f, h, w, c] of the latents, whether they are given or have yet to be generated.

        Raises:
          ValueError: the batch has neither latents nor a size.
        """
        if self.latents is not None:
            return self.latents.shape
        if self.size is None:
            raise ValueError("a batch without latents has to say their size")
        return (len(self.condition.text), *self.size)

    @property
    def unconditional(self) -> Condition:
        """The condition with the negative prompt but the same image and first frame, as Wan guides image-to-video."""
        text, mask = self.condition.text, self.condition.text_mask
        return dataclasses.replace(
            self.condition,
            text=jnp.broadcast_to(self.null_text, text.shape).astype(text.dtype),
            text_mask=jnp.broadcast_to(self.null_mask, mask.shape),
        )


@pytree
class Features:
    """What discriminator heads read from a transformer, or from an image encoder.

    Attributes:
      taps: hidden states after the tapped blocks, in order.
      text: projected text tokens, with the transformer's width; None for an image encoder.
      text_mask: true at the prompt's tokens; None without text.
      grid: frames, rows and columns in which the n tokens of a tap are arranged; columns vary fastest.
      image: projected image tokens, with the transformer's width; None for a text-to-video model or an image encoder.
    """

    taps: tuple[Float[Array, "b n d"], ...]
    text: Float[Array, "b s d"] | None
    text_mask: Bool[Array, "b s"] | None
    grid: tuple[int, int, int] = static()
    image: Float[Array, "b n_image d"] | None = None


@pytree
class Memory:
    """The key-value cache of a causal transformer: each layer's keys (before rotary embedding) and values of earlier
    frames.

    Attributes:
      keys, values: one token per row; the first `frames` frames are in use.
      frames: number of latent frames in the cache.
    """

    keys: Float[Array, "layers b m heads head_dim"]
    values: Float[Array, "layers b m heads head_dim"]
    frames: Int[Array, ""]


@pytree
class PixelBatch:
    """Clips as pixels, for training the autoencoder.

    Attributes:
      video: values in [-1, 1].
    """

    video: Float[AnyArray, "b t height width 3"]


@pytree
class CaptionedFrames:
    """Frames and captions, for training the text and image encoders.

    Attributes:
      first, last: the first and last frame of each clip, values in [-1, 1].
      ids: caption tokens.
      mask: true at the caption's tokens.
    """

    first: Float[AnyArray, "b height width 3"]
    last: Float[AnyArray, "b height width 3"]
    ids: Int[AnyArray, "b s"]
    mask: Bool[AnyArray, "b s"]


def in_float32(tree: T) -> T:
    """Converts a tree to JAX arrays, with floats in float32."""

    def wide(x: Any) -> Array:
        return jnp.asarray(x, jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)

    return jax.tree.map(wide, tree)
