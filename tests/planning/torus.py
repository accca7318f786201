"""Meshes over TPU slices that are not there: prints, as JSON, how their axes lie in the torus.

Usage: torus.py TOPOLOGY:CONTEXT ...    such as v5p:4x4x4:8; "2*v5p:2x2x2:4" is two slices
"""

import json
import sys
from itertools import pairwise

import jax
import numpy as np
from jax.experimental import topologies

from vpae_jax.config import MeshConfig
from vpae_jax.planning import topology
from vpae_jax.sharding import AXES, make_mesh
from vpae_jax.types import UserError


def hops(one, other, shape) -> int:
    """Links between two chips; a side of four chips or more is a ring."""
    apart = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return sum(min(d, n - d) if n >= 4 else d for d, n in zip(apart, shape, strict=True))


def described(case: str):
    name, _, context = case.rpartition(":")
    count, _, name = name.rpartition("*")
    named = topology.parse(name)
    slices = {"num_slices": int(count)} if count else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **slices).devices
    return devices, (*named.shape, 1)[:3], int(context)


def looked_at(case: str) -> dict:
    devices, shape, context = described(case)
    try:
        grid = make_mesh(MeshConfig(context=context), devices).devices
    except UserError as error:
        return {"refused": str(error)}
    found = {}
    for axis in (AXES.index("fsdp"), AXES.index("context")):
        groups = np.moveaxis(grid, axis, -1).reshape(-1, grid.shape[axis]).tolist()
        steps = [hops(a.coords, b.coords, shape) for group in groups for a, b in pairwise(group)]
        one_slice = all(len({getattr(device, "slice_index", None) for device in group}) == 1 for group in groups)
        found[AXES[axis]] = {"longest": max(steps, default=0), "mean": float(np.mean(steps or 0)), "slice": one_slice}
    return found


if __name__ == "__main__":
    topology.prepare(topology.parse("v5p:2x2x1"))
    jax.devices()  # JAX finds its plugins when it is first asked for devices
    print(json.dumps({case: looked_at(case) for case in sys.argv[1:]}))
