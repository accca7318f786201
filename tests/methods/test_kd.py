"""Regression on a teacher's clips of known noise."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import BATCH, KEY, B, context, evaluate, make_batch, record, touched

from vpae_jax.flow.draws import noise_of_seed
from vpae_jax.flow.sampler import Sampler
from vpae_jax.methods.base import Adapters, Average, Role, Student
from vpae_jax.methods.kd import KnowledgeDistillation

METHOD = KnowledgeDistillation()
SEEDS = jnp.array([3, 2**31 + 5, 2**32 - 1], jnp.uint32)
PAIRS = replace(BATCH, seed=SEEDS)


def test_declaration():
    assert METHOD.roles == {"generator": Role("pretrained", trains=True, averages={"ema": Average(0.995)})}
    assert METHOD.student == Student("generator", Sampler("euler", (1.0, 0.0), 1.0), average="ema")
    low_rank = KnowledgeDistillation(generator="lora", generator_rank=4, generator_scale=1.0).roles
    assert low_rank["generator"].adapters == Adapters("teacher", 4, 4.0) and low_rank["teacher"] == Role("pretrained")
    assert METHOD.known_noise


def test_every_clip_is_made_of_its_own_noise():
    """That which `noise_of_seed`, and so the teacher, draws of its seed."""
    clips = replace(make_batch((B, 3, 4, 4, 4)), seed=SEEDS)
    found = record(METHOD, METHOD.loss, batch=clips)
    assert found.order == [("generator", "velocity", "own")]
    (made,) = found.calls
    np.testing.assert_array_equal(made.t, 1)
    for row, seed in enumerate(np.asarray(SEEDS)):
        np.testing.assert_array_equal(made.x[row], noise_of_seed(int(seed), (1, 3, 4, 4, 4))[0][0])
    np.testing.assert_allclose(found.values, ((made.x0 - clips.latents) ** 2).mean((1, 2, 3, 4)), rtol=1e-5)


def test_pictures_may_be_withheld():
    for dropout, given in ((0.0, True), (1.0, False)):
        method = replace(METHOD, image_dropout=dropout)
        assert record(method, method.loss, batch=PAIRS).calls[0].picture == (given,) * B


def test_the_generator_learns_the_map_from_noise_to_clip():
    """Facts 10 and 11: at a teacher's own clips, m + S eps, the loss is 0 and has no gradient; elsewhere it is the
    squared distance. One step of the teacher, whose clips are m, would leave S^2."""
    m, s = 1.3, 0.7
    noise = jnp.concatenate([noise_of_seed(int(seed), (1, *BATCH.latents.shape[1:]))[0] for seed in np.asarray(SEEDS)])
    pairs = replace(PAIRS, latents=m + s * noise)

    def loss(offset, gain):
        nets = {"generator": lambda x, t, condition: x - (offset + gain * x)}
        return METHOD.loss(nets, pairs, context())[0].mean()

    value, grad = jax.value_and_grad(loss, argnums=(0, 1))(m, s)
    np.testing.assert_allclose([value, *grad], 0, atol=1e-5)
    value, grad = jax.value_and_grad(loss)(m + 0.5, s)
    assert (float(value), float(grad)) == (pytest.approx(0.25, rel=1e-4), pytest.approx(1.0, rel=1e-4))
    assert float(loss(m, 0.0)) == pytest.approx(float(s**2 * (noise**2).mean()), rel=1e-4)


def test_the_generator_alone_is_trained():
    values, metrics, grads = evaluate(METHOD, METHOD.loss, batch=PAIRS)
    assert values.shape == (B,) and touched(grads) == {"generator"}
    assert set(metrics) == {"x0_mean_drift", "x0_std_ratio"}


def test_a_batch_without_seeds_is_refused():
    with pytest.raises(ValueError, match="the batch needs their seeds"):
        METHOD.loss({}, BATCH, context(key=KEY))
