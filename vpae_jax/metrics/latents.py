"""Per-channel statistics of latents, which reveal drift in training before it shows in pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

# The mean and the mean square, for each clip and channel.
Moments = Float[np.ndarray, "b 2 c"]


def moments(latents: Float[np.ndarray, "b f h w c"]) -> Moments:
    """Each clip's mean and mean square of each channel."""
    x = latents.astype(np.float64)
    return np.stack([x.mean((1, 2, 3)), (x**2).mean((1, 2, 3))], 1)


@dataclass(frozen=True)
class Channels:
    """Mean and standard deviation of each latent channel, over all positions of a set of clips."""

    mean: Float[np.ndarray, "c"]
    std: Float[np.ndarray, "c"]

    @classmethod
    def of(cls, moments: Moments) -> Channels:
        mean, square = moments.mean(0)
        return cls(mean, np.sqrt(np.maximum(square - mean**2, 1e-12)))


def shift(made: Channels, real: Channels) -> float:
    """Root mean square, over channels, of the difference of means, in standard deviations of the real clips."""
    return float(np.sqrt((((made.mean - real.mean) / real.std) ** 2).mean()))


def spread(made: Channels, real: Channels) -> float:
    """Geometric mean, over channels, of the ratio of standard deviations; below 1 for blur."""
    return float(np.exp(np.log(made.std / real.std).mean()))
