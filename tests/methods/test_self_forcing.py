"""Self-Forcing: what its roll-out calls, its gradient against one that recomputes everything, and its exits."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import Net, assert_independent, context, evaluate, made, make_batch, nets_of, record, touched, weights_of

from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.sampler import Sampler
from vpae_jax.flow.times import TimeDistribution
from vpae_jax.methods.scores import DistributionMatching
from vpae_jax.methods.self_forcing import SelfForcing
from vpae_jax.types import UserError

ANY = TimeDistribution(low=0.2, high=0.9)
FIELDS = {"matching": DistributionMatching(t=ANY, guidance=3.0), "fake_t": ANY, "shift": 1.0}
CLIPS = make_batch((3, 4, 6, 6, 4))
FRAMES = CLIPS.shape[1]


def method_of(size=1, **fields):
    return SelfForcing(chunks=Chunks(size), **FIELDS, **fields)


def key_of(last, method):
    """A key with which the batch's exit is this one."""
    return next(key for key in map(jax.random.key, range(99)) if int(method.last(context(key=key))) == last)


def calls(method, loss, last):
    with jax.disable_jit():
        return record(method, loss, batch=CLIPS, key=key_of(last, method)).calls


@pytest.mark.parametrize("size", [1, 2])
def test_the_roll_out_then_all_chunks_at_once(size):
    """Each chunk from noise of its own in two evaluations, then remembered clean; the second evaluation again, of all
    chunks at once; and DMD's three scores of whole clips."""
    method = method_of(size, steps=4)
    found = calls(method, method.generator_loss, last=1)
    rolled, (gradient, *scores) = found[: 3 * (FRAMES // size)], found[3 * (FRAMES // size) :]
    entered, clip, noises = [], [], []
    for chunk in range(FRAMES // size):
        first, second, remembered = rolled[3 * chunk : 3 * chunk + 3]
        assert {(call.net, call.kind, call.prompt) for call in (first, second, remembered)} == {
            ("simulator", "step", "own")
        }
        assert first.x.shape[1] == size
        np.testing.assert_array_equal([first.t[0], second.t[0], remembered.t[0]], [1, 0.75, 0])
        np.testing.assert_allclose(remembered.x, second.x0, atol=1e-6)
        noises += [first.x, second.noise_from(first.x0)]
        entered.append(second.x)
        clip.append(second.x0)
    assert_independent(*noises)
    assert (gradient.net, gradient.kind) == ("generator", "recall")
    np.testing.assert_allclose(gradient.x, np.concatenate(entered, 1), atol=1e-6)
    np.testing.assert_array_equal(gradient.t, np.full((3, FRAMES), 0.75, np.float32))
    np.testing.assert_allclose(gradient.x0, np.concatenate(clip, 1), atol=1e-5)
    assert [(call.net, call.prompt) for call in scores] == [
        ("teacher", "own"),
        ("teacher", "negative"),
        ("fake_score", "own"),
    ]
    assert_independent(scores[0].noise_from(gradient.x0))


def test_the_fake_score_sees_the_clips_of_a_roll_out():
    method = method_of(steps=4)
    *rolled, seen = calls(method, method.fake_score_loss, last=2)
    assert [call.kind for call in rolled] == ["step"] * 4 * FRAMES and (seen.net, seen.kind) == (
        "fake_score",
        "velocity",
    )
    clip = np.concatenate([call.x for call in rolled[3::4]], 1)
    assert_independent(seen.noise_from(clip))


def plainly(method, w, batch, last, key):
    """A roll-out of one program that recomputes everything, whose memory and inputs are constants."""
    net = Net(w).causal(method.chunks)
    past, chunks, clips = net.empty(batch.latents), [], []
    with jax.disable_jit():
        entered = method.rolled_out(nets_of(method, {**weights_of(method), "generator": w}), batch, last, key)[1]
    for start, stop in method.chunks.spans(batch.shape[1]):
        own = replace(batch.condition, frames=batch.condition.frames[:, start:stop])
        x = jax.lax.stop_gradient(entered[:, start:stop])
        t = jnp.full(len(x), method.grid[last])
        x0 = x - method.grid[last] * net.step(x, t, own, past)[0]
        clean = jax.lax.stop_gradient(x0)
        past = jax.lax.stop_gradient(net.memorize(past, net.step(clean, jnp.zeros(len(x)), own, past)[1], stop - start))
        chunks.append(x0)
        clips.append(clean)
    return jnp.concatenate(chunks, 1)


@pytest.mark.parametrize("last", [0, 2])
def test_the_gradient_is_that_of_a_roll_out_with_detached_history(last):
    """Each chunk's last evaluation is differentiated, its history is not: Self-Forcing's own, chunk by chunk."""
    method = method_of(2, steps=4)
    batch, weights, key = make_batch((2, 4, 2, 2, 4)), weights_of(method), jax.random.split(jax.random.key(1), 2)
    direction = jax.random.normal(jax.random.key(2), batch.shape)

    def generated(w):
        given = context(key=key_of(last, method))
        return (method.generate(nets_of(method, weights | {"generator": w}), batch, given, key) * direction).sum()

    def expected(w):
        return (plainly(method, w, batch, last, key) * direction).sum()

    value, grad = jax.value_and_grad(generated)(weights["generator"])
    other, plain = jax.value_and_grad(expected)(weights["generator"])
    np.testing.assert_allclose(value, other, rtol=1e-5)
    np.testing.assert_allclose(grad, plain, rtol=1e-4, atol=1e-4)


def test_gradients_reach_what_is_trained_and_nothing_else():
    method = method_of(steps=2)
    assert touched(evaluate(method, method.generator_loss, batch=CLIPS)[2]) == {"generator"}
    assert touched(evaluate(method, method.fake_score_loss, batch=CLIPS)[2]) == {"fake_score"}


def test_exits_in_turn():
    method = method_of(steps=3, exits="cycled")
    assert [int(method.last(context(step))) for step in range(6)] == [0, 1, 2, 0, 1, 2]


def test_exits_are_drawn_evenly():
    method = method_of(steps=4)
    drawn = [int(method.last(context(key=jax.random.key(i)))) for i in range(400)]
    assert np.bincount(drawn).min() > 60


def test_the_student_makes_chunks():
    method = method_of(2, steps=2)
    assert method.student.sampler == Sampler("consistency", (1.0, 0.5, 0.0), chunks=Chunks(2))
    assert not method.needs_clips and made(SelfForcing, adversarial_weight=0.03, disc_weight=0.03).needs_clips


def test_clips_are_whole_numbers_of_chunks():
    method = method_of(3)
    with pytest.raises(UserError, match="a clip of 4 latent frames is not a whole number of chunks"):
        evaluate(method, method.generator_loss, batch=CLIPS)
