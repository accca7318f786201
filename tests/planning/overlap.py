"""A sharded block, compiled for a TPU slice that is not there: prints, as JSON, how many of its collectives are
synchronous and how many run beside other work.

Usage: overlap.py TOPOLOGY [--bare]    --bare compiles without the flags of `runtime.platforms`
"""

import json
import os
import re
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from vpae_jax.config import MeshConfig
from vpae_jax.planning import topology
from vpae_jax.sharding import make_mesh

WIDTH, TOKENS, LAYERS = 512, 512, 2
P = PartitionSpec


def compiled(devices) -> str:
    """Two layers of weights that are gathered, and of tokens that are exchanged for heads; forward and backward."""
    mesh = make_mesh(MeshConfig(context=2), devices)
    rows, split = P("fsdp", "context", None), P(None, ("fsdp", "context"), None)

    def exchange(x):
        heads = jnp.tanh(jax.lax.all_to_all(x, "context", 2, 1, tiled=True))
        return jax.lax.all_to_all(heads, "context", 1, 2, tiled=True)

    def layer(x, weights):
        up, down = (jax.lax.with_sharding_constraint(w.astype(x.dtype), NamedSharding(mesh, P())) for w in weights)
        seen = jax.shard_map(exchange, mesh=mesh, in_specs=rows, out_specs=rows)(x)
        x = x + seen + jax.nn.gelu(x @ up) @ down
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, rows)), None

    def loss(weights, x):
        return (jax.lax.scan(jax.checkpoint(layer), x, weights)[0].astype(jnp.float32) ** 2).mean()

    def step(weights, x):
        return jax.tree.map(lambda w, g: w - 1e-3 * g, weights, jax.grad(loss)(weights, x))

    def shape(dtype, spec, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    weights = [shape(jnp.float32, split, LAYERS, *size) for size in ((WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))]
    x = shape(jnp.bfloat16, rows, len(devices) // 2, TOKENS, WIDTH)
    with jax.set_mesh(mesh):
        return jax.jit(step, out_shardings=NamedSharding(mesh, split)).lower(tuple(weights), x).compile().as_text()


def counted(text: str, kind: str) -> dict[str, int]:
    """Asynchronous collectives have a -start, or are spread over several fusions, of which the first is called so."""
    fusions = dict(re.findall(r"%?([\w.\-]+) = [^\n]*? fusion\([^\n]*?calls=%?([\w.\-]+)", text))
    inside, found, sync = "", set(), 0
    for line in text.splitlines():
        if line and line[0] not in " }":
            inside = line.removeprefix("ENTRY ").lstrip("%").partition(" ")[0]
        elif f" {kind}(" in line:
            found.add(inside)
            sync += inside not in fusions.values()
    fused = sum(name.startswith("async-collective-start") and callee in found for name, callee in fusions.items())
    return {"synchronous": sync, "asynchronous": fused + text.count(f" {kind}-start(")}


if __name__ == "__main__":
    named = topology.parse(sys.argv[1])
    topology.prepare(named)
    if "--bare" in sys.argv:
        os.environ["LIBTPU_INIT_ARGS"] = ""
    text = compiled(topology.devices(named))
    print(json.dumps({kind: counted(text, kind) for kind in ("all-gather", "all-to-all")}))
