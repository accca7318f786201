"""What a rematerialised block keeps of its attentions."""

from __future__ import annotations

from typing import Any

import jax

# The name that kernels give to what their backward passes need besides q, k and v: the result and the log-sum-exp.
RESIDUALS = "attention"

_named = jax.checkpoint_policies.save_only_these_names(RESIDUALS)


def save_attention(primitive: Any, *avals: Any, **params: Any) -> Any:
    """A policy for `jax.checkpoint` with which no attention runs a second time in the backward pass.

    It saves what is named `RESIDUALS`, and what cuDNN's attention returns: a name for its result would not keep the
    log-sum-exp, which `jax.nn` does not hand out, and the kernel would run again for that.
    """
    return str(primitive).startswith("dot_product_attention_fwd") or _named(primitive, *avals, **params)
