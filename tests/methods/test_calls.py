"""Which networks every loss calls, on what, at which time, under which condition: whole lists, as the equations ask.

What a clip is noised with is worked out from each call's input, so that a draw that is used twice, a clip in the place
of another, or a time that is not the one that is told shows here.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest
from networks import assert_independent, context, make_batch, nets_of, record, weights_of

from vpae_jax.flow.times import TimeDistribution
from vpae_jax.methods.adversarial import DifferencePenalty, DiscriminatorNoise
from vpae_jax.methods.lcm import LCM
from vpae_jax.methods.scores import DistributionMatching, ScoreDistillation
from vpae_jax.methods.vpae import PhaseOne, PhaseTwo

LARGE = (3, 4, 6, 6, 4)
CLIPS = make_batch(LARGE)
DATA = np.asarray(CLIPS.latents)
ANY = TimeDistribution(low=0.2, high=0.9)


def calls(method, loss, **options):
    found = record(method, loss, batch=CLIPS, **options)
    assert np.isfinite(found.values).all()
    return found


def add_noise(x0, noise, t):
    t = np.asarray(t).reshape(-1, 1, 1, 1, 1)
    return (1 - t) * x0 + t * noise


def matching_of(t):
    return DistributionMatching(t=t, guidance=3.0)


def test_phase_one_generator():
    """Eq. 1: a noised real clip, the generator's clip, the same noised again, three scores of it."""
    method = PhaseOne(t=ANY, matching=matching_of(ANY))
    found = calls(method, method.generator_loss)
    assert found.order == [
        ("generator", "velocity", "own"),
        ("teacher", "velocity", "own"),
        ("teacher", "velocity", "negative"),
        ("fake_score", "velocity", "own"),
    ]
    made, *scored = found.calls
    assert all(all(call.picture) for call in found.calls)
    for call in scored[1:]:
        np.testing.assert_array_equal(call.x, scored[0].x)
        np.testing.assert_array_equal(call.t, scored[0].t)
    assert (made.t != scored[0].t).all() and len(np.unique(made.t)) == len(DATA) == len(np.unique(scored[0].t))
    assert_independent(made.noise_from(DATA), scored[0].noise_from(made.x0))
    v_r, v_u, v_f = (call.v for call in scored)
    t = scored[0].t.reshape(-1, 1, 1, 1, 1)
    real, fake = scored[0].x - t * (v_u + 3.0 * (v_r - v_u)), scored[0].x - t * v_f
    g = (fake - real) / np.abs(made.x0 - real).mean((1, 2, 3, 4), keepdims=True)
    np.testing.assert_allclose(found.values, 0.5 * (g**2).mean((1, 2, 3, 4)), rtol=1e-4)


def test_phase_one_fake_score():
    """Eq. 2: the generator's clip, noised, and the error of the fake score's velocity."""
    method = PhaseOne(t=ANY, fake_t=ANY)
    found = calls(method, method.fake_score_loss)
    assert found.order == [("generator", "velocity", "own"), ("fake_score", "velocity", "own")]
    made, seen = found.calls
    noise = seen.noise_from(made.x0)
    assert_independent(made.noise_from(DATA), noise)
    assert (made.t != seen.t).all()
    np.testing.assert_allclose(found.values, ((seen.v - (noise - made.x0)) ** 2).mean((1, 2, 3, 4)), rtol=1e-4)


@pytest.mark.parametrize("loss", ["generator_loss", "fake_score_loss"])
def test_phase_one_from_pure_noise(loss):
    method = PhaseOne(input="pure_noise", fake_t=ANY, matching=matching_of(ANY))
    found = calls(method, getattr(method, loss))
    made, seen = found.calls[:2]
    np.testing.assert_array_equal(made.t, 1)
    assert_independent(made.x, seen.noise_from(made.x0))


@pytest.mark.parametrize("loss", ["generator_loss", "fake_score_loss"])
def test_pictures_are_withheld_from_all_networks_alike(loss):
    method = PhaseOne(image_dropout=0.5)
    seen = set()
    for step in range(4):
        found = calls(method, getattr(method, loss), key=jax.random.key(step))
        seen |= {pictures := found.calls[0].picture}
        assert all(call.picture == pictures for call in found.calls)
    assert len({picture for pictures in seen for picture in pictures}) == 2


def judged(found, at=0):
    """The calls of the backbone."""
    return [call for call in found.calls if call.kind == "features"][at:]


def test_phase_two_discriminator():
    """Eqs. 3, 4 and 7: a generated and a real clip at one time with their own noise, and the former perturbed."""
    method = PhaseTwo(noise=DiscriminatorNoise(t=ANY))
    found = calls(method, method.discriminator_loss)
    assert found.order == [
        ("generator", "velocity", "own"),
        ("backbone", "features", "own"),
        ("backbone", "features", "own"),
        ("backbone", "features", "own"),
    ]
    made, real, fake, shaken = found.calls
    np.testing.assert_array_equal(made.t, 1)
    assert len(np.unique(real.t)) == len(DATA)
    for call in (fake, shaken):
        np.testing.assert_array_equal(call.t, real.t)
    assert_independent(made.x, real.noise_from(DATA), fake.noise_from(made.x0))
    delta = shaken.x - fake.x
    assert abs((delta**2).mean() - 0.0101) < 0.003
    channel = delta.mean((2, 3))
    assert abs((channel**2).mean() - 0.01) < 0.003, "one draw a frame and channel, and a little for every value"


def test_phase_two_generator():
    """Eqs. 5 and 6: the judged clip, then the clip noised again for the teacher, unguided."""
    method = PhaseTwo(noise=DiscriminatorNoise(t=ANY), csds=ScoreDistillation(t=ANY))
    found = calls(method, method.generator_loss)
    assert found.order == [
        ("generator", "velocity", "own"),
        ("backbone", "features", "own"),
        ("teacher", "velocity", "own"),
    ]
    made, fake, told = found.calls
    np.testing.assert_array_equal(made.t, 1)
    assert (fake.t != told.t).all()
    assert_independent(made.x, fake.noise_from(made.x0), told.noise_from(made.x0))
    target = told.x - told.t.reshape(-1, 1, 1, 1, 1) * told.v
    distance = ((made.x0 - target) ** 2).mean((1, 2, 3, 4))
    alone = replace(method, csds=ScoreDistillation(weight=0.0))
    adversarial = calls(alone, alone.generator_loss).values
    np.testing.assert_allclose(found.values, adversarial + 10 * distance, rtol=1e-4)


def test_the_teacher_may_be_told_the_discriminators_times():
    method = PhaseTwo(noise=DiscriminatorNoise(t=ANY), csds=ScoreDistillation(times="discriminator", guidance=2.0))
    _, fake, told, guided = calls(method, method.generator_loss).calls
    np.testing.assert_array_equal(told.t, fake.t)
    assert (guided.net, guided.prompt) == ("teacher", "negative")


@pytest.mark.parametrize(("on", "expected"), [("fake", ["fake"]), ("real", ["real"]), ("both", ["fake", "real"])])
def test_what_is_perturbed(on, expected):
    method = PhaseTwo(noise=DiscriminatorNoise(t=ANY), penalty=DifferencePenalty(on=on))
    real, fake, *shaken = judged(calls(method, method.discriminator_loss))
    clips = {"real": real, "fake": fake}
    assert len(shaken) == len(expected)
    for call, name in zip(shaken, expected, strict=True):
        assert np.abs(call.x - clips[name].x).max() < 1
        np.testing.assert_array_equal(call.t, clips[name].t)


def test_relative_losses_ask_for_the_real_clip_too():
    method = PhaseTwo(adversarial="rpgan", noise=DiscriminatorNoise(t=ANY), csds=ScoreDistillation(weight=0.0))
    made, fake, real = calls(method, method.generator_loss).calls
    assert_independent(made.x, fake.noise_from(made.x0), real.noise_from(DATA))


def test_the_student_and_its_judge_learn_from_different_noise():
    """Updates of one step draw from keys of their own, and so do their repeats; here by two keys."""
    method = PhaseTwo(noise=DiscriminatorNoise(t=ANY))
    one, two = (calls(method, method.discriminator_loss, key=jax.random.key(k)).calls[0].x for k in (0, 1))
    assert_independent(one, two)


def test_lcm():
    """Eqs. 1 and 2: the noised clip, the guided teacher's Euler step to the point before, and both predictions."""
    grid = TimeDistribution(kind="grid", points=8, shift=2.0)
    method = LCM(t=grid, guidance=3.0, distance="squared")
    found = calls(method, method.loss)
    assert found.order == [
        ("teacher", "velocity", "own"),
        ("teacher", "velocity", "negative"),
        ("target", "velocity", "own"),
        ("generator", "velocity", "own"),
    ]
    told, unguided, target, student = found.calls
    for call in (unguided, student):
        np.testing.assert_array_equal(call.x, told.x)
        np.testing.assert_array_equal(call.t, told.t)
    assert_independent(told.noise_from(DATA))
    raw, before = (t / (2 - t) for t in (told.t, target.t))
    np.testing.assert_allclose(raw - before, 1 / 8, atol=1e-5)
    np.testing.assert_allclose(np.round(raw * 8), raw * 8, atol=1e-5)
    v = unguided.v + 3.0 * (told.v - unguided.v)
    stepped = told.x + (target.t - told.t).reshape(-1, 1, 1, 1, 1) * v
    np.testing.assert_allclose(target.x, stepped, atol=1e-5)
    np.testing.assert_allclose(found.values, ((student.x0 - target.x0) ** 2).mean((1, 2, 3, 4)), rtol=1e-4)


@pytest.mark.parametrize("adversarial", ["hinge", "ns_logistic", "rpgan"])
def test_a_step_of_the_discriminator_raises_real_minus_fake(adversarial):
    """A short one, on known clips and the same noise: the signs of both sides, and which of them is real."""
    method = PhaseTwo(adversarial=adversarial, noise=DiscriminatorNoise(t=ANY), penalty=DifferencePenalty(weight=0.0))
    clips = replace(CLIPS, latents=CLIPS.latents * 0 + 1.5)
    for seed in range(3):
        weights = weights_of(method, seed)
        weights["heads"] *= 0.1  # logits well inside the hinges, where every clip counts

        def loss(heads, weights=weights):
            nets = nets_of(method, weights | {"heads": heads})
            values, metrics = method.discriminator_loss(nets, clips, context())
            return values.mean(), metrics["logit_gap"].mean()

        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (_, before), grad = step(weights["heads"])
        (_, after), _ = step(weights["heads"] - 0.003 * grad)
        assert after > before
