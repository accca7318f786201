"""Seeds: each its own numbers, or refused."""

import numpy as np
import pytest

from vpae_jax.flow.draws import SEEDS, noise_of_seed
from vpae_jax.types import UserError


def test_every_seed_has_noise_of_its_own():
    seeds = [0, 1, 2**31 - 1, 2**31, 2**31 + 1, SEEDS - 1]
    drawn = [np.asarray(noise_of_seed(seed, (8,))[0]) for seed in seeds]
    assert len({noise.tobytes() for noise in drawn}) == len(seeds)


@pytest.mark.parametrize("seed", [-1, SEEDS, SEEDS + 1, 2**63, 2**64, -(2**63)])
def test_a_seed_that_would_repeat_another_is_refused(seed):
    with pytest.raises(UserError, match=f"^seed is {seed}, expected a number from 0 to 4294967295$"):
        noise_of_seed(seed, (8,))
