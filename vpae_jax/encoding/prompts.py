"""Prompts alone, with first frames or without: the conditions of clips that a student will make while it is trained.

A record is what `encoding.encoder` makes of a clip with the clip left out: text states and, for image-to-video, the
image states and the condition frames of the picture that is given, exactly as the pipeline makes them for the same
prompt, picture and size. Its shard says the size of the latents that are to be made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vpae_jax.encoding.buckets import Size, choose
from vpae_jax.encoding.captions import Captions, Prompt
from vpae_jax.encoding.clip_source import in_turn
from vpae_jax.encoding.encoder import Encoded, Encoders, arrays_of, dtype_of, fill, fingerprint, on_devices
from vpae_jax.encoding.units import Units


@runtime_checkable
class SizedEncoders(Encoders, Protocol):
    """What of `vpae_jax.inference.pipeline.Pipeline` is used here."""

    def latent_shape(self, batch: int, num_frames: int | None, height: int | None, width: int | None) -> Any: ...


@dataclass(frozen=True)
class Sizes:
    """Of the clips that are to be made.

    Attributes:
      num_frames: 1 + a multiple of 4.
      buckets: heights and widths, one of which each clip has: with a first frame that of the nearest aspect ratio, to
        which the picture is stretched; without, the first.
    """

    num_frames: int
    buckets: tuple[Size, ...]

    def of(self, prompt: Prompt) -> Size:
        """Height and width of a prompt's clip."""
        return self.buckets[0] if prompt.picture is None else choose(self.buckets, *prompt.picture.shape[:2])


def describe(prompts: Captions, encoders: SizedEncoders, sizes: Sizes) -> dict[str, Any]:
    """What decides the records: the identity of their folder. Raises `UserError` for clips that the model cannot
    make."""
    for size in sizes.buckets:
        encoders.latent_shape(1, sizes.num_frames, *size)
    return {
        "source": prompts.identity,
        "encoders": fingerprint(encoders),
        "dtype": dtype_of(encoders.text_encoder),
        "clips": {"num_frames": sizes.num_frames, "buckets": [list(size) for size in sizes.buckets]},
    }


def encode_prompts(
    prompts: Captions,
    encoders: SizedEncoders,
    sizes: Sizes,
    units: Units,
    batch_size: int = 1,
    process: int = 0,
    processes: int = 1,
    devices: Sequence[Any] | None = None,
) -> bool:
    """Encodes this process's share of the units that are not done yet.

    Args:
      prompts: what is to be shown, and the first frames if any.
      encoders: a pipeline.
      sizes: of the clips.
      units: the folder; its identity is `describe`'s.
      batch_size: prompts that a device encodes at once.
      process, processes: which share.
      devices: this process's by default.

    Returns:
      Whether all units are done, by whomever, and the folder can be read.
    """
    return fill(
        units,
        encoders,
        units.pending(process, processes),
        partial(in_turn, prompts.read),
        lambda: on_devices(partial(_encode, sizes=sizes, batch_size=batch_size), encoders, devices),
        batch_size,
        # Pictures of a batch are of one size, since the image encoder sees them as they are.
        size=lambda prompt: (sizes.of(prompt), None if prompt.picture is None else prompt.picture.shape),
        expected=prompts.rows_of,
        what="prompt",
    )


def _encode(prompts: list[Prompt], encoders: SizedEncoders, sizes: Sizes, batch_size: int) -> list[Encoded]:
    """Encodes prompts of one size. The batch is filled up to `batch_size`, so that one program serves all."""
    padded = [prompts[min(i, len(prompts) - 1)] for i in range(batch_size)]
    given = [prompt.picture for prompt in padded if prompt.picture is not None]
    height, width = sizes.of(prompts[0])
    size = sizes.num_frames, height, width
    condition = encoders.condition([prompt.caption for prompt in padded], np.stack(given) if given else None, *size)
    arrays, shape = arrays_of(None, condition), tuple(encoders.latent_shape(1, *size)[1:])
    result = []
    for row, prompt in enumerate(prompts):
        about = {"caption": prompt.caption, "num_frames": size[0], "height": height, "width": width}
        about |= {} if prompt.image is None else {"image": prompt.image}
        about |= {"row": dict(prompt.about)} if prompt.about else {}
        shown = None if prompt.picture is None else prompt.picture[None]
        result.append(Encoded(prompt.id, {name: x[row] for name, x in arrays.items()}, about, shown, shape))
    return result
