"""How good generated clips of any content are, against real clips that no training saw.

Sharpness, motion and latents are compared with the real clips of the same conditions, the kernel distance with other
ones: a clip that begins with a real clip's first frame is not independent of it.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from vpae_jax.metrics import latents as statistics
from vpae_jax.metrics.base import Clips, Metric
from vpae_jax.metrics.distances import FeatureScale, features, kernel_distance
from vpae_jax.metrics.latents import Channels
from vpae_jax.metrics.measures import change, color_drift, difference, psnr, reduced, sharpness, speed
from vpae_jax.tasks.base import Measures, Part, rows_of

METRICS = (
    Metric("kvd", "KVD", "less", "Kernel distance to other real clips, in thousandths; about 0 for real clips."),
    Metric("sharpness", "sharpness", "real", "Mean absolute Laplacian over that of real clips; blur is below 1."),
    Metric("motion", "motion", "real", "Mean speed of edges over that of real clips; less is stiller."),
    Metric("still", "still", "real", "Share of clips whose frames differ by less than half a level of 255."),
    Metric("diversity", "diversity", "more", "Difference of two clips of one condition over that of two real clips."),
    Metric("color_drift", "colour drift", "real", "Relative change of the mean colour from first to last frame."),
    Metric("latent_mean", "latent mean", "less", "Distance of the latent channels' means, in standard deviations."),
    Metric("latent_std", "latent spread", "real", "Standard deviation of latent channels over that of real clips."),
    Metric("psnr_first", "PSNR, frame 0", "more", "First frame against the given picture, in decibels."),
)
STILL = 0.5  # levels of 255 between successive frames


def measure(clips: Clips, latents: Float[np.ndarray, "b f h w c"]) -> Measures:
    """What is kept of clips. The first frame and the clip are kept as `measures.reduced` leaves them."""
    small = reduced(clips)
    return {
        "features": features(small),
        "sharpness": sharpness(reduced(clips, side=max(clips.shape[2:4]))),
        "speed": speed(small),
        "change": change(small),
        "color_drift": color_drift(clips),
        "moments": statistics.moments(latents),
        "first": reduced(clips[:, :1])[:, 0],
        "clip": small,
    }


def against_real(made: Measures, real: Measures, others: Measures) -> dict[str, float]:
    """All metrics that need no conditions.

    Args:
      made: of the clips that are judged.
      real: of the real clips of their conditions.
      others: of other real clips, at least two.
    """
    scale = FeatureScale.of(others["features"])
    channels = Channels.of(made["moments"]), Channels.of(real["moments"])
    return {
        "kvd": kernel_distance(scale(made["features"]), scale(others["features"])),
        "sharpness": _over(made["sharpness"], real["sharpness"]),
        "motion": _over(made["speed"], real["speed"]),
        "still": float((made["change"] < STILL).mean()),
        "color_drift": float(made["color_drift"].mean()),
        "latent_mean": statistics.shift(*channels),
        "latent_std": statistics.spread(*channels),
    }


def diversity(made: Measures, part: Part, real: Measures) -> float:
    """How far two clips of one condition are apart, over two real clips of different ones."""
    again = rows_of(made, part.again)["clip"]
    pairs = difference(rows_of(made, part.rows)["clip"][: len(again)], again)
    return _over(pairs, difference(real["clip"], np.roll(real["clip"], 1, axis=0)))


def agreement(made: Measures, real: Measures) -> float:
    """PSNR of the first frames against the given ones."""
    return float(psnr(made["first"], real["first"]).mean())


def _over(made: Float[np.ndarray, "n"], real: Float[np.ndarray, "m"]) -> float:
    """The ratio of two means."""
    return float(made.mean() / max(real.mean(), 1e-6))
