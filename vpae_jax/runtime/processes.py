"""Coordination between the processes of a run: who writes, who waits for whom, and gathering arrays on the host.

Every process runs the same program on its share of the devices. All take part in each computation on the mesh; only the
first one prints, and writes everything except checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float

from vpae_jax.runtime import progress
from vpae_jax.types import UserError

T = TypeVar("T")
# Maximum seconds that processes wait while one works alone. If it dies, this is noticed much earlier.
PATIENCE = 6 * 3600
# Maximum size of an array that is gathered at once: a layer of a large matrix, not a stack of forty.
PIECE_BYTES = 256 * 2**20


def client() -> Any:
    """Returns the client of the coordination service, through which processes exchange messages and wait for each
    other; None for a single process.

    `jax.distributed` only allows starting and stopping the service, and the functions of `multihost_utils` run on the
    devices: they wait forever for a lost process, and cannot be used in a thread while training runs. So the client is
    taken from JAX's internals (`jax._src`); a test checks that the names used here exist.
    """
    return distributed.global_state.client


def is_first() -> bool:
    """Whether this is the first process, which prints and writes."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line in the first process only, above a progress bar if there is one."""
    if is_first():
        progress.say(text)


def wait_for_all(name: str, seconds: int = PATIENCE) -> None:
    """Waits until every process has called this.

    Args:
      name: name of the barrier; must be different for each call.
      seconds: how long to wait for the others.

    Raises:
      UserError: not all processes arrived in time.
    """
    if client() is None:
        return
    try:
        client().wait_at_barrier(f"vpae/{name}", seconds * 1000)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"not every process has reached {name!r} within {seconds} s ({reason}); see their logs"
        ) from error


def broadcast_from_0(name: str, value: Any) -> Any:
    """Broadcasts the first process's `value` to all processes; the values of the others are ignored.

    Args:
      name: must be different for each call.
      value: plain JSON.
    """
    service, key = client(), f"vpae/said/{name}"
    if service is None:
        return value
    if is_first():
        service.key_value_set(key, json.dumps(value))
        return value
    return json.loads(service.blocking_key_value_get(key, PATIENCE * 1000))


def first_decides(name: str, value: Any, decide: Callable[[list[Any]], Any]) -> Any:
    """Gathers a value from each process, lets the first process combine them, and broadcasts the result. All processes
    must call this.

    Args:
      name: must be different for each call.
      value: plain JSON.
      decide: called in the first process with the values in the order of the processes; returns plain JSON.
    """
    service, key = client(), f"vpae/given/{name}"
    if service is None:
        return decide([value])
    service.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    result = None
    if is_first():
        keys = [f"{key}/{index}" for index in range(jax.process_count())]
        result = decide([json.loads(service.blocking_key_value_get(one, PATIENCE * 1000)) for one in keys])
        service.key_value_delete(f"{key}/")  # all values, which the service would otherwise keep to the end
    return broadcast_from_0(name, result)


def first_alone(name: str, action: Callable[[], T]) -> T:
    """Calls `action` in the first process, and afterwards in the others, which then find its files on disk.

    Raises:
      UserError: as `wait_for_all`, or as raised by `action`.
    """
    if not is_first():
        wait_for_all(name)
    result = action()
    if is_first():
        wait_for_all(name)
    return result


def of_all(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "process n"]:
    """Gathers the values of each process in all processes, which must all call this."""
    if jax.process_count() == 1:
        return values[None]
    return np.asarray(multihost_utils.process_allgather(values))


def to_host(tree: Any) -> Any:
    """Gathers whole arrays as numpy arrays in the first process; the others must call this too, and get None for each.

    Arrays that lie only on this process's devices are returned unchanged. Shards are gathered one layer at a time.
    """
    return jax.tree.map(_gather, tree)


def everywhere(value: jax.Array) -> jax.Array:
    """Replicates an array on every device, and so in every process; a collective operation unless it already is."""
    if value.is_fully_replicated or not isinstance(value.sharding, NamedSharding):
        return value
    return jax.jit(lambda x: x, out_shardings=NamedSharding(value.sharding.mesh, PartitionSpec()))(value)


def _gather(value: jax.Array | np.ndarray) -> Any:
    if not isinstance(value, jax.Array) or value.is_fully_addressable:
        return value
    assert isinstance(value.sharding, NamedSharding)  # an array on several processes lies on a mesh
    if value.is_fully_replicated:
        return np.asarray(value) if is_first() else None
    if value.ndim < 2 or value.nbytes <= PIECE_BYTES:
        whole = everywhere(value)
        return np.asarray(whole) if is_first() else None
    place = NamedSharding(value.sharding.mesh, PartitionSpec())
    take = jax.jit(lambda x, i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), out_shardings=place)
    result = np.empty(value.shape, value.dtype) if is_first() else None
    for i in range(value.shape[0]):
        layer = take(value, np.int32(i))
        if result is not None:
            result[i] = layer
        layer.block_until_ready()  # otherwise all layers would be in memory at once
    return result
