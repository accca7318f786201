"""What a rematerialised block saves of its attention."""

from __future__ import annotations

from typing import Any

import jax

# Checkpoint name of what the backward passes need in addition to q, k and v: the result and the log-sum-exp.
RESIDUALS = "attention"

_named = jax.checkpoint_policies.save_only_these_names(RESIDUALS)


def save_attention(primitive: Any, *avals: Any, **params: Any) -> Any:
    """A policy for `jax.checkpoint` with which no attention runs a second time in the backward pass.

    It saves arrays named `RESIDUALS`, and the outputs of cuDNN's attention: naming its result would not save the
    log-sum-exp, which `jax.nn` does not return, so the kernel would run again.
    """
    return str(primitive).startswith("dot_product_attention_fwd") or _named(primitive, *avals, **params)
