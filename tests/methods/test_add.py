"""ADD in latents: every call of its losses, the times that are trained, and values and gradients that are known."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import (
    ADVERSARIAL,
    BATCH,
    KEY,
    B,
    assert_heads_learn,
    assert_independent,
    context,
    evaluate,
    logits_of,
    make_batch,
    nets_of,
    record,
    touched,
    weights_of,
)
from oracles import Backbone, LinearHeads

from vpae_jax.flow.sampler import Sampler
from vpae_jax.flow.schedule import expand
from vpae_jax.flow.times import VALUES_720P, TimeDistribution
from vpae_jax.methods import make_method
from vpae_jax.methods.add import ADD, RENOISED, TEACHER
from vpae_jax.methods.adversarial import LOSSES, DifferencePenalty, DiscriminatorNoise
from vpae_jax.methods.base import Adapters, Average, Role, Student, View
from vpae_jax.methods.common import named_keys, predict_x0
from vpae_jax.methods.scores import SCORE_TIMES
from vpae_jax.types import UserError

ANY = TimeDistribution(low=0.2, high=0.9)
METHOD = ADD(
    noise=DiscriminatorNoise(t=ANY), csds=replace(TEACHER, t=ANY), shift=2.0, early_steps=10, adversarial_weight=0.7
)
CLIPS = make_batch((B, 3, 4, 4, 4))
DATA = np.asarray(CLIPS.latents)
AXES = (1, 2, 3, 4)
GRID = np.array([1, 6 / 7, 2 / 3, 0.4])  # 1, .75, .5, .25 shifted by 2
LATE = 10


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def test_defaults():
    method = ADD()
    assert method.roles == {
        "generator": Role("pretrained", trains=True, averages={"ema": Average(0.995)}),
        "teacher": Role("pretrained"),
        "heads": Role("fresh", trains=True, part="heads"),
    }
    assert method.views == {"backbone": View("teacher")}
    assert [(u.trains, u.repeats, u.starts) for u in method.updates] == [(("heads",), 1, 0), (("generator",), 1, 0)]
    assert method.student == Student("generator", Sampler.even(4, 5.0, solver="consistency"), average="ema")
    assert (method.adversarial, method.adversarial_weight, method.inputs) == ("hinge", 1.0, "noised_real")
    t = TimeDistribution("logit_normal", mean=1.0, std=1.0, shift=5.0, stated_for=VALUES_720P)
    assert method.noise == DiscriminatorNoise("shared", t)
    assert method.penalty == DifferencePenalty(0.1, "real", 0.1, 0.0, norm="fixed")
    csds = method.csds
    assert (csds.weight, csds.time_weight, csds.reduction, csds.guidance) == (2.5, "one_minus_t", "mean", 1.0)
    assert (csds.times, csds.t) == ("own", SCORE_TIMES)


def test_variants_are_data():
    assert ADD(steps=1).student.sampler == Sampler("euler", (1.0, 0.0), 1.0)
    simulated = {"simulator": View("generator", constant=True), "backbone": View("teacher")}
    assert ADD(inputs="simulated").views == simulated
    generator, heads = ADD(disc_updates=3, disc_warmup=50).updates[::-1]
    assert (heads.repeats, generator.starts, generator.delay) == (3, 50, "disc_warmup")
    low_rank = ADD(generator="lora", generator_rank=4, generator_scale=2.0).roles["generator"]
    assert low_rank.adapters == Adapters("teacher", 4, 8.0)


@pytest.mark.parametrize(
    "method",
    [
        METHOD,
        *(
            pytest.param(other, marks=pytest.mark.long)
            for other in (replace(METHOD, inputs="simulated"), replace(METHOD, steps=1))
        ),
    ],
)
def test_each_update_trains_its_own_roles(method):
    values, metrics, grads = evaluate(method, method.generator_loss)
    assert values.shape == (B,) and touched(grads) == {"generator"}
    named = {"adversarial", "fake_logit", "adv_grad", "csds", "csds_grad", "adv_csds_ratio"}
    assert set(metrics) == named | {"x0_mean_drift", "x0_std_ratio"}
    values, metrics, grads = evaluate(method, method.discriminator_loss)
    assert values.shape == (B,) and touched(grads) == {"heads"}
    assert set(metrics) == {"real_logit", "fake_logit", "logit_gap", "accuracy", "adversarial", "penalty"}


# Every call. Without jit, so that loops run with numbers that can be written down.


def calls(method, loss, key=KEY, step=LATE):
    with jax.disable_jit():
        return record(method, getattr(method, loss), batch=CLIPS, key=key, step=step)


def index_of(t):
    """Which of the student's times these are."""
    nearest = np.abs(np.asarray(t)[:, None] - GRID).argmin(1)
    np.testing.assert_allclose(t, GRID[nearest], rtol=1e-6)
    return nearest


def test_the_generator():
    """Eq. 2: a noised real clip, the student's clip noised for its judge, and again for the teacher, unguided."""
    found = calls(METHOD, "generator_loss")
    assert found.order == [
        ("generator", "velocity", "own"),
        ("backbone", "features", "own"),
        ("teacher", "velocity", "own"),
    ]
    made, seen, told = found.calls
    index_of(made.t)
    assert (seen.t != told.t).all() and len(np.unique(seen.t)) == B == len(np.unique(told.t))
    assert_independent(made.noise_from(DATA), seen.noise_from(made.x0), told.noise_from(made.x0))
    distance = (1 - told.t) * ((made.x0 - told.x0) ** 2).mean(AXES)
    expected = -0.7 * logits_of(METHOD, seen, CLIPS) + 2.5 * distance
    np.testing.assert_allclose(found.values, expected, rtol=1e-4)


def test_the_discriminator():
    """Eq. 1: both clips at one time with noise of their own, and the noised real one once more, shaken."""
    found = calls(METHOD, "discriminator_loss")
    assert found.order == [("generator", "velocity", "own")] + [("backbone", "features", "own")] * 3
    made, real, fake, shaken = found.calls
    index_of(made.t)
    for call in (fake, shaken):
        np.testing.assert_array_equal(call.t, real.t)
    assert len(np.unique(real.t)) == B
    delta = (shaken.x - real.x) / 0.1
    assert_independent(made.noise_from(DATA), real.noise_from(DATA), fake.noise_from(made.x0), delta)
    r, f, s = (logits_of(METHOD, call, CLIPS) for call in (real, fake, shaken))
    expected = np.maximum(1 - r, 0) + np.maximum(1 + f, 0) + 0.1 * (s - r) ** 2
    np.testing.assert_allclose(found.values, expected, rtol=1e-4)


@pytest.mark.parametrize("loss", ["generator_loss", "discriminator_loss"])
def test_both_losses_meet_the_times_of_their_step(loss):
    """Before `early_steps` the cleaner half alone, and after it the noisiest too."""
    early, late = set(), set()
    for number in range(4):
        key = jax.random.fold_in(KEY, number)
        early |= set(index_of(calls(METHOD, loss, key, LATE - 1).calls[0].t))
        late |= set(index_of(calls(METHOD, loss, key, LATE).calls[0].t))
    assert early == {2, 3} and 0 in late


@pytest.mark.parametrize("step", [0, LATE])
def test_one_step_starts_from_pure_noise(step):
    found = calls(replace(METHOD, steps=1), "generator_loss", step=step)
    np.testing.assert_array_equal(found.calls[0].t, 1)
    assert_independent(found.calls[0].x, found.calls[1].noise_from(found.calls[0].x0))


def test_simulated_inputs_are_the_students_own():
    """Its earlier steps, each noised afresh to the next of its times; at first two or three of them."""
    method, ends = replace(METHOD, inputs="simulated"), set()
    for number in range(4):
        found = calls(method, "generator_loss", jax.random.fold_in(KEY, number), LATE - 1)
        *earlier, last = [call for call in found.calls if call.net in ("simulator", "generator")]
        assert last.net == "generator" and {call.net for call in earlier} == {"simulator"}
        for number, call in enumerate([*earlier, last]):
            np.testing.assert_allclose(call.t, np.full(B, GRID[number]), rtol=1e-6)
        noises = [call.noise_from(before.x0) for before, call in zip(earlier, [*earlier[1:], last], strict=True)]
        assert_independent(earlier[0].x, *noises)
        ends.add(len(earlier))
    assert ends == {2, 3}


def test_pictures_are_withheld_from_all_networks_alike():
    for loss in ("generator_loss", "discriminator_loss"):
        pictures = {call.picture for call in calls(replace(METHOD, image_dropout=1.0), loss).calls}
        assert pictures == {(False,) * B}


# Which times are trained.


@pytest.mark.parametrize(
    ("fields", "step", "expected"),
    [
        ({}, 500, [0.7, 0.1, 0.1, 0.1]),
        ({}, 499, [0, 0, 0.5, 0.5]),
        ({"pure_noise": 0.25, "early_steps": 0}, 0, [0.25, 0.25, 0.25, 0.25]),
        ({"steps": 3}, 0, [0, 0.5, 0.5]),
        ({"steps": 3}, 500, [0.7, 0.15, 0.15]),
        ({"steps": 2}, 0, [0, 1]),
        ({"steps": 2}, 500, [0.7, 0.3]),
        ({"steps": 1}, 0, [1]),
        ({"steps": 1}, 500, [1]),
    ],
)
def test_how_likely_each_time_is(fields, step, expected):
    np.testing.assert_allclose(ADD(**fields).chances(jnp.int32(step)), expected, atol=1e-6)


def tells_its_time(x, t, condition):
    """A network whose clip is the time that it is told, everywhere."""
    return (x - expand(t, x)) / expand(t, x)


@pytest.mark.parametrize("inputs", ["noised_real", "simulated"])
@pytest.mark.parametrize(("step", "expected"), [(LATE - 1, (0, 0, 0.5, 0.5)), (LATE, (0.7, 0.1, 0.1, 0.1))])
def test_times_are_drawn_as_likely_as_said(inputs, step, expected):
    method, nets = replace(METHOD, inputs=inputs), {"generator": tells_its_time, "simulator": tells_its_time}
    batch = make_batch((8, 1, 1, 1, 4))

    @jax.jit
    def times(key):
        keys = jax.random.split(jax.random.fold_in(key, 1), 8)
        return method.generate(nets, batch, replace(context(step), clips=keys, batch=key), keys)[:, 0, 0, 0, 0]

    drawn = np.array([times(jax.random.key(number)) for number in range(200)])
    if inputs == "simulated":
        np.testing.assert_allclose(drawn, np.broadcast_to(drawn[:, :1], drawn.shape), atol=1e-6)
        drawn = drawn[:, 0]
    else:
        assert (drawn.std(1) > 0).any(), "each clip has its own"
    shares = np.bincount(index_of(drawn.ravel()), minlength=4) / drawn.size
    np.testing.assert_allclose(shares, expected, atol=5 * 0.5 / drawn.size**0.5)


@pytest.mark.parametrize("step", [0, LATE])
def test_a_time_of_no_chance_is_not_drawn_at_the_ends_of_the_generators_range_either(step):
    """A number in [0, 1) is never 1, but may be 0; chances that are summed up may fall short of 1 by rounding."""
    for steps in range(2, 12):
        method = replace(METHOD, steps=steps)
        possible = np.flatnonzero(method.chances(jnp.int32(step)))
        for u, index in ((0.0, possible[0]), (1 - 2**-24, possible[-1])):
            assert method._chosen(jnp.float32(u), context(step)) == index


# Known distributions and judges.


def at(place):
    """The velocity of data that is one clip."""
    return lambda x, t, condition: (x - place) / expand(t, x)


# A judge that is linear in what it is shown: the sum of a clip's values.
SUM = {"backbone": Backbone(), "heads": LinearHeads(BATCH.latents[0].size)}


@pytest.mark.parametrize("inputs", ["noised_real", "simulated"])
def test_the_distance_to_the_teacher_is_known(inputs):
    """Fact 12: a teacher whose data is one clip c names it from any x_t'. So at t' = .4 the distance of a student's
    clip s is .6 (s - c)^2, and its gradient 2 x .6 (s - c)."""
    csds = replace(TEACHER, t=TimeDistribution(low=0.4, high=0.4))
    method = replace(METHOD, inputs=inputs, csds=csds, adversarial_weight=0.0)

    def loss(offset, place):
        nets = {"generator": at(offset), "simulator": at(jax.lax.stop_gradient(offset)), "teacher": at(place)}
        return method.generator_loss(nets | SUM, BATCH, context())[0].mean()

    for place in (1.0, 3.5):
        value, grad = jax.jit(jax.value_and_grad(loss))(jnp.float32(2.0), place)
        assert float(value) == pytest.approx(2.5 * 0.6 * (2 - place) ** 2, rel=1e-3)
        assert float(grad) == pytest.approx(2.5 * 2 * 0.6 * (2 - place), rel=1e-3)


def test_the_distance_contracts_to_the_teachers_mean():
    """Fact 13 with ADD's weight: on N(m, S^2) the mean prediction is m + k (x - m), so the gradient's mean is
    2 c (1 - k) (x - m), with k = (1 - t)^2 S^2 / ((1 - t)^2 S^2 + t^2) and c = 1 - t."""
    m, s, t, x = 1.3, 0.7, 0.6, 3.0
    k = (1 - t) ** 2 * s**2 / ((1 - t) ** 2 * s**2 + t**2)
    assert k == pytest.approx(0.178832, abs=1e-6)

    def teacher(x_t, t, condition):
        t = expand(t, x_t)
        gap, variance = x_t - (1 - t) * m, (1 - t) ** 2 * s**2 + t**2
        return t * gap / variance - (m + (1 - t) * s**2 * gap / variance)

    clips = jnp.full((64, 4, 4, 4, 4), x)
    csds = replace(TEACHER, t=TimeDistribution(low=t, high=t))
    batch = make_batch((64, 4, 4, 4, 4))
    term = csds(clips, teacher, batch.condition, batch.unconditional, KEY, jnp.zeros(64))
    expected = 2 * (1 - t) * (1 - k) * (x - m)
    assert float((term.grad * 4**4).mean()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("t", "weight"), [(0.3, 1.0), (0.3, 2.0), (0.9, 1.0)])
def test_a_judges_gradient_reaches_a_clip_by_one_minus_t(t, weight):
    """D = sum of x_t: the gradient of -D at each value of x0 is -(1 - t), its norm (1 - t) sqrt(values)."""
    noise = DiscriminatorNoise(t=TimeDistribution(low=t, high=t))
    method = replace(METHOD, noise=noise, adversarial_weight=weight, csds=replace(TEACHER, weight=0.0))

    def loss(offset):
        nets = {"generator": at(offset), "teacher": at(0.0), **SUM}
        values, metrics = method.generator_loss(nets, BATCH, context())
        return values.mean(), metrics

    grad, metrics = jax.jit(jax.grad(loss, has_aux=True))(jnp.float32(2.0))
    size = BATCH.latents[0].size
    assert float(grad) == pytest.approx(-weight * (1 - t) * size, rel=1e-3)
    np.testing.assert_allclose(metrics["adv_grad"], weight * (1 - t) * size**0.5, rtol=1e-3)
    assert "csds" not in metrics and "adv_csds_ratio" not in metrics


def test_ladd_is_the_adversarial_term_alone_and_asks_the_teacher_for_features_only():
    found = calls(replace(METHOD, csds=replace(TEACHER, weight=0.0)), "generator_loss")
    assert found.order == [("generator", "velocity", "own"), ("backbone", "features", "own")]
    assert touched(evaluate(METHOD, METHOD.generator_loss)[2]) == {"generator"}


def test_the_noise_of_judged_clips_follows_their_size():
    """A logit-normal's translation moves its mean: 1 + log 5 - log a, with a = sqrt(values at 720p / values)."""
    small = (4000, 3, 6, 6, 16)
    t = np.asarray(RENOISED.t(jax.random.key(0), small), np.float64)
    logit = np.log(t / (1 - t))
    assert logit.mean() == pytest.approx(1 + np.log(5) - 0.5 * np.log(VALUES_720P / 1728), abs=0.08)
    assert logit.mean() == pytest.approx(-1.36, abs=0.08) and logit.std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("adversarial", ["hinge", "rpgan"])
def test_injected_gradients_equal_direct_ones(adversarial):
    """Eq. 2 written out as one differentiable function of the generator, with the method's own draws."""
    method = replace(METHOD, adversarial=adversarial)
    weights = weights_of(method)
    stopped = nets_of(method, jax.lax.stop_gradient(weights))
    keys = named_keys(KEY, "images", "generate", "noise", "csds")
    own = named_keys(keys.csds, "t", "noise")

    def direct(w):
        x0 = method.generate(nets_of(method, weights | {"generator": w}), BATCH, context(LATE), keys.generate)
        shown = method.noise(x0, BATCH.latents, keys.noise)
        features = stopped["teacher"].features
        logit = lambda x, t: stopped["heads"](features(x, t, BATCH.condition, (1,)))  # noqa: E731
        pair = logit(shown.real, shown.real_t), logit(shown.fake, shown.fake_t)
        t = ANY(own.t, x0.shape)
        noise = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(split(own.noise))
        x = (1 - expand(t, x0)) * x0 + expand(t, x0) * noise
        target = jax.lax.stop_gradient(predict_x0(stopped["teacher"], x, t, BATCH.condition))
        distance = (1 - t) * ((x0 - target) ** 2).mean(AXES)
        return (0.7 * LOSSES[adversarial].generator(*pair)[:, 0] + 2.5 * distance).mean()

    def split(key):
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))

    values, metrics, grads = evaluate(method, method.generator_loss, step=LATE)
    value, grad = jax.jit(jax.value_and_grad(direct))(weights["generator"])
    np.testing.assert_allclose(values.mean(), value, rtol=1e-4)
    np.testing.assert_allclose(grads["generator"], grad, rtol=1e-3, atol=1e-6)
    assert metrics["adv_csds_ratio"] == pytest.approx(metrics["adv_grad"] / metrics["csds_grad"], rel=1e-4)


@pytest.mark.parametrize("adversarial", ADVERSARIAL)
def test_a_step_of_the_heads_raises_real_minus_fake(adversarial):
    """Of logits near 0, at which a logistic loss has the same slope for both, too."""
    method = replace(METHOD, adversarial=adversarial, penalty=DifferencePenalty(weight=0.0))
    clips = replace(CLIPS, latents=CLIPS.latents * 0 + 1.5)
    assert_heads_learn(method, method.discriminator_loss, clips)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"shift": -1.0}, r"shift is -1\.0"),
        ({"pure_noise": 1.5}, r"ADD\.pure_noise is 1\.5, expected a number between 0 and 1"),
        ({"early_steps": -1}, r"ADD\.early_steps is -1, expected 0 or more"),
        ({"adversarial_weight": -1.0}, r"ADD\.adversarial_weight is -1\.0"),
        ({"disc_updates": 0}, r"ADD\.disc_updates is 0, expected 1 or more"),
        ({"disc_warmup": -1}, r"ADD\.disc_warmup is -1, expected 0 or more"),
        ({"ema": 1.0}, r"ADD\.ema is 1\.0"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        ADD(**fields)


@pytest.mark.parametrize("field", ["inputs", "adversarial", "init", "generator"])
def test_choices_are_named(field):
    with pytest.raises(UserError, match=rf"config\.method\.{field}: 'none' is not one of '"):
        make_method({"name": "add", field: "none"})
