"""Phased consistency distillation on networks and distributions whose answers are known."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import (
    BATCH,
    KEY,
    SHAPE,
    B,
    assert_independent,
    context,
    evaluate,
    make_batch,
    record,
    touched,
    weights_of,
)
from oracles import Backbone, LinearHeads, constant, gaussian, state

from vpae_jax.config import parse
from vpae_jax.configs import pcm
from vpae_jax.configs.common import PRESETS
from vpae_jax.flow.sampler import Sampler
from vpae_jax.flow.schedule import expand, unshift
from vpae_jax.flow.times import Phased, TimeDistribution
from vpae_jax.methods import make_method
from vpae_jax.methods.base import Adapters, Role, Student, View
from vpae_jax.methods.common import named_keys
from vpae_jax.methods.pcm import PCM, renoise_as_code
from vpae_jax.types import UserError

GRID = TimeDistribution(kind="grid", points=12, shift=2.0)
FULL = PCM(t=GRID, phases=3, generator="full")
ALONE = replace(FULL, adversarial_weight=0.0)
LARGE = make_batch((3, 4, 6, 6, 4))
DATA = np.asarray(LARGE.latents)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def test_defaults():
    method = PCM()
    assert method.t == TimeDistribution(kind="grid", points=100, shift=5.0) and method.phases == 4
    assert method.roles == {
        "generator": Role("fresh", True, adapters=Adapters("teacher", 32, 8.0)),
        "teacher": Role("pretrained"),
        "heads": Role("fresh", True, part="heads"),
    }
    assert method.views == {"target": View("generator", constant=True)}
    assert [(u.name, u.every, u.repeats, u.starts) for u in method.updates] == [
        ("heads", 1, 1, 0),
        ("generator", 1, 1, 0),
    ]
    times = pytest.approx((1, 0.9375, 0.833333, 0.625, 0), abs=1e-6)
    assert (method.student.view, method.student.average, method.student.low) == ("generator", None, None)
    assert (method.student.sampler.solver, method.student.sampler.times) == ("euler", times)
    assert (method.guidance, method.huber, method.adversarial_weight) == (4.0, 0.001, 0.1)


def test_a_full_student_and_an_average():
    method = PCM(generator="full", ema=0.9)
    assert method.roles["generator"].adapters is None and set(method.roles["generator"].averages) == {"ema"}
    assert method.student.average == "ema"


def test_one_phase_is_one_euler_step():
    assert PCM(phases=1).student == Student("generator", Sampler("euler", (1.0, 0.0), 1.0), average=None)


@pytest.mark.parametrize("phases", [1, 2, 3, 7, 12])
def test_the_student_is_sampled_where_its_phases_end(phases):
    """Also where the phases are not all as long: else a step would lead past the end that it was trained for."""
    method = replace(FULL, phases=phases)
    times = GRID.phased(KEY, (4000, 1), phases)
    ends = np.unique(np.asarray(times.end))[::-1]
    sampled = method.student.sampler.times
    np.testing.assert_allclose(sampled, [1, *ends], atol=1e-6)
    after = np.array([max(end for end in sampled if end < t - 1e-6) for t in np.asarray(times.t)])
    np.testing.assert_allclose(times.end, after, atol=1e-6)


def test_each_step_trains_its_role_alone():
    """Zero gradient to the teacher, which is the judge too, and from either update to the other's role."""
    assert touched(evaluate(FULL, FULL.discriminator_loss)[2]) == {"heads"}
    values, metrics, grads = evaluate(FULL, FULL.generator_loss)
    assert values.shape == (B,) and touched(grads) == {"generator"}
    assert set(metrics) == {
        *("x0_mean_drift", "x0_std_ratio", "teacher_gap", "consistency_gap", "consistency", "consistency_grad"),
        *("adversarial", "adv_grad", "adv_consistency_ratio", "fake_logit"),
    }
    assert metrics["adv_grad"] > 0 and metrics["consistency_grad"] > 0


def test_without_a_judge_there_is_consistency_alone():
    assert set(ALONE.roles) == {"generator", "teacher"} and [u.name for u in ALONE.updates] == ["generator"]
    values, metrics, grads = evaluate(ALONE, ALONE.generator_loss)
    assert touched(grads) == {"generator"} and "adversarial" not in metrics
    assert values.mean() == pytest.approx(metrics["consistency"], rel=1e-5)


def test_no_gradient_through_the_target():
    """d L / d theta is that of the first jump alone."""
    weights = weights_of(ALONE)

    class Apart(PCM):
        @property
        def roles(self):
            return {**super().roles, "target": Role("pretrained")}

        @property
        def views(self):
            return {}

    apart = Apart(t=GRID, phases=3, generator="full", adversarial_weight=0.0)
    grads = evaluate(ALONE, ALONE.generator_loss, weights)[2]
    stopped = evaluate(apart, apart.generator_loss, weights | {"target": weights["generator"]})[2]
    np.testing.assert_allclose(grads["generator"], stopped["generator"], rtol=1e-5)


@pytest.mark.parametrize("phases", [1, 3, 4])
def test_data_that_is_one_clip_is_consistent(phases):
    """Fact 12: v = (x - c) / t maps every point of a path to c + e (eps - c), and so does each Euler step: loss 0."""
    clip = BATCH.latents
    exact = lambda x, t, condition: (x - clip) / jnp.maximum(expand(t, x), 1e-9)  # noqa: E731
    method = replace(ALONE, phases=phases, guidance=1.0)
    values, metrics = method.generator_loss(dict.fromkeys(("generator", "target", "teacher"), exact), BATCH, context())
    np.testing.assert_allclose(values, 0, atol=1e-5)
    np.testing.assert_allclose(metrics["consistency_gap"], 0, atol=1e-4)
    np.testing.assert_allclose(metrics["teacher_gap"], 0, atol=1e-4)


def test_the_flow_of_a_gaussian_is_consistent_in_each_phase():
    """Fact 11, to the phase's end: the targets differ by the Euler step's error, which falls with its square."""
    gaps = {}
    for points in (40, 80, 160):
        method = replace(ALONE, t=TimeDistribution("grid", points=points), phases=4, guidance=1.0)

        def student(x, t, condition):
            end = jnp.clip(jnp.ceil(t * 4 - 1e-3) - 1, 0, 3) / 4
            t, end = expand(t, x), expand(end, x)
            away = jnp.abs(end - t) > 1e-4
            return jnp.where(away, (state(x, t, end) - x) / jnp.where(away, end - t, 1.0), 0.0)

        nets = {"generator": student, "target": student, "teacher": gaussian}
        gaps[points] = float(np.mean(method.generator_loss(nets, LARGE, context())[1]["consistency_gap"]))
    assert gaps[40] < 0.01
    assert gaps[40] / gaps[80] == pytest.approx(4, rel=0.5) and gaps[80] / gaps[160] == pytest.approx(4, rel=0.5)


def test_guidance_moves_the_target_alone():
    methods = ALONE, replace(ALONE, guidance=1.0)
    base, unguided = (evaluate(method, method.generator_loss)[1] for method in methods)
    assert unguided["consistency_gap"] != base["consistency_gap"]
    assert unguided["x0_std_ratio"] == base["x0_std_ratio"]


TIMES = Phased(*(jnp.full(3, t, jnp.float32) for t in (0.9, 0.85, 0.6, 0.8)))


def shown(method, fake, real, times=TIMES):
    return method.shown(fake, real, times, KEY)


def test_the_codes_renoising_has_too_little_noise():
    """From e = .6 to a = .8 of pure noise at .6: .34 instead of the path's .64."""
    eps = 0.6 * jax.random.normal(jax.random.key(3), (3, 20, 20, 20, 4))
    exact, code = (np.asarray(shown(replace(FULL, renoise=kind), eps, eps).fake) for kind in ("exact", "code"))
    assert exact.var() == pytest.approx(0.64, rel=0.02) and code.var() == pytest.approx(0.34, rel=0.02)
    x, noise = jnp.zeros(SHAPE), jnp.ones(SHAPE)
    end, t = jnp.full(3, 0.6), jnp.full(3, 0.8)
    np.testing.assert_allclose(renoise_as_code(x, noise, end, t), 0.5 * np.ones(SHAPE), rtol=1e-5)
    np.testing.assert_allclose(renoise_as_code(noise, x, end, t), 0.5 * np.ones(SHAPE), rtol=1e-5)


def test_both_renoisings_are_one_from_a_clip():
    times = TIMES._replace(end=jnp.zeros(3))
    one, other = (
        shown(replace(FULL, renoise=kind), BATCH.latents, -BATCH.latents, times) for kind in ("exact", "code")
    )
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_at_the_end_itself_nothing_is_added():
    times = TIMES._replace(inside=TIMES.end)
    for kind in ("exact", "code"):
        found = shown(replace(FULL, renoise=kind), BATCH.latents, -BATCH.latents, times)
        np.testing.assert_allclose(found.fake, BATCH.latents, atol=1e-6)
        np.testing.assert_allclose(found.real, -BATCH.latents, atol=1e-6)


def test_the_two_sides_share_their_time_and_not_their_noise():
    clean = jnp.zeros_like(LARGE.latents)
    found = shown(FULL, clean, clean)
    np.testing.assert_array_equal(found.fake_t, found.real_t)
    np.testing.assert_array_equal(found.fake_t, TIMES.inside)
    assert_independent(found.fake / 0.741620, found.real / 0.741620)


@pytest.mark.parametrize("kind", ["exact", "code"])
@pytest.mark.parametrize(("bias", "inside"), [(0.0, True), (50.0, False)])
def test_the_adversarial_gradient_reaches_the_jump_through_the_signal_that_is_left(kind, bias, inside):
    """-lambda w (1 - a) / (1 - e) / N inside the hinge, whichever the renoising; nothing beyond it."""
    method, still = replace(FULL, renoise=kind), constant(0.0)
    nets = {"generator": still, "target": still, "teacher": Backbone(), "heads": LinearHeads(0.01, bias)}
    metrics = method.generator_loss(nets, BATCH, context())[1]
    times = method.t.phased(named_keys(KEY, "images", "t", "noise", "judged").t, SHAPE, method.phases)
    kept = (1 - times.inside) / (1 - times.end)
    expected = 0.1 * 0.01 * kept / np.sqrt(BATCH.latents[0].size) if inside else np.zeros(B)
    np.testing.assert_allclose(metrics["adv_grad"], expected, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(metrics["adversarial"], 1 - metrics["fake_logit"][:, 0] if inside else 0, rtol=1e-5)


def test_the_discriminator_loss_of_constant_logits():
    """Hinge: logits (r, f) = (.25, .25) cost .75 + 1.25 whatever is shown."""
    nets = {"generator": constant(0.0), "target": constant(0.0), "teacher": Backbone(), "heads": LinearHeads(0.0, 0.25)}
    values, metrics = FULL.discriminator_loss(nets, BATCH, context())
    np.testing.assert_allclose(values, 2.0, rtol=1e-6)
    assert float(metrics["logit_gap"]) == 0 and "penalty" not in metrics


def test_a_step_of_the_discriminator_tells_targets_from_jumps():
    """The sign: real are targets, and a step of the heads raises their logits over those of the student's."""
    high = replace(FULL, t=TimeDistribution("grid", points=12), phases=1)
    networks = {"generator": constant(0.0), "target": constant(-40.0), "teacher": Backbone()}

    def loss(weight, key):
        nets = {**networks, "heads": LinearHeads(weight)}
        values, metrics = high.discriminator_loss(nets, LARGE, context(key=key))
        return values.mean(), metrics["logit_gap"]

    (_, before), grad = jax.value_and_grad(loss, has_aux=True)(jnp.float32(0.0), KEY)
    assert float(grad) < 0, "targets lie higher than jumps: their weight has to rise"
    assert float(loss(-0.1 * grad, KEY)[1]) > float(before)


def judged_calls(found):
    return [call for call in found.calls if call.kind == "features"]


def add_noise(x0, noise, t):
    t = np.asarray(t).reshape(-1, 1, 1, 1, 1)
    return (1 - t) * x0 + t * noise


def check_jumps(found):
    """The noised clips, the guided step, and both jumps to the end of one phase; returns the calls and the ends."""
    told, unguided, target, student = found.calls[:4]
    assert found.order[:4] == [
        ("teacher", "velocity", "own"),
        ("teacher", "velocity", "negative"),
        ("target", "velocity", "own"),
        ("generator", "velocity", "own"),
    ]
    for call in (unguided, student):
        np.testing.assert_array_equal(call.x, told.x)
        np.testing.assert_array_equal(call.t, told.t)
    raw, before = (unshift(call.t, 2.0) * 12 for call in (told, target))
    np.testing.assert_allclose(raw - before, 1, atol=1e-4)
    np.testing.assert_allclose(np.round(raw), raw, atol=1e-4)
    v = unguided.v + 4.0 * (told.v - unguided.v)
    np.testing.assert_allclose(target.x, told.x + (target.t - told.t).reshape(-1, 1, 1, 1, 1) * v, atol=1e-5)
    number = np.ceil(np.round(raw) / 4) - 1
    end = 4 * number / 12
    end = 2 * end / (1 + end)
    return told, target, student, end


def jumped(call, end):
    return call.x + (end - call.t).reshape(-1, 1, 1, 1, 1) * call.v


@pytest.mark.parametrize("kind", ["exact", "code"])
def test_calls_of_the_discriminator(kind):
    """Both ends of a pair of jumps, noised on to one time of their phase, each with noise of its own."""
    method = replace(FULL, renoise=kind)
    found = record(method, method.discriminator_loss, batch=LARGE)
    told, target, student, end = check_jumps(found)
    assert found.order[4:] == [("teacher", "features", "own")] * 2
    real, fake = judged_calls(found)
    np.testing.assert_array_equal(real.t, fake.t)
    inside = unshift(real.t, 2.0) * 12
    start = np.round(unshift(end, 2.0) * 12)
    np.testing.assert_allclose(inside, np.round(inside), atol=1e-4)
    assert (np.round(inside) >= start).all() and (np.round(inside) < start + 4).all()
    noises = [noise_of(real, jumped(target, end), end, kind), noise_of(fake, jumped(student, end), end, kind)]
    moved = [n for n in noises if n.size]
    assert_independent(told.noise_from(DATA), *moved)


def noise_of(call, x, end, kind):
    """The noise that leads from x at `end` to what a call shows, of clips that were moved."""
    rows = call.t > end + 1e-4
    t, end = (np.asarray(one)[rows].reshape(-1, 1, 1, 1, 1) for one in (call.t, end))
    kept = (1 - t) / (1 - end)
    scale = np.sqrt(t**2 - kept**2 * end**2) if kind == "exact" else (t - end) / (1 - end)
    return (call.x[rows] - kept * x[rows]) / scale


def test_calls_of_the_generator():
    found = record(FULL, FULL.generator_loss, batch=LARGE)
    told, target, student, end = check_jumps(found)
    assert found.order[4:] == [("teacher", "features", "own")]
    (fake,) = judged_calls(found)
    moved = noise_of(fake, jumped(student, end), end, "exact")
    assert_independent(told.noise_from(DATA), moved)
    alone = record(ALONE, ALONE.generator_loss, batch=LARGE)
    assert alone.order == found.order[:4]
    error = jumped(student, end) - jumped(target, end)
    distance = (np.sqrt(error**2 + 1e-6) - 1e-3).mean((1, 2, 3, 4))
    np.testing.assert_allclose(alone.values, distance, rtol=1e-3)


def test_pictures_are_withheld_from_all_networks_alike():
    method = replace(FULL, image_dropout=0.5)
    seen = set()
    for loss in (method.discriminator_loss, method.generator_loss):
        for step in range(4):
            found = record(method, loss, batch=LARGE, key=jax.random.key(step))
            seen |= {pictures := found.calls[0].picture}
            assert all(call.picture == pictures for call in found.calls)
    assert len({picture for pictures in seen for picture in pictures}) == 2


def test_training_makes_a_phase_a_map_of_the_flow():
    """A student that is affine in x at each point of two phases learns to jump where the teacher's Euler steps lead."""
    points, phases = 8, 2
    method = replace(ALONE, t=TimeDistribution("grid", points=points), phases=phases, guidance=1.0, huber=1.0)
    clips = replace(LARGE, latents=1.3 + 0.7 * LARGE.latents)

    def net(w):
        def velocity(x, t, condition):
            row = w[jnp.round(t * points).astype(jnp.int32)]
            return row[:, :1, None, None, None] + row[:, 1:, None, None, None] * x

        return velocity

    @jax.jit
    def step(w, key):
        def loss(w):
            nets = {"generator": net(w), "target": net(jax.lax.stop_gradient(w)), "teacher": gaussian}
            return method.generator_loss(nets, clips, context(key=key))[0].mean()

        return w - 2.0 * jax.grad(loss)(w)

    w = jnp.zeros((points + 1, 2))
    for number in range(2000):
        w = step(w, jax.random.fold_in(KEY, number))
    x = jnp.linspace(-1.0, 2.0, 7).reshape(-1, 1, 1, 1, 1)
    for start, end in ((1.0, 0.5), (0.5, 0.0)):
        along = x
        for t in jnp.linspace(start, end, 5)[:-1]:
            along = along - gaussian(along, jnp.full(7, t), None) / points
        once, jumped = (x + (end - start) * v(x, jnp.full(7, start), None) for v in (gaussian, net(w)))
        np.testing.assert_allclose(jumped, along, atol=0.06)
        assert np.abs(once - along).max() > 0.15


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"t": TimeDistribution()}, r"PCM\.t is not a whole grid; set kind='grid'"),
        ({"t": replace(GRID, low=0.5)}, r"PCM\.t is not a whole grid"),
        ({"t": replace(GRID, clip=(0.0, 0.9))}, r"PCM\.t is not a whole grid"),
        ({"t": replace(GRID, stated_for=7)}, r"PCM\.t\.stated_for is 7, but the student is sampled at the same time"),
        ({"phases": 0}, r"PCM\.phases are 0, expected 1 to 100"),
        ({"phases": 101}, r"PCM\.phases are 101, expected 1 to 100"),
        ({"huber": 0.0}, r"PCM\.huber is 0.0"),
        ({"guidance": -1.0}, r"PCM\.guidance"),
        ({"adversarial_weight": -0.1}, r"PCM\.adversarial_weight"),
        ({"ema": 1.0}, r"PCM\.ema is 1.0"),
        ({"generator_rank": 0}, r"PCM\.generator_rank"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        PCM(**fields)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    """The code's values for SD3 at Wan's shift; heads on every block."""
    experiment = parse(pcm.get_config(preset))
    method, heads = make_method(experiment.method), experiment.networks["heads"]
    layers = {"tiny": 6, "t2v-1.3b-480p": 30}.get(preset, 40)
    assert heads["kind"] == "conv" and heads["taps"] == tuple(range(1, layers + 1))
    assert method.student.sampler.steps == 4
    if preset != "tiny":
        assert method == PCM(t=replace(PCM().t, shift=3.0 if preset.endswith("480p") else 5.0))
        generator, judge = experiment.optimizers["generator"], experiment.optimizers["heads"]
        assert (generator.learning_rate, generator.b1, generator.b2) == (5e-6, 0.9, 0.999)
        assert (judge.learning_rate, judge.b1, judge.b2) == (1e-5, 0.0, 0.999)
        assert {(o.weight_decay, o.clip_norm) for o in (generator, judge)} == {(1e-3, 1.0)}
