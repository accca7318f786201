"""Encodes prompts alone, with or without first frames: the conditions of clips that a student generates in training.

A record is what `encoding.encoder` would write for a clip, without the clip: text states and, for image-to-video, the
image states and condition frames of the given image, exactly as the pipeline computes them for the same prompt, image
and size. Its shard's entry in the index says the size of the latents to generate.
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
    """The part of `vpae_jax.inference.pipeline.Pipeline` that is used here."""

    def latent_shape(self, batch: int, num_frames: int | None, height: int | None, width: int | None) -> Any: ...


@dataclass(frozen=True)
class Sizes:
    """Sizes of the clips to generate.

    Attributes:
      num_frames: frames per clip, 1 + a multiple of 4.
      buckets: possible heights and widths. With a first frame, a clip gets the one with the nearest aspect ratio, to
        which the image is stretched; without, it gets the first.
    """

    num_frames: int
    buckets: tuple[Size, ...]

    def of(self, prompt: Prompt) -> Size:
        """Returns height and width of a prompt's clip."""
        return self.buckets[0] if prompt.picture is None else choose(self.buckets, *prompt.picture.shape[:2])


def describe(prompts: Captions, encoders: SizedEncoders, sizes: Sizes) -> dict[str, Any]:
    """Returns everything that determines the records: the identity of their folder. Raises `UserError` for clips that
    the model cannot generate."""
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
      prompts: the prompts, and their first frames if any.
      encoders: a pipeline.
      sizes: sizes of the clips to generate.
      units: the folder; its identity must be that of `describe`.
      batch_size: prompts that a device encodes at once.
      process, processes: index of this process, and number of processes that divide the units.
      devices: by default all of this process.

    Returns:
      Whether all units are done (by any process) and the folder can be read.
    """
    return fill(
        units,
        encoders,
        units.pending(process, processes),
        partial(in_turn, prompts.read),
        lambda: on_devices(partial(_encode, sizes=sizes, batch_size=batch_size), encoders, devices),
        batch_size,
        # All images of a batch must have one size, since the image encoder gets them unresized.
        size=lambda prompt: (sizes.of(prompt), None if prompt.picture is None else prompt.picture.shape),
        expected=prompts.rows_of,
        what="prompt",
    )


def _encode(prompts: list[Prompt], encoders: SizedEncoders, sizes: Sizes, batch_size: int) -> list[Encoded]:
    """Encodes prompts of one size. The batch is padded to `batch_size`, so that a single compiled program suffices."""
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
