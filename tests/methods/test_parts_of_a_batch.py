"""A batch in parts gives the losses and gradients of the whole: what a clip draws is its own, what clips share is the
batch's."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import made, make_batch, nets_of, weights_of

from vpae_jax import sharding
from vpae_jax.flow.draws import batch_key, clip_keys
from vpae_jax.flow.times import TimeDistribution
from vpae_jax.methods import METHODS
from vpae_jax.methods.base import Context
from vpae_jax.types import Batch

CLIPS, KEY = 4, jax.random.key(3)
BATCH = replace(make_batch((CLIPS, 2, 2, 2, 4)), seed=jnp.arange(CLIPS, dtype=jnp.uint32))
# So that of every random choice of a batch, such as the last of four steps, several are met.
SEVERAL = 3
CASES = [
    pytest.param(cls, number, id=f"{name}, update {number}")
    for name, cls in METHODS.items()
    if cls.batch is Batch and not cls.whole_batch and "image_dropout" in cls.__dataclass_fields__
    for number in range(len(cls().updates))
]


def method_of(cls):
    """With times that suit clips of so few values, and pictures withheld at random."""
    fields = {name: TimeDistribution() for name in ("fake_t",) if name in cls.__dataclass_fields__}
    return made(cls, **fields, image_dropout=0.5)


@pytest.mark.parametrize(("cls", "number"), CASES)
def test_parts_are_the_whole(cls, number):
    method = method_of(cls)
    update, weights = method.updates[number], weights_of(method)

    @jax.jit
    def run(trained, batch, clips, shared):
        def loss(trained):
            nets = nets_of(method, weights | trained)
            values, _ = update.loss(nets, batch, Context(jnp.int32(7), clips, shared))
            return values.mean(), values

        return jax.grad(loss, has_aux=True)(trained)

    trained = {role: weights[role] for role in update.trains}
    for seed in range(SEVERAL):
        key = jax.random.fold_in(KEY, seed)
        clips, shared = clip_keys(key, CLIPS), batch_key(key)
        grads, values = run(trained, BATCH, clips, shared)
        parts = [run(trained, *sharding.part_of((BATCH, clips), part, CLIPS), shared) for part in range(CLIPS)]
        np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), values, rtol=1e-4, atol=1e-6)
        for role in trained:
            mean = sum(part[0][role] for part in parts) / CLIPS
            np.testing.assert_allclose(mean, grads[role], rtol=1e-3, atol=1e-5 * np.abs(grads[role]).max())
