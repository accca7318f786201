"""Random numbers that belong to a clip: the same however the batch is split, and on any mesh.

A loss is given one key for each clip, and draws everything for a clip from that clip's key. So a batch that is
processed in parts, or by several hosts, sees exactly the numbers that it would see in one piece.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from vpae_jax.types import PRNGKey, UserError

SEEDS = 2**32  # JAX drops bits of larger seeds, so that two seeds would give the same numbers


def clip_keys(key: PRNGKey, clips: int) -> Key[Array, "b"]:
    """One independent key for each clip: `key` folded with the clip's index. Per-clip keys are returned unchanged."""
    if key.ndim:
        if len(key) != clips:
            raise ValueError(f"{len(key)} keys for {clips} clips")
        return key
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(clips))


def split(key: PRNGKey, count: int) -> PRNGKey:
    """`count` independent keys, on the leading axis; per-clip keys give per-clip keys."""
    if not key.ndim:
        return jax.random.split(key, count)
    return jax.vmap(lambda own: jax.random.split(own, count), out_axes=1)(key)


def numbered(key: PRNGKey, numbers: UInt32[Array, "n"]) -> PRNGKey:
    """One key per number, on the leading axis, each independent of the other numbers; per-clip keys give per-clip
    keys."""
    folded = jax.random.fold_in
    for _ in range(key.ndim):
        folded = jax.vmap(folded, (0, None))
    return jax.vmap(folded, (None, 0))(key, numbers)


def batch_key(key: PRNGKey) -> PRNGKey:
    """A key for draws that all clips of a batch share, independent of every clip's own key."""
    return jax.random.fold_in(key, jnp.uint32(2**32 - 1))  # no clip has this index


def following_key(key: PRNGKey, number: int, repeat: Int[Array, ""] | int) -> PRNGKey:
    """The key of one repeat of a following update (`Update.then`), which runs on the batch of the leading update.

    It is independent of every clip's own key and of `batch_key`.

    Args:
      key: of the leading update.
      number: of the following update.
      repeat: of that update.
    """
    return jax.random.fold_in(jax.random.fold_in(key, jnp.uint32(2**32 - 2 - number)), repeat)


def normal(key: PRNGKey, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Float[Array, "b *shape"]:
    """Standard normal numbers; `shape[0]` is the number of clips."""
    keys = clip_keys(key, shape[0])
    return jax.vmap(lambda own: jax.random.normal(own, tuple(shape[1:]), dtype))(keys)


def uniform(key: PRNGKey, clips: int) -> Float[Array, "b"]:
    """A number in [0, 1) for each clip, float32."""
    return jax.vmap(lambda own: jax.random.uniform(own, (), jnp.float32))(clip_keys(key, clips))


def bernoulli(key: PRNGKey, probability: float, clips: int) -> Bool[Array, "b"]:
    """True with this probability, for each clip."""
    return uniform(key, clips) < probability


def check_seed(seed: int, name: str = "seed") -> None:
    """Raises `UserError` unless the seed is in [0, 2^32), where no two seeds give the same numbers."""
    if not 0 <= seed < SEEDS:
        raise UserError(f"{name} is {seed}, expected a number from 0 to {SEEDS - 1}")


def keys_of_seed(seed: int) -> tuple[PRNGKey, PRNGKey]:
    """The keys of a clip's seed: of its initial noise, and of further draws by the solver.

    Raises:
      UserError: the seed is negative, or 2^32 or more.
    """
    check_seed(seed)
    noise, key = jax.random.split(jax.random.key(seed))
    return noise, key


def noise_of_seed(seed: int, shape: tuple[int, ...]) -> tuple[Float[Array, "..."], PRNGKey]:
    """The initial noise of a clip of this seed, and the key of further draws by the solver. Raises as
    `keys_of_seed`."""
    noise, key = keys_of_seed(seed)
    return jax.random.normal(noise, shape), key


def noise_of_frames(key: PRNGKey, shape: tuple[int, int, int, int, int], start: int) -> Float[Array, "b f h w c"]:
    """Some latent frames of `jax.random.normal(key, ...)` of one clip, using memory for these frames alone.

    This works for a clip of any length, because JAX computes the i-th number of a key from a hash of the key and i.

    Args:
      key: of the clip's noise (`keys_of_seed`).
      shape: of these frames; of one clip.
      start: index of the first of these frames.
    """
    # i has 32 bits: enough for any clip that is drawn whole, but not for an endless one.
    part, first = divmod(start * math.prod(shape[2:]), 2**31)
    return _numbers(jax.random.fold_in(key, part) if part else key, jnp.uint32(first), shape)


@partial(jax.jit, static_argnums=2)
def _numbers(key: PRNGKey, first: UInt32[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """The numbers from index `first` on of those that `jax.random.normal` draws from a key."""
    hashes = jax.random.key_data(numbered(key, first + jnp.arange(math.prod(shape), dtype=jnp.uint32)))
    bits = (hashes[:, 0] ^ hashes[:, 1]).reshape(shape)
    ones = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.uint32)  # the exponent of numbers from 1 to 2
    unit = jax.lax.bitcast_convert_type((bits >> 9) | ones, jnp.float32) - 1
    low = jnp.nextafter(jnp.float32(-1), jnp.float32(0))
    return jnp.float32(math.sqrt(2)) * jax.lax.erf_inv(jnp.maximum(low, unit * (1 - low) + low))


def noise_of_seeds(seeds: UInt32[Array, "b"], shape: Sequence[int]) -> Float[Array, "b *shape"]:
    """The noise of `noise_of_seed` for each clip of latents of shape `[b, ...]`; can be jitted."""

    def own(seed: UInt32[Array, ""]) -> Float[Array, "..."]:
        return jax.random.normal(jax.random.split(jax.random.key(seed))[0], tuple(shape[1:]))

    return jax.vmap(own)(seeds)
