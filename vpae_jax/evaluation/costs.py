"""Time per clip outside the network and the decoder, and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vpae_jax.inference.pictures import first_frames
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.metrics.times import EVALUATION, FIRST_CALL, MEMORY, STAGES
from vpae_jax.tasks.base import HeldOut

TEXT, IMAGE, FIRST_FRAME, *_, WRITE = STAGES


def encoding(pipeline: Pipeline, held_out: HeldOut) -> dict[str, float]:
    """Seconds of the encoding done once per clip before the network runs: its text, and its first frame where one is
    given. Compilation is excluded.

    Args:
      pipeline: with its encoders.
    """
    found = {TEXT: seconds_of(lambda: pipeline.encode_prompt(held_out.captions[:1]))}
    if any(part.name == "i2v" for part in held_out.parts):
        (f, h, w, _), config = held_out.shape, pipeline.vae.config
        height, width = h * config.scale_factor_spatial, w * config.scale_factor_spatial
        picture = np.full((1, height, width, 3), 128, np.uint8)
        if pipeline.image_encoder is not None:
            found[IMAGE] = seconds_of(lambda: pipeline.encode_image(picture))
        first, frames = first_frames(picture, height, width), 1 + (f - 1) * config.scale_factor_temporal
        found[FIRST_FRAME] = seconds_of(lambda: pipeline.condition_frames(first, frames))
    return found


def seconds_of(work: Callable[[], Any]) -> float:
    """Seconds of a call, measured after a warm-up call."""
    jax.block_until_ready(work())
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


def peak_memory() -> float:
    """Peak bytes in use on a device since the process began; of the process where devices do not report it (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if peaks := [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]:
        return float(max(peaks))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def typical(costs: Sequence[Mapping[str, float]], evaluations: int) -> dict[str, float]:
    """Typical costs of a clip: median seconds by stage, of one network evaluation, and of the first batch including
    compilation; and the peak memory.

    Args:
      costs: of each clip, as far as known.
      evaluations: network evaluations per clip.
    """
    names = [name for name in (*STAGES, FIRST_CALL) if any(name in one for one in costs)]
    found = {name: float(np.median([one[name] for one in costs if name in one])) for name in names}
    if "network" in found:
        found[EVALUATION] = found["network"] / evaluations
    if peaks := [one[MEMORY] for one in costs if MEMORY in one]:
        found[MEMORY] = max(peaks)
    return found
