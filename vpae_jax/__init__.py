"""Distils Wan 2.1 video models into one-step generators, in JAX.

`load_pipeline` is imported on first use, because it imports every part of the package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vpae_jax.inference.loading import load_pipeline as load_pipeline


def __getattr__(name: str) -> Any:
    if name == "load_pipeline":
        from vpae_jax.inference.loading import load_pipeline

        return load_pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
