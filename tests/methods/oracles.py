"""Networks whose answers are known in closed form: flows, and a judge that is linear."""

import jax.numpy as jnp

from vpae_jax.flow.schedule import expand
from vpae_jax.types import Features


def state(x, t, end, m=1.3, s=0.7):
    """Where the flow of N(m, s^2) takes x: its points m (1 - t) + sqrt((1 - t)^2 s^2 + t^2) z keep their z."""
    spread = lambda t: jnp.sqrt((1 - t) ** 2 * s**2 + t**2)  # noqa: E731
    return (1 - end) * m + spread(end) * (x - (1 - t) * m) / spread(t)


def gaussian(x, t, condition, m=1.3, s=0.7):
    """The velocity of data N(m, s^2)."""
    t = expand(t, x)
    gain = (x - (1 - t) * m) / ((1 - t) ** 2 * s**2 + t**2)
    return t * gain - (m + (1 - t) * s**2 * gain)


def constant(value):
    """A network of one velocity."""
    return lambda x, t, condition: jnp.full_like(x, value)


class Backbone:
    """A network of velocity 0 whose hidden states are its input times `weight`, and whose last layer reads `gain` times
    them."""

    def __init__(self, gain=1.0, weight=1.0):
        self.gain, self.weight = gain, weight

    def __call__(self, x, t, condition):
        return jnp.zeros_like(x)

    def features(self, x, t, condition, taps):
        tokens = (x * self.weight).reshape(len(x), -1, x.shape[-1])
        return Features((tokens,) * len(taps), condition.text, condition.text_mask, grid=x.shape[1:4])

    def velocity_and_features(self, x, t, condition, taps):
        return self(x, t, condition), self.features(x, t, condition, taps)

    def readings(self, features, x, t):
        return tuple(self.gain * tap.reshape(x.shape) for tap in features.taps)


class LinearHeads:
    """One logit: the mean over the last tap's hidden states, times a weight, plus a bias."""

    def __init__(self, weight, bias=0.0, taps=(1,)):
        self.weight, self.bias, self.taps = weight, bias, taps

    def __call__(self, features):
        return self.weight * features.taps[-1].mean((1, 2))[:, None] + self.bias
