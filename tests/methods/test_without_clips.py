"""Batches of prompts alone: which methods need real clips, and that the others never look at one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import B, C, assert_independent, context, made, make_batch, nets_of, record, weights_of

from vpae_jax import sharding
from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.draws import clip_keys
from vpae_jax.flow.times import TimeDistribution
from vpae_jax.methods import METHODS
from vpae_jax.methods.base import Context
from vpae_jax.methods.causal_init import CausalODE
from vpae_jax.methods.common import real_clips
from vpae_jax.methods.dmd2 import DMD2
from vpae_jax.methods.magic import Magic
from vpae_jax.methods.scores import DistributionMatching
from vpae_jax.methods.self_forcing import SelfForcing
from vpae_jax.methods.vpae import PhaseOne
from vpae_jax.types import Batch

ANY = TimeDistribution(low=0.2, high=0.9)
SIZE = (3, 6, 8, C)
CLIPS = make_batch((B, *SIZE))
PROMPTS = replace(CLIPS, latents=None, size=SIZE)
SMALL = {"matching": DistributionMatching(t=ANY, guidance=3.0), "fake_t": ANY, "image_dropout": 0.5}
WITHOUT = {
    "phase one": PhaseOne(input="pure_noise", **SMALL),
    "phase one, all updates": PhaseOne(input="pure_noise", fake="full", count="all", **SMALL),
    "dmd2, four steps": DMD2(adversarial_weight=0.0, disc_weight=0.0, **SMALL),
    "dmd2, one step": DMD2(adversarial_weight=0.0, disc_weight=0.0, steps=1, inputs="noised_real", **SMALL),
    "magic": Magic(inputs="simulated", truth_weight=0.0, adversarial_weight=0.0, **SMALL),
    "self-forcing": SelfForcing(chunks=Chunks(1), **SMALL),
    "causal ode": CausalODE(chunks=Chunks(1), ode_steps=8, image_dropout=0.5),
}
# Of the methods above, each with a setting that has real clips.
WITH = {
    "phase one, noised clips": PhaseOne(),
    "phase one, annealed": PhaseOne(input="anneal"),
    "dmd2, noised clips": DMD2(inputs="noised_real", adversarial_weight=0.0, disc_weight=0.0),
    "dmd2, judged": DMD2(),
    "dmd2 of one step, judged": DMD2(steps=1),
    "magic, noised clips": Magic(truth_weight=0.0, adversarial_weight=0.0),
    "magic, with the ground truth": Magic(inputs="simulated", adversarial_weight=0.0),
    "magic, judged": Magic(inputs="simulated", truth_weight=0.0),
    "self-forcing, judged": SelfForcing(chunks=Chunks(1), adversarial_weight=0.03, disc_weight=0.03),
}
NEEDING = WITH | {name: made(cls) for name, cls in METHODS.items() if cls.batch is Batch and cls().needs_clips}


def losses(method):
    return [update.loss for update in method.updates]


def run(method, loss, batch, clips=None):
    """Losses, metrics and gradients with respect to all weights."""

    @jax.jit
    def differentiated(weights, batch):
        given = context() if clips is None else Context(jnp.int32(0), clips, context().batch)

        def mean(weights):
            values, metrics = loss(nets_of(method, weights), batch, given)
            return values.mean(), (values, metrics)

        return jax.grad(mean, has_aux=True)(weights)

    return differentiated(weights_of(method), batch)


# Two of them in every run of the tests, and all in the long one.
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, id=name, marks=[pytest.mark.long] * (name not in ("phase one", "dmd2, one step")))
        for name, method in WITHOUT.items()
    ],
)
def test_losses_are_the_same_with_clips_and_without(method):
    """From the same draws, so that no clip takes part; what compares with clips is left out."""
    assert not method.needs_clips
    for loss in losses(method):
        grads, (values, metrics) = run(method, loss, PROMPTS)
        expected_grads, (expected, all_metrics) = run(method, loss, CLIPS)
        np.testing.assert_allclose(values, expected, rtol=1e-5)
        for name, grad in grads.items():
            np.testing.assert_allclose(grad, expected_grads[name], rtol=1e-4, atol=1e-6)
        left_out = (
            {"x0_mean_drift", "x0_std_ratio"}
            if loss in (getattr(method, "generator_loss", None), getattr(method, "loss", None))
            else set()
        )
        assert set(all_metrics) - set(metrics) == left_out and set(metrics) <= set(all_metrics)
        assert max(np.abs(grad).max() for grad in grads.values()) > 0


@pytest.mark.parametrize("method", NEEDING.values(), ids=NEEDING)
def test_a_method_that_needs_clips_says_so_and_looks_for_them(method):
    assert method.needs_clips
    if method.without_clips is not None:
        assert not replace(method, **method.without_clips).needs_clips
    batch = replace(PROMPTS, seed=jnp.arange(B, dtype=jnp.uint32))
    told = 0
    for loss in losses(method):
        try:
            jax.eval_shape(
                lambda weights, loss=loss: loss(nets_of(method, weights), batch, context()), weights_of(method)
            )
        except ValueError as error:
            assert "a loss reads real clips, but the batch has prompts only" in str(error)
            told += 1
    assert told


@pytest.mark.parametrize("loss", ["generator_loss", "fake_score_loss"])
def test_what_phase_one_calls_on_prompts(loss):
    """The generator on pure noise of the clips' size at time 1, and the scores on what it made."""
    method = PhaseOne(input="pure_noise", fake_t=ANY, matching=DistributionMatching(t=ANY, guidance=3.0))
    found = record(method, getattr(method, loss), batch=PROMPTS)
    scores = [("teacher", "velocity", "own"), ("teacher", "velocity", "negative"), ("fake_score", "velocity", "own")]
    assert found.order == [("generator", "velocity", "own"), *(scores if loss == "generator_loss" else scores[2:])]
    made, seen = found.calls[:2]
    assert made.x.shape == (B, *SIZE)
    np.testing.assert_array_equal(made.t, 1)
    assert_independent(made.x, seen.noise_from(made.x0))


def test_a_student_of_several_steps_starts_from_noise():
    """The first of its own earlier steps, or the step that is trained, where there is none before it."""
    method = DMD2(adversarial_weight=0.0, disc_weight=0.0, steps=2, fake_t=ANY)
    for key in range(2):
        with jax.disable_jit():
            found = record(method, method.fake_score_loss, batch=PROMPTS, key=jax.random.key(key))
        np.testing.assert_array_equal(found.calls[0].t, 1)
        assert_independent(found.calls[0].x)


def test_parts_of_a_batch_of_prompts_are_the_whole():
    method, clips = WITHOUT["phase one"], clip_keys(jax.random.key(1), B)
    for loss in losses(method):
        whole = run(method, loss, PROMPTS, clips)[1][0]
        for part in (0, B - 1):
            batch, keys = sharding.part_of((PROMPTS, clips), part, B)
            assert batch.shape == (1, *SIZE) and batch.latents is None
            np.testing.assert_allclose(run(method, loss, batch, keys)[1][0], whole[part::B], rtol=1e-4)


def test_batches_know_their_shape():
    assert CLIPS.shape == PROMPTS.shape == (B, *SIZE)
    assert sharding.count_clips(PROMPTS) == B
    assert jax.tree.map(lambda x: x, PROMPTS).size == SIZE
    np.testing.assert_array_equal(real_clips(CLIPS), CLIPS.latents)
    with pytest.raises(ValueError, match="prompts only"):
        real_clips(PROMPTS)
    with pytest.raises(ValueError, match="has to say their size"):
        _ = replace(PROMPTS, size=None).shape
