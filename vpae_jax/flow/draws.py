"""Random numbers that belong to a clip: the same whatever the batch is split into, and on any mesh.

A loss is given one key for each clip, and everything that it draws for a clip comes from that clip's key. So a batch
that is processed in parts, or by several hosts, sees exactly the numbers that it would see in one piece.
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

SEEDS = 2**32  # of a larger number JAX drops bits, so that it would repeat another


def clip_keys(key: PRNGKey, clips: int) -> Key[Array, "b"]:
    """One independent key for each clip: `key` folded with the clip's number. Keys that are the clips' own stay."""
    if key.ndim:
        if len(key) != clips:
            raise ValueError(f"{len(key)} keys for {clips} clips")
        return key
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(clips))


def split(key: PRNGKey, count: int) -> PRNGKey:
    """Independent keys of a key, on the leading axis; keys of clips give keys of clips."""
    if not key.ndim:
        return jax.random.split(key, count)
    return jax.vmap(lambda own: jax.random.split(own, count), out_axes=1)(key)


def numbered(key: PRNGKey, numbers: UInt32[Array, "n"]) -> PRNGKey:
    """A key of a key for each number, however many others there are, on the leading axis; keys of clips give keys of
    clips."""
    folded = jax.random.fold_in
    for _ in range(key.ndim):
        folded = jax.vmap(folded, (0, None))
    return jax.vmap(folded, (None, 0))(key, numbers)


def batch_key(key: PRNGKey) -> PRNGKey:
    """A key for what all clips of a batch share, independent of every clip's own key."""
    return jax.random.fold_in(key, jnp.uint32(2**32 - 1))  # no clip has this number


def following_key(key: PRNGKey, number: int, repeat: Int[Array, ""] | int) -> PRNGKey:
    """A key for a repeat of the update of this number that follows another one, whose key this is, on the same batch;
    independent of every clip's own key and of `batch_key`."""
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
    """Raises `UserError` for a seed whose numbers would be another one's."""
    if not 0 <= seed < SEEDS:
        raise UserError(f"{name} is {seed}, expected a number from 0 to {SEEDS - 1}")


def keys_of_seed(seed: int) -> tuple[PRNGKey, PRNGKey]:
    """The key of the noise that a clip of this seed is sampled from, and that of solvers that draw more.

    Raises:
      UserError: a seed that is negative or 2^32 or more.
    """
    check_seed(seed)
    noise, key = jax.random.split(jax.random.key(seed))
    return noise, key


def noise_of_seed(seed: int, shape: tuple[int, ...]) -> tuple[Float[Array, "..."], PRNGKey]:
    """The noise that a clip of this seed is sampled from, and the key of solvers that draw more. Raises as
    `keys_of_seed`."""
    noise, key = keys_of_seed(seed)
    return jax.random.normal(noise, shape), key


def noise_of_frames(key: PRNGKey, shape: tuple[int, int, int, int, int], start: int) -> Float[Array, "b f h w c"]:
    """Latent frames from `start` on of `jax.random.normal(key, ...)` of one clip, however long that is, in memory of
    their own size.

    JAX makes the i-th number that it draws of a key from a hash of the key and of i alone.

    Args:
      key: of the clip's noise (`keys_of_seed`).
      shape: of these frames; of one clip.
      start: number of the first one.
    """
    # i is a number of 32 bits. No clip that is drawn whole has so many, but one that never ends.
    part, first = divmod(start * math.prod(shape[2:]), 2**31)
    return _numbers(jax.random.fold_in(key, part) if part else key, jnp.uint32(first), shape)


@partial(jax.jit, static_argnums=2)
def _numbers(key: PRNGKey, first: UInt32[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Numbers `first` and later of those that `jax.random.normal` draws of a key."""
    hashes = jax.random.key_data(numbered(key, first + jnp.arange(math.prod(shape), dtype=jnp.uint32)))
    bits = (hashes[:, 0] ^ hashes[:, 1]).reshape(shape)
    ones = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.uint32)  # an exponent: of numbers from 1 to 2
    unit = jax.lax.bitcast_convert_type((bits >> 9) | ones, jnp.float32) - 1
    low = jnp.nextafter(jnp.float32(-1), jnp.float32(0))
    return jnp.float32(math.sqrt(2)) * jax.lax.erf_inv(jnp.maximum(low, unit * (1 - low) + low))


def noise_of_seeds(seeds: UInt32[Array, "b"], shape: Sequence[int]) -> Float[Array, "b *shape"]:
    """The noise of `noise_of_seed` for each clip of latents of this shape, `[b, ...]`, in a program."""

    def own(seed: UInt32[Array, ""]) -> Float[Array, "..."]:
        return jax.random.normal(jax.random.split(jax.random.key(seed))[0], tuple(shape[1:]))

    return jax.vmap(own)(seeds)
