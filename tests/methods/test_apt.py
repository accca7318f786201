"""APT and the settings of AAD-1 and AAPT: who is trained by what, every call of both losses, and known judges."""

import math
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
from oracles import Backbone, LinearHeads

from vpae_jax.flow.sampler import Sampler
from vpae_jax.flow.schedule import translate
from vpae_jax.flow.times import VALUES_720P, TimeDistribution
from vpae_jax.methods import make_method
from vpae_jax.methods.add import ADD
from vpae_jax.methods.adversarial import DifferencePenalty, DiscriminatorNoise
from vpae_jax.methods.apt import APT, CLEAN
from vpae_jax.methods.base import Adapters, Average, Role, Student
from vpae_jax.types import UserError

AAD = APT(
    noise=DiscriminatorNoise(t=TimeDistribution()),
    penalty=DifferencePenalty(20.0, "both", 0.05, 0.0, norm="fixed"),
    ema=0.98,
)
AAPT = APT(
    adversarial="rpgan",
    noise=DiscriminatorNoise("clean", TimeDistribution()),
    penalty=DifferencePenalty(1000.0, "both", 0.1, 0.0, norm="fixed"),
)
KINDS = [
    pytest.param(APT(), id="apt"),
    pytest.param(AAD, id="aad"),
    pytest.param(AAPT, id="aapt", marks=pytest.mark.long),
]
CLIPS = make_batch((B, 3, 4, 4, 4))
DATA = np.asarray(CLIPS.latents)
AXES = (1, 2, 3, 4)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def test_defaults():
    method = APT()
    assert method.roles == {
        "generator": Role("previous", trains=True, averages={"ema": Average(0.995)}),
        "heads": Role("fresh", trains=True, part="heads"),
        "backbone": Role("pretrained", trains=True),
    }
    assert not method.views, "no teacher takes part"
    assert [(u.trains, u.repeats, u.starts) for u in method.updates] == [
        (("heads", "backbone"), 1, 0),
        (("generator",), 1, 0),
    ]
    assert method.student == Student("generator", Sampler("euler", (1.0, 0.0), 1.0), average="ema")
    assert method.adversarial == "ns_logistic"
    assert method.noise == DiscriminatorNoise("clean", TimeDistribution(shift=12.0, stated_for=VALUES_720P))
    assert method.penalty == DifferencePenalty(100.0, "real", 0.1, 0.0, norm="fixed")


def test_variants_are_data():
    assert APT(init="pretrained").roles["generator"].start == "pretrained"
    generator, discriminator = APT(disc_updates=2, disc_warmup=5).updates[::-1]
    assert (discriminator.repeats, generator.starts, generator.delay) == (2, 5, "disc_warmup")
    low_rank = APT(generator="lora", generator_rank=4, generator_scale=2.0, init="pretrained").roles
    assert low_rank["generator"].adapters == Adapters("teacher", 4, 8.0) and low_rank["teacher"] == Role("pretrained")
    assert low_rank["backbone"] == Role("pretrained", trains=True)


@pytest.mark.parametrize("method", KINDS)
def test_each_update_trains_its_own_roles(method):
    """The discriminator as a whole by one loss, without a gradient to the generator; then the generator."""
    values, metrics, grads = evaluate(method, method.discriminator_loss)
    assert values.shape == (B,) and touched(grads) == {"heads", "backbone"}
    assert set(metrics) == {"real_logit", "fake_logit", "logit_gap", "accuracy", "adversarial", "penalty"}
    values, metrics, grads = evaluate(method, method.generator_loss)
    assert values.shape == (B,) and touched(grads) == {"generator"}
    assert set(metrics) == {"adversarial", "fake_logit", "adv_grad", "x0_mean_drift", "x0_std_ratio"}


def calls(method, loss, key=KEY):
    return record(method, getattr(method, loss), batch=CLIPS, key=key)


def test_the_discriminator():
    """Eq. 1: both clips as they are, told one time, and the real one once more, shaken."""
    found = calls(APT(), "discriminator_loss")
    assert found.order == [("generator", "velocity", "own")] + [("backbone", "features", "own")] * 3
    made, real, fake, shaken = found.calls
    np.testing.assert_array_equal(made.t, 1)
    np.testing.assert_array_equal(real.x, DATA)
    np.testing.assert_allclose(fake.x, made.x0, atol=1e-6)
    for call in (fake, shaken):
        np.testing.assert_array_equal(call.t, real.t)
    assert len(np.unique(real.t)) == B
    assert_independent(made.x, (shaken.x - real.x) / 0.1)
    r, f, s = (logits_of(APT(), call, CLIPS) for call in (real, fake, shaken))
    np.testing.assert_allclose(found.values, softplus(-r) + softplus(f) + 100 * (s - r) ** 2, rtol=1e-4)


def test_the_generator():
    """Eq. 2: one step from pure noise, judged as it is."""
    found = calls(APT(), "generator_loss")
    assert found.order == [("generator", "velocity", "own"), ("backbone", "features", "own")]
    made, seen = found.calls
    np.testing.assert_array_equal(made.t, 1)
    assert_independent(made.x)
    np.testing.assert_allclose(seen.x, made.x0, atol=1e-6)
    assert len(np.unique(seen.t)) == B
    np.testing.assert_allclose(found.values, softplus(-logits_of(APT(), seen, CLIPS)), rtol=1e-4)


def test_both_losses_of_aad():
    """Noised clips at one time with noise of their own, both shaken by draws of their own."""
    found = calls(AAD, "discriminator_loss")
    assert found.order == [("generator", "velocity", "own")] + [("backbone", "features", "own")] * 4
    made, real, fake, shaken_fake, shaken_real = found.calls
    for call in found.calls[2:]:
        np.testing.assert_array_equal(call.t, real.t)
    deltas = (shaken_fake.x - fake.x) / 0.05, (shaken_real.x - real.x) / 0.05
    assert_independent(made.x, real.noise_from(DATA), fake.noise_from(made.x0), *deltas)
    r, f, sf, sr = (logits_of(AAD, call, CLIPS) for call in (real, fake, shaken_fake, shaken_real))
    expected = softplus(-r) + softplus(f) + 20 * ((sf - f) ** 2 + (sr - r) ** 2)
    np.testing.assert_allclose(found.values, expected, rtol=1e-4)
    made, seen = calls(AAD, "generator_loss").calls
    assert_independent(made.x, seen.noise_from(made.x0))


def test_a_relative_loss_shows_the_generator_a_real_clip():
    found = calls(AAPT, "generator_loss")
    made, fake, real = found.calls
    np.testing.assert_allclose(fake.x, made.x0, atol=1e-6)
    np.testing.assert_array_equal(real.x, DATA)
    r, f = (logits_of(AAPT, call, CLIPS) for call in (real, fake))
    np.testing.assert_allclose(found.values, softplus(r - f), rtol=1e-4)


def test_the_update_and_its_successor_learn_from_different_noise():
    one, two = (calls(APT(), "discriminator_loss", jax.random.key(k)).calls[0].x for k in (0, 1))
    assert_independent(one, two)


def test_pictures_are_withheld_from_all_networks_alike():
    for loss in ("generator_loss", "discriminator_loss"):
        pictures = {call.picture for call in calls(APT(image_dropout=1.0), loss).calls}
        assert pictures == {(False,) * B}


def test_the_times_that_are_told():
    """Half of them above 12 x .5 / (1 + 11 x .5) = .923 at 720p; in smaller clips as high as hides as much."""
    shown = lambda noise, shape: noise(jnp.zeros(shape), jnp.zeros(shape), jax.random.key(0))  # noqa: E731
    shape = (4000, 2, 3, 3, 1)
    stated = np.asarray(shown(replace(CLEAN, t=replace(CLEAN.t, stated_for=None)), shape).fake_t)
    assert np.median(stated) == pytest.approx(12 / 13, abs=0.01) and stated.min() > 0
    moved = shown(CLEAN, shape)
    np.testing.assert_allclose(moved.fake_t, translate(jnp.asarray(stated), VALUES_720P, 18), rtol=1e-4)
    np.testing.assert_array_equal(moved.fake_t, moved.real_t)


# Known judges.


def nets_with(w, offset, shape=BATCH.latents.shape):
    """D = w . x as a backbone and heads."""
    judge = {"backbone": Backbone(weight=w), "heads": LinearHeads(math.prod(shape[1:]))}
    return {"generator": lambda x, t, condition: x - offset, **judge}


def test_the_gradient_of_a_linear_judge_is_known():
    """Eq. 2 at logit l: every value of x0 is moved by -sigmoid(-l) w; no factor 1 - t stands before it, since the clip
    is shown as it is."""
    w, size = 0.02, BATCH.latents[0].size

    def loss(offset):
        values, metrics = APT().generator_loss(nets_with(w, offset), BATCH, context())
        return values.mean(), metrics

    for offset in (-1.0, 2.0):
        logit = w * size * offset
        (value, metrics), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.float32(offset))
        slope = 1 / (1 + np.exp(logit))
        assert float(value) == pytest.approx(float(softplus(-logit)), rel=1e-4)
        assert float(grad) == pytest.approx(-slope * w * size, rel=1e-3)
        np.testing.assert_allclose(metrics["adv_grad"], slope * w * size**0.5, rtol=1e-3)


@pytest.mark.parametrize(("method", "expected"), [(APT(), 1.0), (AAD, 2 * 0.05), (AAPT, 2 * 10.0)])
def test_the_penalty_is_r1_by_its_weight_times_sigma_squared(method, expected):
    """(D(x + sigma n) - D(x))^2 of D = w . x is on average sigma^2 |w|^2: APT's 100 at .1 is R1 itself, AAD-1's 20 at
    .05 a twentieth of it on each side, AAPT's 1000 at .1 ten times."""
    shape = (4000, 2, 3, 3, 1)
    batch, w = make_batch(shape), jnp.asarray(np.random.default_rng(0).normal(size=shape[1:]), jnp.float32)

    def loss(weight):
        chosen = replace(method, penalty=replace(method.penalty, weight=weight))
        return float(chosen.discriminator_loss(nets_with(w, 0.3, shape), batch, context())[0].mean())

    assert loss(method.penalty.weight) - loss(0.0) == pytest.approx(expected * float((w**2).sum()), rel=0.08)


@pytest.mark.parametrize("method", KINDS)
def test_one_loss_trains_heads_and_backbone(method):
    """Its gradients are those of Eq. 1, written out as a function of both."""
    weights = weights_of(method)
    loss = method.discriminator_loss
    _, real, fake, *shaken = record(method, loss, batch=BATCH).calls
    sides = {"real": (real,), "both": (fake, real)}[method.penalty.on]

    def logit(net, heads, call):
        return heads(net.features(jnp.asarray(call.x), jnp.asarray(call.t), BATCH.condition, (1,)))[:, 0]

    def direct(trained):
        own = nets_of(method, weights | trained)
        of = lambda call: logit(own["backbone"], own["heads"], call)  # noqa: E731
        r, f = of(real), of(fake)
        told = jax.nn.softplus(f - r) if method.adversarial == "rpgan" else jax.nn.softplus(-r) + jax.nn.softplus(f)
        penalty = sum((of(moved) - of(still)) ** 2 for moved, still in zip(shaken, sides, strict=True))
        return (told + method.penalty.weight * penalty).mean()

    grads = evaluate(method, loss, weights)[2]
    expected = jax.jit(jax.grad(direct))({role: weights[role] for role in ("heads", "backbone")})
    for role, grad in expected.items():
        np.testing.assert_allclose(grads[role], grad, rtol=2e-3, atol=1e-4 * np.abs(grad).max())


@pytest.mark.parametrize("role", ["heads", "backbone"])
@pytest.mark.parametrize("method", KINDS)
def test_a_step_of_either_half_of_the_discriminator_raises_real_minus_fake(method, role):
    """Of logits near 0, at which a logistic loss has the same slope for both, too."""
    method = replace(method, penalty=DifferencePenalty(weight=0.0))
    clips = replace(CLIPS, latents=CLIPS.latents * 0 + 1.5)
    for seed in range(2):
        weights = weights_of(method, seed)
        weights["heads"] *= 0.01

        def loss(own, weights=weights):
            values, metrics = method.discriminator_loss(nets_of(method, weights | {role: own}), clips, context())
            return values.mean(), metrics["logit_gap"].mean()

        step = jax.jit(jax.grad(loss, has_aux=True))
        grad, before = step(weights[role])
        _, after = step(weights[role] - {"heads": 0.003, "backbone": 1.0}[role] * grad)
        assert after > before


def test_a_step_of_the_generator_raises_its_logit():
    weights = weights_of(APT())

    def loss(w):
        values, metrics = APT().generator_loss(nets_of(APT(), weights | {"generator": w}), BATCH, context())
        return values.mean(), metrics["fake_logit"].mean()

    step = jax.jit(jax.grad(loss, has_aux=True))
    grad, before = step(weights["generator"])
    assert step(weights["generator"] - 0.003 * grad)[1] > before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"disc_updates": 0}, r"APT\.disc_updates is 0, expected 1 or more"),
        ({"disc_warmup": -2}, r"APT\.disc_warmup is -2, expected 0 or more"),
        ({"ema": 1.5}, r"APT\.ema is 1\.5"),
        ({"image_dropout": -1.0}, r"APT\.image_dropout is -1\.0"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        APT(**fields)


@pytest.mark.parametrize("field", ["adversarial", "init", "generator"])
def test_choices_are_named(field):
    with pytest.raises(UserError, match=rf"config\.method\.{field}: 'none' is not one of '"):
        make_method({"name": "apt", field: "none"})


@pytest.mark.parametrize("cls", [APT, ADD])
def test_noise_that_tells_nothing_is_warned_about(cls):
    with pytest.warns(UserWarning, match=rf"{cls.__name__}\.noise\.kind is 'fig_literal': the noise level alone"):
        cls(noise=DiscriminatorNoise(kind="fig_literal"))
    with pytest.warns(UserWarning, match=rf"{cls.__name__}\.noise\.t is always 1: .* pure noise"):
        cls(noise=DiscriminatorNoise(t=TimeDistribution(low=1.0)))
    cls(noise=DiscriminatorNoise("clean", TimeDistribution(low=1.0)))  # the clip is there, whatever is told
