"""DMD2: who is trained by what, on known distributions and networks, and every call of its two losses."""

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
    softplus,
    touched,
    weights_of,
)

from vpae_jax.flow.sampler import Sampler
from vpae_jax.flow.schedule import expand
from vpae_jax.flow.times import TimeDistribution
from vpae_jax.methods import make_method
from vpae_jax.methods.adversarial import LOSSES, DifferencePenalty, DiscriminatorNoise
from vpae_jax.methods.base import Adapters, Average, Context, Role, Student, View
from vpae_jax.methods.common import named_keys, predict_x0
from vpae_jax.methods.dmd2 import DMD2
from vpae_jax.methods.scores import SCORE_TIMES, DistributionMatching
from vpae_jax.types import UserError

ANY = TimeDistribution(low=0.2, high=0.9)
METHOD = DMD2(matching=DistributionMatching(t=ANY, guidance=3.0), fake_t=ANY, shift=2.0, adversarial_weight=0.7)
ONE, ALONE = replace(METHOD, steps=1), replace(METHOD, adversarial_weight=0.0, disc_weight=0.0)
CLIPS = make_batch((B, 3, 4, 4, 4))
DATA = np.asarray(CLIPS.latents)
AXES = (1, 2, 3, 4)
GRID = np.array([1, 6 / 7, 2 / 3, 0.4])  # 1, .75, .5, .25 shifted by 2


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def test_defaults():
    method = DMD2()
    assert method.roles == {
        "generator": Role("pretrained", trains=True, averages={"ema": Average(0.99)}),
        "teacher": Role("pretrained"),
        "fake_score": Role("pretrained", trains=True),
        "heads": Role("fresh", trains=True, part="heads"),
    }
    assert method.views == {"simulator": View("generator", constant=True)}
    assert [(u.trains, u.repeats, u.followers) for u in method.updates] == [
        (("fake_score", "heads"), 5, {}),
        (("generator",), 1, {}),
    ]
    assert method.matching == DistributionMatching(guidance=5.0) and method.fake_t == SCORE_TIMES
    assert method.student == Student("generator", Sampler.even(4, 5.0, solver="consistency"), average="ema")


def test_variants_are_data():
    assert DMD2(steps=1).student.sampler == Sampler("euler", (1.0, 0.0), 1.0)
    assert not DMD2(steps=1).views and not DMD2(inputs="noised_real").views
    low_rank = DMD2(fake="lora", fake_rank=4, fake_scale=2.0).roles["fake_score"]
    assert low_rank == Role("fresh", trains=True, adapters=Adapters("teacher", 4, 8.0))
    assert set(ALONE.roles) == {"generator", "teacher", "fake_score"}
    assert [u.trains for u in ALONE.updates] == [("fake_score",), ("generator",)]
    aligned = DMD2(ida=0.97)
    assert [u.followers for u in aligned.updates] == [{}, {"fake_score": 0.97}]


@pytest.mark.parametrize(
    "method",
    [
        METHOD,
        *(
            pytest.param(other, marks=pytest.mark.long)
            for other in (ONE, ALONE, replace(METHOD, disc_backbone="teacher"))
        ),
    ],
)
def test_each_update_trains_its_own_roles(method):
    """Zero gradient to all others, also through the earlier steps of the simulation."""
    values, metrics, grads = evaluate(method, method.generator_loss)
    assert values.shape == (B,) and touched(grads) == {"generator"}
    judged = {"adversarial", "adv_grad", "fake_logit", "adv_dmd_ratio"} if method.judged else set()
    assert set(metrics) == {"dmd_grad", "dmd_normaliser", "dmd_gap", "x0_mean_drift", "x0_std_ratio"} | judged
    values, _, grads = evaluate(method, method.fake_score_loss)
    assert values.shape == (B,) and touched(grads) == set(method.updates[0].trains)


# Every call. Without jit, so that loops run with numbers that can be written down.


def calls(method, loss, key=KEY):
    with jax.disable_jit():
        return record(method, getattr(method, loss), batch=CLIPS, key=key)


def keys_of_every_end(method):
    """A key for each number of earlier steps."""
    found = {}
    for number in range(40):
        key = jax.random.fold_in(KEY, number)
        found.setdefault(int(method.last(context(key=key))), key)
    assert len(found) == method.steps
    return found


def made(found):
    """Checks the calls that make a clip: those of the simulation, and the generator's. Returns the latter, and the
    noise of each."""
    *earlier, last = [call for call in found.calls if call.net in ("simulator", "generator")]
    assert found.calls[: len(earlier) + 1] == [*earlier, last]
    assert [call.net for call in earlier] == ["simulator"] * len(earlier) and last.net == "generator"
    noises = [(earlier or [last])[0].x]
    for step, call in enumerate([*earlier, last]):
        assert (call.kind, call.prompt) == ("velocity", "own")
        np.testing.assert_allclose(call.t, np.full(B, GRID[step]), rtol=1e-6)
        if step:
            noises.append(call.noise_from(earlier[step - 1].x0))
    return last, noises


@pytest.mark.parametrize("end", range(4))
def test_the_generator_of_several_steps(end):
    """Its own earlier steps, each noised afresh; three scores of the clip; the judge of the clip, noised again."""
    found = calls(METHOD, "generator_loss", keys_of_every_end(METHOD)[end])
    last, noises = made(found)
    assert len(noises) == end + 1
    assert found.order[end + 1 :] == [
        ("teacher", "velocity", "own"),
        ("teacher", "velocity", "negative"),
        ("fake_score", "velocity", "own"),
        ("fake_score", "features", "own"),
    ]
    *scored, seen = found.calls[end + 1 :]
    for call in scored[1:]:
        np.testing.assert_array_equal(call.x, scored[0].x)
        np.testing.assert_array_equal(call.t, scored[0].t)
    assert (seen.t != scored[0].t).all() and len(np.unique(seen.t)) == B == len(np.unique(scored[0].t))
    assert_independent(*noises, scored[0].noise_from(last.x0), seen.noise_from(last.x0))
    v_r, v_u, v_f = (call.v for call in scored)
    t = scored[0].t.reshape(-1, 1, 1, 1, 1)
    real, fake = scored[0].x - t * (v_u + 3.0 * (v_r - v_u)), scored[0].x - t * v_f
    g = (fake - real) / np.maximum(np.abs(last.x0 - real).mean(AXES, keepdims=True), 0.01)
    expected = 0.5 * (g**2).mean(AXES) + 0.7 * softplus(-logits_of(METHOD, seen, CLIPS))
    np.testing.assert_allclose(found.values, expected, rtol=1e-4)


@pytest.mark.parametrize("end", range(4))
def test_the_fake_score_and_the_heads(end):
    """One pass of the generated clip for both, and one of a real clip at the same times."""
    found = calls(METHOD, "fake_score_loss", keys_of_every_end(METHOD)[end])
    last, noises = made(found)
    assert found.order[end + 1 :] == [("fake_score", "both", "own"), ("fake_score", "features", "own")]
    seen, real = found.calls[end + 1 :]
    np.testing.assert_array_equal(seen.t, real.t)
    assert len(np.unique(seen.t)) == B
    noise = seen.noise_from(last.x0)
    assert_independent(*noises, noise, real.noise_from(DATA))
    error = ((seen.v - (noise - last.x0)) ** 2).mean(AXES)
    told_apart = softplus(logits_of(METHOD, seen, CLIPS)) + softplus(-logits_of(METHOD, real, CLIPS))
    np.testing.assert_allclose(found.values, error + 0.03 * told_apart, rtol=1e-4)


def test_alternatives_of_the_fake_scores_loss():
    one = calls(ONE, "fake_score_loss")
    shared = calls(replace(ONE, real_noise="shared"), "fake_score_loss")
    clip, seen, real = shared.calls
    np.testing.assert_allclose(seen.noise_from(clip.x0), real.noise_from(DATA), atol=1e-4)
    frozen = calls(replace(ONE, disc_backbone="teacher"), "fake_score_loss")
    assert frozen.order == [
        ("generator", "velocity", "own"),
        ("fake_score", "velocity", "own"),
        ("teacher", "features", "own"),
        ("teacher", "features", "own"),
    ]
    judged = calls(replace(ONE, disc_backbone="teacher"), "generator_loss")
    assert judged.order[-1] == ("teacher", "features", "own"), "the generator is judged as the heads are trained"
    np.testing.assert_array_equal(frozen.calls[1].x, frozen.calls[2].x)
    np.testing.assert_array_equal(frozen.calls[3].x, one.calls[2].x)
    clean = calls(replace(ONE, fake_loss="x0", adversarial_weight=0.0, disc_weight=0.0), "fake_score_loss")
    assert clean.order == [("generator", "velocity", "own"), ("fake_score", "velocity", "own")]
    np.testing.assert_allclose(clean.values, ((clean.calls[0].x0 - clean.calls[1].x0) ** 2).mean(AXES), rtol=1e-3)
    shaken = calls(replace(ONE, penalty=DifferencePenalty(1.0, "real", 0.1, 0.0)), "fake_score_loss").calls
    assert len(shaken) == 4
    assert abs(np.std(shaken[3].x - shaken[2].x) - 0.1) < 0.01, "the noised real clip is perturbed"


@pytest.mark.parametrize("loss", ["generator_loss", "fake_score_loss"])
def test_noised_real_clips(loss):
    """Each clip at one of the student's times, which is its own."""
    seen = set()
    for number in range(6):
        found = calls(replace(METHOD, inputs="noised_real"), loss, jax.random.fold_in(KEY, number))
        first, other = found.calls[:2]
        assert first.net == "generator"
        nearest = np.abs(first.t[:, None] - GRID).argmin(1)
        np.testing.assert_allclose(first.t, GRID[nearest], rtol=1e-6)
        assert_independent(first.noise_from(DATA), other.noise_from(first.x0))
        seen |= {tuple(nearest)}
    assert any(len(set(times)) > 1 for times in seen) and {i for times in seen for i in times} == {0, 1, 2, 3}


@pytest.mark.parametrize("inputs", ["simulated", "noised_real"])
def test_one_step_starts_from_pure_noise(inputs):
    found = calls(replace(ONE, inputs=inputs), "generator_loss")
    assert found.order[0] == ("generator", "velocity", "own") and found.order[1][0] == "teacher"
    np.testing.assert_array_equal(found.calls[0].t, 1)
    assert_independent(found.calls[0].x, found.calls[1].noise_from(found.calls[0].x0))


def test_pictures_are_withheld_from_all_networks_alike():
    pictures = {call.picture for call in calls(replace(METHOD, image_dropout=1.0), "generator_loss").calls}
    assert pictures == {(False,) * B}


def test_reported_gradients():
    """Norms of the weighted terms' gradients, values of the unweighted ones; the ratio is that of the norms."""
    one, more = (
        evaluate(method, method.generator_loss)[1] for method in (ONE, replace(ONE, adversarial_weight=3 * 0.7))
    )
    for name, factor in (("adv_grad", 3), ("adv_dmd_ratio", 3), ("dmd_grad", 1), ("adversarial", 1)):
        assert more[name] == pytest.approx(factor * one[name], rel=1e-4)
    assert one["adv_dmd_ratio"] == pytest.approx(one["adv_grad"] / one["dmd_grad"], rel=1e-4)


# The simulation.


def tells_its_time(x, t, condition):
    """A network whose clip is the time that it is told, everywhere."""
    return (x - expand(t, x)) / expand(t, x)


def test_the_last_step_is_shared_by_the_batch_and_any_of_them():
    method, nets = METHOD, {"generator": tells_its_time, "simulator": tells_its_time}

    @jax.jit
    def ends(key):
        clips = jax.random.split(jax.random.fold_in(key, 1), B)
        return method.generate(nets, BATCH, Context(jnp.int32(0), clips, key), clips)

    counts = np.zeros(4)
    for number in range(200):
        x0 = np.asarray(ends(jax.random.key(number)))
        found = np.abs(x0.reshape(-1, 1) - GRID).argmin(1)
        np.testing.assert_allclose(x0.ravel(), GRID[found], atol=1e-5)
        assert len(set(found)) == 1, "one for the whole batch"
        counts[found[0]] += 1
    assert (np.abs(counts - 50) < 25).all()


def test_compiling_takes_no_longer_for_more_steps():
    def size(steps):
        method = replace(METHOD, steps=steps)
        loss = lambda w: method.generator_loss(nets_of(method, w), BATCH, context())[0].mean()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(weights_of(method))).count("\n")

    assert size(40) <= size(3)


@pytest.mark.parametrize("end", [0, 3])
def test_only_the_last_evaluation_is_differentiated(end):
    """The gradient of the clip is that of the generator at the input that the simulation leads to."""
    key, weights = keys_of_every_end(METHOD)[end], weights_of(METHOD)
    own = jnp.asarray(np.random.default_rng(1).normal(size=DATA.shape), jnp.float32)

    def clip(w):
        nets = nets_of(METHOD, weights | {"generator": w})
        return (METHOD.generate(nets, CLIPS, context(key=key), key) * own).sum()

    with jax.disable_jit():
        recorded = record(METHOD, lambda nets, *_: (METHOD.generate(nets, CLIPS, context(key=key), key),), batch=CLIPS)
    last = recorded.calls[-1]

    def alone(w):
        net = nets_of(METHOD, weights | {"generator": w})["generator"]
        return (predict_x0(net, jnp.asarray(last.x), jnp.asarray(last.t), CLIPS.condition) * own).sum()

    assert len(recorded.calls) == end + 1
    found, expected = (jax.grad(f)(weights["generator"]) for f in (clip, alone))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


# Known distributions.


def at(offset):
    """The velocity of data that is one clip."""
    return lambda x, t, condition: (x - offset) / expand(t, x)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("inputs", ["simulated", "noised_real"])
def test_the_gradient_of_distribution_matching_is_known(steps, inputs):
    """Data at one place c, a student and its fake score at another: g = +-1 everywhere, so the loss is 1/2 and moves
    the student's place towards c, at a rate of 1."""
    method = replace(ALONE, matching=DistributionMatching(t=ANY, guidance=1.0), steps=steps, inputs=inputs)

    def loss(offset, place):
        nets = {"generator": at(offset), "simulator": at(jax.lax.stop_gradient(offset))}
        nets |= {"teacher": at(place), "fake_score": at(jax.lax.stop_gradient(offset))}
        return method.generator_loss(nets, BATCH, context())[0].mean()

    for place, sign in ((1.0, 1.0), (3.0, -1.0)):
        value, grad = jax.jit(jax.value_and_grad(loss))(jnp.float32(2.0), place)
        assert (float(value), float(grad)) == (pytest.approx(0.5, rel=1e-4), pytest.approx(sign, rel=1e-4))


def test_a_fake_score_that_knows_the_generator_has_no_diffusion_loss():
    """Fact 12: a generator of one clip, a fake score of the same one."""
    nets = {"generator": at(2.0), "simulator": at(2.0), "fake_score": at(2.0)}
    np.testing.assert_allclose(ALONE.fake_score_loss(nets, BATCH, context())[0], 0, atol=1e-8)
    away = {**nets, "fake_score": at(2.5)}
    clean = replace(ALONE, fake_loss="x0")
    np.testing.assert_allclose(clean.fake_score_loss(away, BATCH, context())[0], 0.25, rtol=1e-4)


def test_a_fake_score_equal_to_the_teacher_teaches_through_guidance_alone():
    weights = weights_of(ALONE)
    weights["fake_score"] = weights["teacher"]
    plain = replace(ALONE, matching=DistributionMatching(guidance=1.0))
    assert touched(evaluate(plain, plain.generator_loss, weights)[2]) == set()
    assert touched(evaluate(ALONE, ALONE.generator_loss, weights)[2]) == {"generator"}


@pytest.mark.parametrize("adversarial", ["ns_logistic", "rpgan"])
def test_injected_gradients_equal_direct_ones(adversarial):
    """Eq. 2 written out as one differentiable function of the generator, with the method's own draws."""
    method = replace(METHOD, adversarial=adversarial)
    weights = weights_of(method)
    stopped = nets_of(method, jax.lax.stop_gradient(weights))
    keys = named_keys(KEY, "images", "generate", "matching", "noise")

    def direct(w):
        x0 = method.generate(nets_of(method, weights | {"generator": w}), BATCH, context(), keys.generate)
        scores = stopped["teacher"], stopped["fake_score"], BATCH.condition, BATCH.unconditional
        g = method.matching(x0, *scores, keys.matching)[0].grad * x0[0].size
        matched = 0.5 * ((x0 - jax.lax.stop_gradient(x0 - g)) ** 2).mean(AXES)
        shown = DiscriminatorNoise(t=ANY)(x0, BATCH.latents, keys.noise)
        features = stopped["fake_score"].features
        logit = lambda x, t: stopped["heads"](features(x, t, BATCH.condition, (1,)))  # noqa: E731
        pair = logit(shown.real, shown.real_t), logit(shown.fake, shown.fake_t)
        return (matched + 0.7 * LOSSES[adversarial].generator(*pair)[:, 0]).mean()

    values, metrics, grads = evaluate(method, method.generator_loss)
    value, grad = jax.jit(jax.value_and_grad(direct))(weights["generator"])
    np.testing.assert_allclose(values.mean(), value, rtol=1e-4)
    np.testing.assert_allclose(grads["generator"], grad, rtol=1e-3, atol=1e-6)
    assert metrics["adv_dmd_ratio"] == pytest.approx(metrics["adv_grad"] / metrics["dmd_grad"], rel=1e-4)


def test_one_joint_loss_for_the_fake_score():
    """Its gradient is that of the diffusion loss plus w_D times the discriminator's, which is not 0; with the teacher's
    features it is that of the diffusion loss alone, and the heads still learn."""
    grads = {}
    for weight in (0.1, 0.2):
        method = replace(METHOD, disc_weight=weight)
        grads[weight] = evaluate(method, method.fake_score_loss)[2]
    alone = evaluate(ALONE, ALONE.fake_score_loss, weights_of(METHOD))[2]["fake_score"]
    told_apart = grads[0.2]["fake_score"] - grads[0.1]["fake_score"]
    assert np.abs(told_apart).max() > 1e-4
    np.testing.assert_allclose(grads[0.1]["fake_score"] - told_apart, alone, rtol=1e-3, atol=1e-5)
    frozen = replace(METHOD, disc_backbone="teacher")
    found = evaluate(frozen, frozen.fake_score_loss)[2]
    np.testing.assert_allclose(found["fake_score"], alone, rtol=1e-4, atol=1e-6)
    assert np.abs(found["heads"]).max() > 1e-4


@pytest.mark.parametrize("adversarial", ADVERSARIAL)
def test_a_step_of_the_heads_raises_real_minus_fake(adversarial):
    method = replace(ONE, adversarial=adversarial, disc_weight=1.0)
    clips = replace(CLIPS, latents=CLIPS.latents * 0 + 1.5)
    assert_heads_learn(method, method.fake_score_loss, clips)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"fake_updates": 0}, r"DMD2\.fake_updates is 0"),
        ({"adversarial_weight": -1.0}, r"DMD2\.adversarial_weight is -1.0"),
        (
            {"disc_weight": 0.0},
            r"DMD2\.adversarial_weight is 0.03 and disc_weight 0.0: .* set both above 0, or both to 0",
        ),
        ({"adversarial_weight": 0.0}, r"DMD2\.adversarial_weight is 0.0 and disc_weight 0.03"),
        ({"ida": 1.0}, r"DMD2\.ida is 1.0, expected a fraction below 1"),
        ({"ida": 0.97, "fake": "lora"}, r"DMD2\.ida is 0.97, but fake is 'lora': .* set fake='full', or ida=0"),
        ({"ida": 0.97, "generator": "lora"}, r"DMD2\.ida is 0.97, but generator is 'lora'"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        DMD2(**fields)


@pytest.mark.parametrize("field", ["inputs", "disc_backbone", "adversarial", "real_noise", "fake", "fake_loss"])
def test_choices_are_named(field):
    with pytest.raises(UserError, match=rf"config\.method\.{field}: 'none' is not one of '"):
        make_method({"name": "dmd2", field: "none"})
