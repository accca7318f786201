"""One mesh, rules as data.

The mesh has four axes: `data` (replicated weights), `fsdp` (sharded weights), `context` (sharded sequence) and
`tensor` (sharded heads and hidden units). Where each parameter lives is decided by a list of (regex, PartitionSpec)
rules on its path; the first match wins, and a parameter that no rule matches is an error, never a silent replica.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vpae_jax.config import MeshConfig
from vpae_jax.types import UserError

AXES = ("data", "fsdp", "context", "tensor")
Rules = Sequence[tuple[str, PartitionSpec]]
P = PartitionSpec

# Paths as `param_path` spells them. Blocks are stacked: their leading axis is the layer.
TRANSFORMER_RULES: Rules = (
    (r"lora_a$", P(None, "fsdp", None)),
    (r"lora_b$", P(None, None, "fsdp")),
    (r"blocks/attn[12]/(to_[qkv]|add_[kv]_proj)/kernel$", P(None, "fsdp", "tensor")),
    (r"blocks/attn[12]/to_out/kernel$", P(None, "tensor", "fsdp")),
    (r"blocks/ffn/\w+_in/kernel$", P(None, "fsdp", "tensor")),
    (r"blocks/ffn/\w+_out/kernel$", P(None, "tensor", "fsdp")),
    (r"blocks/", P()),
    (r"condition_embedder/(text|time|image)\w*/.*kernel$", P("fsdp", None)),
    (r"(patch_embedding|proj_out)/kernel$", P()),
    (r"", P()),
)
REPLICATED: Rules = ((r"", P()),)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Lays devices out along the four axes.

    Args:
      config: sizes; at most one may be -1.
      devices: all devices of all processes by default.

    Raises:
      UserError: when the sizes do not multiply to the number of devices.
    """
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


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Clips of a batch lie along `data` and `fsdp`."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())
