"""One of several processes that load a transformer together; run by test_stream.py.

Usage: two_processes.py PORT COUNT NUMBER FOLDER DAMAGED
"""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from vpae_jax import sharding
from vpae_jax.config import MeshConfig
from vpae_jax.types import UserError
from vpae_jax.weights import stream
from vpae_jax.weights.find import find_model
from vpae_jax.weights.loading import read_part
from vpae_jax.weights.parts import flat
from vpae_jax.weights.writing import open_values


def main(port: str, count: str, number: str, folder: str, damaged: str) -> None:
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", int(count), int(number))
    assert jax.device_count() == 4 * int(count) and jax.process_count() == int(count)
    model = find_model(Path(folder))
    with open_values(model, "transformer") as found:
        expected = {}
        for path, (first, *_) in found.shapes().items():
            layers = first if path.startswith("blocks/") else 1
            values = [found.read(path, layer) for layer in range(layers)]
            expected[path] = np.stack(values) if path.startswith("blocks/") else values[0]
    mesh = sharding.make_mesh(MeshConfig(fsdp=1, tensor=8))

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, next(spec for rule, spec in sharding.TRANSFORMER_RULES if re.search(rule, path)))

    stream.CHUNK_BYTES = 256  # some rows of these small tensors
    with model.part("transformer").open() as tensors:
        loaded = stream.load(tensors, jnp.float32, place, "transformer")
        print(f"read {tensors.bytes_read}", flush=True)
    assert loaded.keys() == expected.keys()
    for path, value in loaded.items():
        assert value.sharding.is_equivalent_to(place(path, value.shape), value.ndim), path
        for shard in value.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[path][shard.index])
    try:
        read_part(Path(damaged), "transformer", jnp.float32, place)
    except UserError as error:
        print(f"refused {error}", flush=True)
    for path, value in flat(read_part(model, "transformer")[1]).items():  # each on a device of its own
        np.testing.assert_array_equal(np.asarray(value), expected[path])
    print("equal", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
