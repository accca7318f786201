"""ASD's losses: on linear heads in closed form, and from the logits of the clips that are judged."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import (
    assert_heads_learn,
    assert_independent,
    context,
    evaluate,
    logits_of,
    make_batch,
    nets_of,
    record,
    softplus,
    touched,
    weights_of,
)

from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.times import TimeDistribution
from vpae_jax.methods.adversarial import DifferencePenalty, DiscriminatorNoise
from vpae_jax.methods.asd import ASD
from vpae_jax.methods.scores import DistributionMatching
from vpae_jax.methods.self_forcing import SelfForcing
from vpae_jax.types import Features, UserError

ANY = TimeDistribution(low=0.2, high=0.9)
FIELDS = {
    "matching": DistributionMatching(t=ANY, guidance=3.0),
    "fake_t": ANY,
    "shift": 1.0,
    "chunks": Chunks(1),
    "steps": 3,
}
METHOD = ASD(**FIELDS, alpha=2.0, noise=DiscriminatorNoise("independent", ANY))
CLIPS = make_batch((3, 3, 4, 4, 4))
FRAMES = CLIPS.shape[1]


def key_of(last, method=METHOD):
    return next(key for key in map(jax.random.key, range(99)) if int(method.last(context(key=key))) == last)


def recorded(method, loss, key):
    with jax.disable_jit():
        return record(method, loss, batch=CLIPS, key=key)


def clips_of(calls, evaluations):
    """The clips of the roll-outs in a list of steps, each of so many evaluations a chunk and one that remembers."""
    steps, clips = [call for call in calls if call.kind == "step"], []
    for count in evaluations:
        mine, steps = steps[: FRAMES * (count + 1)], steps[FRAMES * (count + 1) :]
        clips.append(np.concatenate([call.x for call in mine[count :: count + 1]], 1))
        assert [call.t[0] for call in mine] == [*np.linspace(1, 0, 4, dtype=np.float32)[:count], 0] * FRAMES
    assert not steps
    return clips


def output(method, call, n):
    """D_n of a call's input."""
    return logits_of(method, call, CLIPS, n)


def test_the_heads_tell_n_steps_from_one_more():
    """Eq. 2 of clips of independent noise, each at a time and with noise of its own, and R1 + R2."""
    seen = set()
    for seed in range(6):
        found = recorded(METHOD, METHOD.heads_loss, jax.random.key(seed))
        *_, two, one, shaken_one, shaken_two = found.calls
        # A chunk takes n and n + 1 evaluations, each with one more that remembers it.
        n = (len([call for call in found.calls if call.kind == "step"]) // FRAMES - 3) // 2
        own, other = clips_of(found.calls, (n, n + 1))
        assert (one.net, one.kind, two.net, two.kind) == ("fake_score", "features") * 2
        assert_independent(one.noise_from(own), two.noise_from(other))
        assert len(np.unique(np.concatenate([one.t, two.t]))) == 6
        gap = output(METHOD, two, n) - output(METHOD, one, n)
        shaken = [
            (output(METHOD, more, n) - output(METHOD, less, n)) ** 2
            for more, less in ((shaken_one, one), (shaken_two, two))
        ]
        assert np.std(shaken_one.x - one.x) == pytest.approx(0.05, rel=0.1)
        np.testing.assert_allclose(found.values, softplus(-gap) + 600 * sum(shaken), rtol=2e-3)
        assert found.metrics["logit_gap"] == pytest.approx(gap.mean(), rel=1e-3)
        seen.add(n)
    assert seen == {1, 2}


@pytest.mark.parametrize("last", [0, 1, 2])
def test_the_generator_follows_one_step_more(last):
    """Eq. 1: DMD of x^1, and where there is a student of one step more, alpha softplus(D(x^2) - D(x^1))."""
    key = key_of(last)
    found, plain = (recorded(m, m.generator_loss, key) for m in (METHOD, SelfForcing(**FIELDS)))
    names = {call.net for call in found.calls}
    assert names == {"simulator", "generator", "teacher", "fake_score"}
    if last == 2:
        np.testing.assert_allclose(found.values, plain.values, rtol=1e-6)
        return
    two, one = [call for call in found.calls if call.kind == "features"][-2:][::-1]
    n = last + 1
    own, other = clips_of(found.calls, (n, n + 1))
    assert_independent(one.noise_from(own), two.noise_from(other))
    expected = plain.values + 2.0 * softplus(output(METHOD, two, n) - output(METHOD, one, n))
    np.testing.assert_allclose(found.values, expected, rtol=1e-4)


def test_alpha_zero_is_self_forcing():
    method, plain = ASD(**FIELDS, alpha=0.0), SelfForcing(**FIELDS)
    assert method.roles == plain.roles and method.student == plain.student and method.views == plain.views
    assert [(u.name, u.repeats, u.every) for u in method.updates] == [
        (u.name, u.repeats, u.every) for u in plain.updates
    ]
    for ours, theirs in zip(method.updates, plain.updates, strict=True):
        values, metrics, grads = evaluate(method, ours.loss, batch=CLIPS)
        expected, other_metrics, other_grads = evaluate(plain, theirs.loss, batch=CLIPS)
        np.testing.assert_array_equal(values, expected)
        assert metrics == other_metrics
        jax.tree.map(np.testing.assert_array_equal, grads, other_grads)


def test_gradients_reach_what_is_trained_and_nothing_else():
    for key in map(jax.random.key, range(2)):
        assert touched(evaluate(METHOD, METHOD.generator_loss, batch=CLIPS, key=key)[2]) == {"generator"}
        assert touched(evaluate(METHOD, METHOD.heads_loss, batch=CLIPS, key=key)[2]) == {"heads"}
        assert touched(evaluate(METHOD, METHOD.fake_score_loss, batch=CLIPS, key=key)[2]) == {"fake_score"}


@dataclass(frozen=True)
class Linear:
    """Hidden states that are the clip, and heads whose n-th logit is w_n times it."""

    w: Any
    taps: tuple = (1,)

    def features(self, x, t, condition, taps):
        return Features((x.reshape(len(x), -1, x.shape[-1]),), condition.text, condition.text_mask, grid=x.shape[1:4])

    def __call__(self, features):
        return features.taps[0].reshape(len(features.taps[0]), -1) @ self.w


def linear(seed=0):
    """Networks whose discriminator is linear: D_n(x) = w_n x."""
    w = jnp.asarray(np.random.default_rng(seed).normal(size=(FRAMES * 4 * 4 * 4, 2)), jnp.float32) / 10
    nets = nets_of(METHOD, weights_of(METHOD))
    return w, nets | {"heads": Linear(w)}, Linear(w)


def test_the_penalty_of_a_linear_head_is_the_square_of_its_gradient():
    """E (w delta)^2 = sigma^2 |w|^2 at each of the clips."""
    w, nets, net = linear()
    method = replace(METHOD, penalty=DifferencePenalty(600.0, "both", 0.05, 0.0, norm="fixed"))
    nets["fake_score"] = net
    run = jax.jit(lambda key: method.heads_loss(nets, CLIPS, context(key=key))[1]["penalty"])
    found = np.mean([run(key) for key in jax.random.split(jax.random.key(0), 300)])
    squares = np.square(np.asarray(w)).sum(0)
    assert found == pytest.approx(2 * 0.05**2 * squares.mean(), rel=0.1)


def test_the_term_of_a_linear_head_pulls_the_clip_up_its_gradient():
    """d/dx1 alpha softplus(D(Psi x2) - D(Psi x1)) = -alpha sigmoid(gap) (1 - t) w_n: towards clips of one step more,
    through x1 alone. Psi's noise is 0 here, so that the gap is known."""
    w, nets, net = linear()
    nets["fake_score"] = net
    method = replace(METHOD, noise=DiscriminatorNoise("independent", TimeDistribution(low=0.0, high=0.0)))
    given = context(key=key_of(0))
    x0 = jnp.asarray(np.random.default_rng(1).normal(size=CLIPS.shape), jnp.float32)
    term, metrics = method.judged_term(nets, CLIPS, given, x0, given.clips)
    assert term is not None
    d1 = x0.reshape(3, -1) @ w[:, 0]
    d2 = d1 + np.log(np.expm1(np.asarray(term.value, np.float64) / 2.0))  # from the value of softplus(D2 - D1)
    expected = -2.0 * jax.nn.sigmoid(d2 - d1)[:, None] * w[:, 0]
    np.testing.assert_allclose(term.grad.reshape(3, -1), expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(metrics["fake_logit"][:, 0], d1, rtol=1e-5)


def test_the_heads_learn():
    assert_heads_learn(replace(METHOD, penalty=DifferencePenalty(0.0)), METHOD.heads_loss, CLIPS)


def test_a_student_follows_itself_with_one_step_more():
    with pytest.raises(UserError, match="steps is 1, but the student follows itself"):
        ASD(steps=1)
    with pytest.raises(UserError, match="heads compare the student with itself"):
        ASD(adversarial_weight=0.1, disc_weight=0.1)
    assert ASD().roles["heads"].outputs == 3 and not ASD().needs_clips
