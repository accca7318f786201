"""One mesh, rules as data.

The mesh has four axes: `data` (replicated weights), `fsdp` (sharded weights), `context` (sharded sequence; not
implemented yet, so its size is 1) and `tensor` (sharded heads and hidden units). Where each parameter lives is decided
by a list of (regex, PartitionSpec) rules on its path; the first match wins, and a parameter that no rule matches is an
error, never a silent replica.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vpae_jax.config import MeshConfig
from vpae_jax.types import Batch, UserError

AXES = ("data", "fsdp", "context", "tensor")
Rules = Sequence[tuple[str, PartitionSpec]]
P = PartitionSpec

# Linear layers: of a block, from its features and back to them; of the conditions, before the blocks.
_IN = r"^blocks/(attn[12]/(to_[qkv]|add_[kv]_proj)|ffn/proj_in)"
_OUT = r"^blocks/(attn[12]/to_out|ffn/proj_out)"
_EMBEDDER = r"^condition_embedder/((text|time)_embedder/linear_[12]|time_proj|image_embedder/ff/proj_(in|out))"

# Paths as `param_path` spells them. Blocks are stacked: their leading axis is the layer.
TRANSFORMER_RULES: Rules = (
    (rf"{_IN}/kernel$", P(None, "fsdp", "tensor")),
    (rf"{_OUT}/kernel$", P(None, "tensor", "fsdp")),
    (rf"({_IN}|{_OUT})/lora_a$", P(None, "fsdp", None)),
    (rf"({_IN}|{_OUT})/lora_b$", P(None, None, "fsdp")),
    (rf"({_IN}|{_OUT})/bias$", P()),
    (r"^blocks/attn[12]/norm_(q|k|added_k)/scale$", P()),
    (r"^blocks/norm2/(scale|bias)$", P()),
    (rf"{_EMBEDDER}/(kernel|lora_a)$", P("fsdp", None)),
    (rf"{_EMBEDDER}/lora_b$", P(None, "fsdp")),
    (rf"{_EMBEDDER}/bias$", P()),
    (r"^condition_embedder/image_embedder/(norm[12]/(scale|bias)|pos_embed)$", P()),
    (r"^(patch_embedding|proj_out)/(kernel|bias|lora_[ab])$", P()),
    (r"^(blocks/)?scale_shift_table$", P()),
)
REPLICATED: Rules = ((r"", P()),)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Lays devices out along the four axes.

    Args:
      config: sizes; at most one may be -1.
      devices: all devices of all processes by default.

    Raises:
      UserError: when the sizes do not multiply to the number of devices, or `context` is not 1.
    """
    if config.context != 1:
        raise UserError(f"config.mesh.context is {config.context}: sequence sharding is not implemented yet; use 1")
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in AXES]
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) > 1 or known <= 0 or len(devices) % known:
        raise UserError(f"config.mesh: {dict(zip(AXES, sizes, strict=True))} does not fit {len(devices)} devices")
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    if int(np.prod(sizes)) != len(devices):
        raise UserError(f"config.mesh: {dict(zip(AXES, sizes, strict=True))} does not fit {len(devices)} devices")
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def param_path(path: tuple[Any, ...]) -> str:
    """A pytree key path as `a/b/0/kernel`, without NNX's trailing value attribute."""
    names = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]
    return "/".join(n for n in names if n != "value")


def param_shardings(params: Any, rules: Rules, mesh: Mesh) -> Any:
    """Shardings for a (possibly abstract) tree of parameters.

    Raises:
      UserError: for a parameter that no rule matches, or whose axis the mesh does not divide.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = param_path(path)
        spec = next((spec for regex, spec in rules if re.search(regex, name)), None)
        if spec is None:
            raise UserError(f"no sharding rule matches parameter {name} of shape {leaf.shape}")
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(f"parameter {name}: axis of size {size} is not divisible by {axis}={mesh.shape[axis]}")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, params)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch on the mesh: clips along `data` and `fsdp`; a `Batch`'s negative prompt, one for all, everywhere."""
    clips, whole = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P())

    def put(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        shared = isinstance(batch, Batch) and param_path(path) in ("null_text", "null_mask")
        return jax.device_put(leaf, whole if shared else clips)

    return jax.tree_util.tree_map_with_path(put, batch)
