"""Seeds and keys: each its own numbers, or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpae_jax.flow.draws import (
    SEEDS,
    clip_keys,
    keys_of_seed,
    noise_of_frames,
    noise_of_seed,
    noise_of_seeds,
    numbered,
    split,
)
from vpae_jax.types import UserError


def test_every_seed_has_noise_of_its_own():
    seeds = [0, 1, 2**31 - 1, 2**31, 2**31 + 1, SEEDS - 1]
    drawn = [np.asarray(noise_of_seed(seed, (8,))[0]) for seed in seeds]
    assert len({noise.tobytes() for noise in drawn}) == len(seeds)


@pytest.mark.parametrize("seed", [-1, SEEDS, SEEDS + 1, 2**63, 2**64, -(2**63)])
def test_a_seed_that_would_repeat_another_is_refused(seed):
    with pytest.raises(UserError, match=f"^seed is {seed}, expected a number from 0 to 4294967295$"):
        noise_of_seed(seed, (8,))


def test_seeds_of_a_batch_have_the_same_noise():
    """In a program, for which they are numbers like any other."""
    seeds, shape = [7, 2**31 - 1, 2**31, SEEDS - 1], (2, 3, 5)
    found = jax.jit(lambda seeds: noise_of_seeds(seeds, (len(seeds), *shape)))(jnp.array(seeds, jnp.uint32))
    for row, seed in enumerate(seeds):
        np.testing.assert_array_equal(found[row], noise_of_seed(seed, (1, *shape))[0][0])


def test_split_keys_are_independent_and_stay_with_their_clips():
    one = jax.random.split(jax.random.key(0), 3)
    np.testing.assert_array_equal(jax.random.key_data(split(jax.random.key(0), 3)), jax.random.key_data(one))
    keys = clip_keys(jax.random.key(1), 4)
    parts = split(keys, 2)
    assert parts.shape == (2, 4)
    assert len({np.asarray(jax.random.key_data(key)).tobytes() for key in [*parts[0], *parts[1], *keys]}) == 12
    alone = split(keys[2:3], 2)
    np.testing.assert_array_equal(jax.random.key_data(parts[:, 2:3]), jax.random.key_data(alone))


@pytest.mark.parametrize("seed", [0, 7, SEEDS - 1])
def test_frames_have_the_noise_of_the_whole_clip(seed):
    """Bit for bit, of clips of any length."""
    key, _ = keys_of_seed(seed)
    for length in (1, 2, 9):
        whole, _ = noise_of_seed(seed, (1, length, 3, 5, 16))
        for start, stop in {(0, 1), (0, length), (length - 1, length), (length // 2, length)}:
            frames = noise_of_frames(key, (1, stop - start, 3, 5, 16), start)
            np.testing.assert_array_equal(frames, whole[:, start:stop])


def test_noise_without_end_does_not_repeat_itself():
    key, shape = keys_of_seed(0)[0], (1, 2, 1, 1, 2**10)
    numbers = [noise_of_frames(key, shape, start * 2**21).tobytes() for start in range(4)]  # 2^31 numbers apart
    assert len(set(numbers)) == 4
    far = noise_of_frames(key, (1, 1, 64, 64, 16), 2**40)
    assert abs(float(far.mean())) < 0.02 and abs(float(far.std()) - 1) < 0.02


def test_numbered_keys_do_not_depend_on_how_many_there_are():
    for key in (jax.random.key(0), clip_keys(jax.random.key(1), 4)):
        many = numbered(key, jnp.arange(5, dtype=jnp.uint32))
        assert many.shape == (5, *key.shape)
        alone = numbered(key, jnp.uint32([3]))
        np.testing.assert_array_equal(jax.random.key_data(many[3:4]), jax.random.key_data(alone))
        distinct = {np.asarray(x).tobytes() for x in jax.random.key_data(many).reshape(-1, 2)}
        assert len(distinct) == many.size
