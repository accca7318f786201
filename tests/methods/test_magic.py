"""MagicDistillation: two scores from one set of adapters, the ground truth's pull, and every call of its two losses."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import (
    BATCH,
    KEY,
    B,
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
from vpae_jax.methods.adversarial import DiscriminatorNoise
from vpae_jax.methods.base import Adapters, Average, Role, Student, View
from vpae_jax.methods.common import named_keys
from vpae_jax.methods.magic import Magic
from vpae_jax.methods.scores import SCORE_TIMES, DistributionMatching
from vpae_jax.types import UserError

ANY = TimeDistribution(low=0.2, high=0.9)
METHOD = Magic(
    matching=DistributionMatching(t=ANY, guidance=3.0), fake_t=ANY, noise=DiscriminatorNoise(t=ANY), truth_weight=0.5
)
ONE, ALONE = replace(METHOD, steps=1), replace(METHOD, adversarial_weight=0.0)
BARE = replace(ALONE, truth_weight=0.0)
CLIPS = make_batch((B, 3, 4, 4, 4))
DATA = np.asarray(CLIPS.latents)
AXES = (1, 2, 3, 4)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def test_defaults():
    method = Magic()
    assert method.roles == {
        "generator": Role("pretrained", trains=True, averages={"ema": Average(0.995)}),
        "teacher": Role("pretrained"),
        "fake_score": Role("fresh", trains=True, adapters=Adapters("teacher", 128, 64.0)),
        "heads": Role("fresh", trains=True, part="heads"),
    }
    assert method.views == {
        "real_score": View("fake_score", scale=0.25, constant=True),
        "backbone": View("generator", constant=True),
    }
    assert [(u.trains, u.repeats) for u in method.updates] == [(("fake_score", "heads"), 5), (("generator",), 1)]
    assert method.noise == DiscriminatorNoise(t=SCORE_TIMES) and method.inputs == "noised_real"
    assert method.student == Student("generator", Sampler.even(4, 5.0, solver="consistency"), average="ema")


def test_variants_are_data():
    assert Magic(steps=1).student.sampler == Sampler("euler", (1.0, 0.0), 1.0)
    assert Magic(weak=0.5).views["real_score"].scale == 0.5
    assert set(Magic(inputs="simulated").views) == {"simulator", "real_score", "backbone"}
    assert "heads" not in ALONE.roles and set(ALONE.views) == {"real_score"}
    assert [u.trains for u in ALONE.updates] == [("fake_score",), ("generator",)]


@pytest.mark.parametrize(
    "method",
    [
        METHOD,
        *(pytest.param(other, marks=pytest.mark.long) for other in (ONE, ALONE, replace(METHOD, inputs="simulated"))),
    ],
)
def test_each_update_trains_its_own_roles(method):
    """The weak score's adapters, the teacher and the generator's own features are constants."""
    values, metrics, grads = evaluate(method, method.generator_loss)
    assert values.shape == (B,) and touched(grads) == {"generator"}
    judged = {"adversarial", "adv_grad", "fake_logit"} if method.judged else set()
    common = {"dmd_grad", "dmd_normaliser", "dmd_gap", "x0_mean_drift", "x0_std_ratio", "truth", "truth_grad"}
    assert set(metrics) == common | judged
    values, _, grads = evaluate(method, method.fake_score_loss)
    # Adapters pass a gradient on to the teacher, which is in no update.
    assert values.shape == (B,) and touched(grads) == {"teacher", *method.updates[0].trains}


def calls(method, loss):
    with jax.disable_jit():
        return record(method, getattr(method, loss), batch=CLIPS)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_generator(steps):
    """Its clip, the weak score guided, the fake score, and the generator's own hidden states of the clip."""
    method = replace(METHOD, steps=steps, shift=2.0)
    found = calls(method, "generator_loss")
    assert found.order == [
        ("generator", "velocity", "own"),
        ("real_score", "velocity", "own"),
        ("real_score", "velocity", "negative"),
        ("fake_score", "velocity", "own"),
        ("backbone", "features", "own"),
    ]
    made, *scored, seen = found.calls
    for call in scored[1:]:
        np.testing.assert_array_equal(call.x, scored[0].x)
        np.testing.assert_array_equal(call.t, scored[0].t)
    if steps == 1:
        np.testing.assert_array_equal(made.t, 1)
    else:
        assert {round(float(t), 4) for t in made.t} <= {1.0, 0.8571, 0.6667, 0.4}
    assert_independent(made.noise_from(DATA), scored[0].noise_from(made.x0), seen.noise_from(made.x0))
    v_r, v_u, v_f = (call.v for call in scored)
    t = scored[0].t.reshape(-1, 1, 1, 1, 1)
    real, fake = scored[0].x - t * (v_u + 3.0 * (v_r - v_u)), scored[0].x - t * v_f
    terms = [(fake - to) / np.abs(made.x0 - to).mean(AXES, keepdims=True) for to in (real, DATA)]
    matching, truth = (0.5 * (g**2).mean(AXES) for g in terms)
    expected = matching + 0.5 * truth + 0.03 * softplus(-logits_of(method, seen, CLIPS))
    np.testing.assert_allclose(found.values, expected, rtol=1e-4)


def test_the_fake_score_and_the_heads():
    """The generator's clip, noised for the fake score, and noised again, beside a real one, for the heads."""
    found = calls(ONE, "fake_score_loss")
    assert found.order == [
        ("generator", "velocity", "own"),
        ("fake_score", "velocity", "own"),
        ("backbone", "features", "own"),
        ("backbone", "features", "own"),
    ]
    made, told, real, fake = found.calls
    np.testing.assert_array_equal(real.t, fake.t)
    noise = told.noise_from(made.x0)
    assert_independent(made.x, noise, real.noise_from(DATA), fake.noise_from(made.x0))
    error = ((told.v - (noise - made.x0)) ** 2).mean(AXES)
    told_apart = softplus(-logits_of(ONE, real, CLIPS)) + softplus(logits_of(ONE, fake, CLIPS))
    np.testing.assert_allclose(found.values, error + told_apart, rtol=1e-4)


def test_reported_gradients():
    """Norms of the weighted terms' gradients, and values of the unweighted terms."""
    changed = replace(ONE, truth_weight=2 * ONE.truth_weight, adversarial_weight=3 * ONE.adversarial_weight)
    one, more = (evaluate(method, method.generator_loss)[1] for method in (ONE, changed))
    for name, factor in (("truth_grad", 2), ("adv_grad", 3), ("dmd_grad", 1), ("truth", 1), ("adversarial", 1)):
        assert more[name] == pytest.approx(factor * one[name], rel=1e-4)


def test_the_two_halves_share_no_gradient():
    """The adapters learn what they would learn without heads, and the heads without adapters."""
    weights = weights_of(METHOD)
    both = evaluate(METHOD, METHOD.fake_score_loss, weights)[2]
    alone = evaluate(ALONE, ALONE.fake_score_loss, weights)[2]["fake_score"]
    np.testing.assert_allclose(both["fake_score"], alone, rtol=1e-4, atol=1e-6)
    moved = evaluate(METHOD, METHOD.fake_score_loss, weights | {"fake_score": 2 * weights["fake_score"]})[2]
    np.testing.assert_allclose(both["heads"], moved["heads"], rtol=1e-4, atol=1e-6)


def test_a_weak_scale_of_0_is_plain_distribution_matching():
    """With the teacher itself as the real score."""
    method = replace(BARE, weak=0.0)
    weights = weights_of(method)
    nets = nets_of(method, weights)
    keys = named_keys(KEY, "images", "generate", "matching", "noise")
    x0 = method.generate(nets, BATCH, context(), keys.generate)
    scores = nets["teacher"], nets["fake_score"], BATCH.condition, BATCH.unconditional
    expected = method.matching(x0, *scores, keys.matching)[0].value
    np.testing.assert_allclose(method.generator_loss(nets, BATCH, context())[0], expected, rtol=1e-5)
    with_weak = replace(method, weak=0.25)
    other = with_weak.generator_loss(nets_of(with_weak, weights), BATCH, context())[0]
    assert np.abs(other - expected).max() > 1e-3


def test_equal_scales_have_no_gradient_but_for_guidance():
    plain = replace(BARE, weak=1.0, matching=DistributionMatching(t=ANY, guidance=1.0))
    assert touched(evaluate(plain, plain.generator_loss)[2]) == set()
    guided = replace(BARE, weak=1.0)
    assert touched(evaluate(guided, guided.generator_loss)[2]) == {"generator"}


def test_the_weak_score_is_between_teacher_and_fake_score():
    """Of networks that are linear in their weights, the gap shrinks by 1 - a."""
    teacher, fake = 1.0, 3.0

    def gap(weak):
        between = teacher + weak * (fake - teacher)
        nets = {name: at(place) for name, place in (("generator", 2.0), ("real_score", between), ("fake_score", fake))}
        method = replace(BARE, weak=weak, matching=DistributionMatching("none", ANY, guidance=1.0))
        return method.generator_loss(nets, BATCH, context())[1]["dmd_gap"]

    for weak in (0.0, 0.25, 1.0):
        assert float(gap(weak)) == pytest.approx((1 - weak) * 2.0, abs=1e-4)


def at(offset):
    """The velocity of data that is one clip."""
    return lambda x, t, condition: (x - offset) / expand(t, x)


def test_the_ground_truth_pulls_towards_the_clip():
    """A student and its fake score at one place, the real clips at another: g of the truth is +-1, so that it adds
    w_reg / 2 and moves the student towards the clips at a rate of w_reg; distribution matching does not move it."""
    method = replace(ALONE, steps=1, truth_weight=0.7, matching=DistributionMatching(t=ANY, guidance=1.0))

    def loss(offset, place):
        still = at(jax.lax.stop_gradient(offset))
        nets = {"generator": at(offset), "real_score": still, "fake_score": still}
        batch = replace(BATCH, latents=jnp.full_like(BATCH.latents, place))
        return method.generator_loss(nets, batch, context())[0].mean()

    for place, sign in ((1.0, 1.0), (3.0, -1.0)):
        value, grad = jax.jit(jax.value_and_grad(loss))(jnp.float32(2.0), place)
        assert (float(value), float(grad)) == (pytest.approx(0.35, rel=1e-4), pytest.approx(0.7 * sign, rel=1e-4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weak": 1.5}, r"Magic\.weak is 1.5, expected a number between 0 and 1"),
        ({"truth_weight": -1.0}, r"Magic\.truth_weight is -1.0"),
        ({"adversarial_weight": -1.0}, r"Magic\.adversarial_weight is -1.0"),
        ({"fake_rank": 0}, r"Magic\.fake_rank is 0"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        Magic(**fields)


def test_it_has_no_other_fake_score():
    for field in ("fake", "ida"):
        with pytest.raises(UserError, match=rf"config\.method\.{field}: unknown key"):
            make_method({"name": "magic", field: "full"})
