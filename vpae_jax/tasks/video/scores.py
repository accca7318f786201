"""Scores of generated clips of any content against held-out real clips (`metrics.judge`), with additional metrics that
need the given first frame, or two clips of one condition."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from vpae_jax.metrics import judge, networks
from vpae_jax.metrics import latents as statistics
from vpae_jax.metrics.base import Clips, Metric
from vpae_jax.metrics.judge import Comparison
from vpae_jax.metrics.measures import difference, psnr
from vpae_jax.tasks.base import HeldOut, Measures, Part, Purpose, rows_of

METRICS = (
    *judge.METRICS,
    Metric("diversity", "diversity", "more", "Difference of two clips of one condition, relative to two real clips."),
    Metric(
        "diversity_content",
        "diversity, content",
        "more",
        "Distance of AlexNet features of two clips of one condition, relative to two real clips.",
    ),
    Metric("psnr_first", "PSNR, frame 0", "more", "First frame against the given image, in decibels."),
    Metric("lpips_first", "LPIPS, frame 0", "less", "First frame against the given image, by AlexNet; 0 is equal."),
)
# A student is rejected if its clips move less than this fraction of the real ones' motion, and less than before.
LEAST = {"motion": 0.5, "flow": 0.5}


def measure(clips: Clips, latents: Float[np.ndarray, "b f h w c"], purpose: Purpose) -> Measures:
    """Measures clips. Feature networks are only used for an evaluation, not for the guard during training."""
    return {**judge.measure(clips, purpose == "evaluation"), "moments": statistics.moments(latents)}


def compared(held_out: HeldOut, part: Part, made: Measures | None) -> Comparison:
    """Compares a part's clips with the real ones. If `made` is None, other real clips are compared with the real ones,
    which gives the best reachable values. If there are no real clips, as for prompts alone, clips are compared with
    themselves, by metrics that need no others."""
    real, others = rows_of(held_out.real, part.rows), held_out.others
    given, fps = part.name == "i2v", held_out.fps
    if made is None:
        return Comparison(others, real, real, fps, _first(others, others) if given else {}, {})
    rows, again = rows_of(made, part.rows), rows_of(made, part.again)
    real = {**rows, **real} if not others else real
    return Comparison(rows, real, others, fps, _first(rows, real) if given else {}, _diversity(rows, again, real))


def _first(made: Measures, real: Measures) -> Measures:
    """Returns how well each clip's first frame agrees with the given one."""
    found = {"psnr_first": psnr(made["first"], real["first"])}
    if "content" in made and (apart := networks.lpips(made["first"], real["first"])) is not None:
        found["lpips_first"] = apart
    return found


def _diversity(
    made: Measures, again: Measures, real: Measures
) -> dict[str, tuple[Float[np.ndarray, "n"], Float[np.ndarray, "m"]]]:
    """Returns the differences between two clips of one condition, and between two real clips of different ones."""
    first, second = rows_of(made, slice(len(again["clip"]))), again
    turned = rows_of(real, np.roll(np.arange(len(real["clip"])), 1))
    found = {"diversity": (difference(first["clip"], second["clip"]), difference(real["clip"], turned["clip"]))}
    if "content" in made:
        pairs = (first["content"], second["content"]), (real["content"], turned["content"])
        made_apart, real_apart = (1 - (one * other).sum(-1).mean(1) for one, other in pairs)
        found["diversity_content"] = (made_apart, real_apart)
    return found
