"""Statistics of latents, channel by channel: what drifts in a training before pixels show it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

# Of each clip and channel: the mean and the mean square.
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
    """Root mean square, over channels, of how far the means are apart, in standard deviations of the real one."""
    return float(np.sqrt((((made.mean - real.mean) / real.std) ** 2).mean()))


def spread(made: Channels, real: Channels) -> float:
    """Geometric mean, over channels, of the ratio of standard deviations; blur is below 1."""
    return float(np.exp(np.log(made.std / real.std).mean()))
