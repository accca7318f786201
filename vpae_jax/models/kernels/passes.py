"""A differentiable attention, built from its two passes.

A kernel's forward pass gives the result and the log-sum-exp; its backward pass needs both. They are separate functions,
because a ring (`models.parallel`) calls them once for each device's keys, the backward pass with the results over all
keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from vpae_jax.models.kernels.reference import Keys, LogSumExp, Queries
from vpae_jax.models.kernels.remat import RESIDUALS

# Queries and keys may have channels that values do not have.
Wide = Float[Array, "b n heads d"]
WideKeys = Float[Array, "b m heads d"]


@dataclass(frozen=True)
class Passes:
    """The two passes of an attention.

    Attributes:
      forward: maps queries, keys, values and mask to the result and the log-sum-exp. If no key is visible, the
        exponential of the log-sum-exp is zero, and the result is finite.
      backward: maps the same, and result, log-sum-exp and gradient of the result, all three over all keys, to the
        gradients with respect to the queries, to be summed over parts of the keys, and to these keys and values.
    """

    forward: Callable[[Wide, WideKeys, Keys, Any], tuple[Queries, LogSumExp]]
    backward: Callable[[Wide, WideKeys, Keys, Any, Queries, LogSumExp, Queries], tuple[Wide, WideKeys, Keys]]

    def attend(self, q: Wide, k: WideKeys, v: Keys, hidden: Any = None) -> Queries:
        """The result, differentiable in q, k and v; the mask `hidden` is a constant."""
        return _attend(self, q, k, v, hidden)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(passes: Passes, q: Wide, k: WideKeys, v: Keys, hidden: Any) -> Queries:
    return passes.forward(q, k, v, hidden)[0]


def _forward(passes: Passes, q: Wide, k: WideKeys, v: Keys, hidden: Any) -> tuple[Queries, tuple[Any, ...]]:
    out, lse = (checkpoint_name(x, RESIDUALS) for x in passes.forward(q, k, v, hidden))
    return out, (q, k, v, hidden, out, lse)


def _backward(passes: Passes, residuals: tuple[Any, ...], d_out: Queries) -> tuple[Any, ...]:
    q, k, v, hidden, out, lse = residuals
    return *passes.backward(q, k, v, hidden, out, lse, d_out), None


_attend.defvjp(_forward, _backward)
