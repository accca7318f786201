"""Loads a model directory's networks onto devices: the transformer, or two experts for different timesteps; and the
autoencoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from vpae_jax import sharding
from vpae_jax.models.parallel import MeshLayout
from vpae_jax.models.wan_dit import WanTransformer
from vpae_jax.models.wan_vae import WanVAE
from vpae_jax.models.wan_vae_rows import Rows
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.loading import left_part, load_part
from vpae_jax.weights.parts import LOW
from vpae_jax.weights.stream import Merge, Placement

Experts = tuple[WanTransformer, WanTransformer | None]


def load(model: ModelDirectory, dtype: DTypeLike, mesh: Mesh | None = None, merge: Merge | None = None) -> Experts:
    """The transformer, and the expert for timesteps below the boundary; the latter is None for a model without one.

    Args:
      model: the model directory.
      dtype: of weights and computation.
      mesh: over which weights and tokens are sharded; None for the default device.
      merge: what to add to the first one's weights.

    Raises:
      UserError: files that cannot be read, or do not hold these weights.
    """
    where = place(mesh, sharding.TRANSFORMER_RULES)
    first = load_part(model, "transformer", dtype, where, merge)
    return _laid_out(first, load_part(model, LOW, dtype, where) if LOW in model.parts else None, mesh)


def shapes(model: ModelDirectory, dtype: DTypeLike, mesh: Mesh | None = None) -> Experts:
    """The same networks with shapes in place of weights."""
    second = left_part(model, LOW, dtype) if LOW in model.parts else None
    return _laid_out(left_part(model, "transformer", dtype), second, mesh)


def load_vae(model: ModelDirectory, dtype: DTypeLike, mesh: Mesh | None = None) -> WanVAE:
    """The autoencoder, replicated over a mesh, across which it splits the rows of clips. Raises as `load`."""
    vae: WanVAE = load_part(model, "vae", dtype, place(mesh, sharding.REPLICATED))
    vae.rows = None if mesh is None else Rows(mesh)
    return vae


def place(mesh: Mesh | None, rules: sharding.Rules) -> Placement | None:
    """The placement of each parameter by sharding rules; None for the default device."""
    if mesh is None:
        return None

    def where(path: str, shape: tuple[int, ...]) -> Sharding:
        leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
        return sharding.param_shardings({path: leaf}, rules, mesh)[path]

    return where


def _laid_out(first: WanTransformer, second: WanTransformer | None, mesh: Mesh | None) -> Experts:
    for expert in (first, second):
        if expert is not None:
            expert.layout = MeshLayout(mesh, expert.config.num_attention_heads)
    return first, second
