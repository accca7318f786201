"""The processes of a run: who writes, who waits for whom, and whole arrays on the host.

Every process runs the same program on its share of the devices. All of them take part in each computation on the mesh;
the first one alone prints and writes what is not a checkpoint.
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
# How long one process works alone at most while the others wait. One that dies is noticed long before.
PATIENCE = 6 * 3600
# What is gathered at once: a layer of a large matrix, not a stack of forty.
PIECE_BYTES = 256 * 2**20


def client() -> Any:
    """The coordination service, by which processes tell each other things and wait; None for one process.

    `jax.distributed` lets it begin and end, no more, and what `multihost_utils` offers runs on the devices: it waits
    for ever for a process that is gone, and cannot be used from a thread beside the training. So the client is taken
    from where JAX keeps it (`jax._src`); a test asks for the names that are used of it.
    """
    return distributed.global_state.client


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line once, not once a process, and above a progress bar if there is one."""
    if is_first():
        progress.say(text)


def wait_for_all(name: str, seconds: int = PATIENCE) -> None:
    """Returns when every process has come here.

    Args:
      name: of the place; another one each time.
      seconds: how long to wait for the others.

    Raises:
      UserError: they did not come.
    """
    if client() is None:
        return
    try:
        client().wait_at_barrier(f"vpae/{name}", seconds * 1000)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"not every process has come to {name!r} within {seconds} s ({reason}); see their logs"
        ) from error


def as_first_says(name: str, value: Any) -> Any:
    """What the first process gives as `value`, which is plain JSON; another `name` each time. Others' is not used."""
    service, key = client(), f"vpae/said/{name}"
    if service is None:
        return value
    if is_first():
        service.key_value_set(key, json.dumps(value))
        return value
    return json.loads(service.blocking_key_value_get(key, PATIENCE * 1000))


def first_decides(name: str, value: Any, decide: Callable[[list[Any]], Any]) -> Any:
    """What the first process makes of what each gives, told to all of them, which all call this.

    Args:
      name: another one each time.
      value: plain JSON.
      decide: called by the first process with the values in the processes' order; what it returns is plain JSON, too.
    """
    service, key = client(), f"vpae/given/{name}"
    if service is None:
        return decide([value])
    service.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    result = None
    if is_first():
        keys = [f"{key}/{index}" for index in range(jax.process_count())]
        result = decide([json.loads(service.blocking_key_value_get(one, PATIENCE * 1000)) for one in keys])
        service.key_value_delete(f"{key}/")  # all of them: the service would keep them to the end
    return as_first_says(name, result)


def first_alone(name: str, action: Callable[[], T]) -> T:
    """`action()`, by the first process before the others, which then find what it has left on disk.

    Raises:
      UserError: as `wait_for_all`, and what `action` raises.
    """
    if not is_first():
        wait_for_all(name)
    result = action()
    if is_first():
        wait_for_all(name)
    return result


def of_all(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "process n"]:
    """What each process gives, to all of them, which all call this."""
    if jax.process_count() == 1:
        return values[None]
    return np.asarray(multihost_utils.process_allgather(values))


def to_host(tree: Any) -> Any:
    """Arrays as numpy arrays, whole, on the first process; on the others, which must call this too, None for each.

    What lies on this process's own devices alone is left there. Shards are gathered a layer at a time.
    """
    return jax.tree.map(_gather, tree)


def everywhere(value: jax.Array) -> jax.Array:
    """An array of which every device, and so every process, has all; collective where it is not."""
    if value.is_fully_replicated or not isinstance(value.sharding, NamedSharding):
        return value
    return jax.jit(lambda x: x, out_shardings=NamedSharding(value.sharding.mesh, PartitionSpec()))(value)


def _gather(value: jax.Array | np.ndarray) -> Any:
    if not isinstance(value, jax.Array) or value.is_fully_addressable:
        return value
    assert isinstance(value.sharding, NamedSharding)  # what lies on several processes lies on a mesh
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
        layer.block_until_ready()  # or the queue would hold them all
    return result
