"""Both phases of V-PAE on small networks: who is trained, in which order, and by which gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import BATCH, KEY, SHAPE, B, context, evaluate, nets_of, touched, weights_of

from vpae_jax.flow import draws
from vpae_jax.flow.sampler import Sampler
from vpae_jax.flow.schedule import add_noise, expand
from vpae_jax.flow.times import VALUES_720P, TimeDistribution
from vpae_jax.methods.adversarial import LOSSES, DifferencePenalty, DiscriminatorNoise
from vpae_jax.methods.base import Adapters, Average, Role, Student, View
from vpae_jax.methods.common import named_keys, predict_x0
from vpae_jax.methods.scores import SCORE_TIMES, DistributionMatching, ScoreDistillation
from vpae_jax.methods.vpae import PhaseOne, PhaseTwo
from vpae_jax.types import UserError


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


# Phase one.

NOISED = PhaseOne(fake_updates=2)
# The paper's range, in these clips of few values too.
HIGH = TimeDistribution(low=0.9)


def test_paper_defaults_of_phase_one():
    method = PhaseOne()
    assert method.input == "noised_real" and method.t == TimeDistribution(low=0.9, stated_for=VALUES_720P)
    assert method.matching == DistributionMatching("x0_norm", guidance=5.0, floor=0.01)
    recipe = TimeDistribution(low=0.02, high=0.98, shift=5.0, clip=(0.02, 0.98), stated_for=VALUES_720P)
    assert method.matching.t == method.fake_t == recipe
    roles = method.roles
    assert roles["generator"] == Role("pretrained", trains=True, averages={"ema": Average(0.995)})
    assert roles["teacher"] == Role("pretrained")
    assert roles["fake_score"] == Role("fresh", trains=True, adapters=Adapters("teacher", 128, 64.0))
    assert [(u.name, u.every, u.repeats) for u in method.updates] == [("fake_score", 1, 5), ("generator", 1, 1)]
    assert method.student == Student("generator", Sampler("euler", (1.0, 0.0), 1.0), average="ema")


def test_ratio_order_and_full_fake_are_data():
    assert [(u.name, u.repeats) for u in NOISED.updates] == [("fake_score", 2), ("generator", 1)]
    every = PhaseOne(fake_updates=4, count="all").updates
    assert [(u.name, u.every, u.starts) for u in every] == [("fake_score", 1, 0), ("generator", 4, 3)]
    assert all(u.repeats == 1 for u in every)
    assert PhaseOne(fake="full").roles["fake_score"] == Role("pretrained", trains=True)
    assert PhaseOne(fake_rank=16, fake_scale=2.0).roles["fake_score"].adapters == Adapters("teacher", 16, 32.0)


def test_a_full_fake_score_may_be_aligned():
    """With the generator, after each of its updates, whatever the steps count."""
    assert [u.followers for u in PhaseOne().updates] == [{}, {}]
    for count in ("generator", "all"):
        updates = PhaseOne(fake="full", ida=0.97, count=count).updates
        assert [u.followers for u in updates] == [{}, {"fake_score": 0.97}]
    with pytest.raises(UserError, match=r"PhaseOne\.ida is 0.97, but fake is 'lora': .* set fake='full', or ida=0"):
        PhaseOne(ida=0.97)
    with pytest.raises(UserError, match=r"PhaseOne\.ida is 0.97, but generator is 'lora'"):
        PhaseOne(fake="full", ida=0.97, generator="lora")
    with pytest.raises(UserError, match=r"PhaseOne\.ida is -0.5, expected a fraction below 1"):
        PhaseOne(fake="full", ida=-0.5)


def test_a_low_rank_generator_shares_the_teacher():
    method = PhaseOne(generator="lora", generator_rank=8, generator_scale=1.0)
    assert method.roles["generator"] == Role(
        "fresh", trains=True, adapters=Adapters("teacher", 8, 8.0), averages={"ema": Average(0.995)}
    )
    assert set(method.roles) == {"generator", "teacher", "fake_score"}
    assert touched(evaluate(method, method.generator_loss)[2]) >= {"generator"}
    later = PhaseTwo(generator="lora", generator_rank=8, generator_scale=1.0).roles["generator"]
    assert later.start == "previous" and later.adapters == Adapters("teacher", 8, 8.0)


def test_the_generator_step_trains_the_generator_alone():
    values, metrics, grads = evaluate(NOISED, NOISED.generator_loss)
    assert values.shape == (B,) and touched(grads) == {"generator"}
    assert set(metrics) == {"dmd_grad", "dmd_normaliser", "dmd_gap", "x0_mean_drift", "x0_std_ratio"}
    assert all(np.isfinite(v) for v in metrics.values())


@pytest.mark.parametrize("space", ["velocity", "x0"])
def test_the_fake_step_trains_the_fake_score_alone(space):
    method = PhaseOne(fake_loss=space, fake="full")
    values, _, grads = evaluate(method, method.fake_score_loss)
    assert values.shape == (B,) and touched(grads) == {"fake_score"}


def test_a_fresh_fake_score_teaches_only_through_guidance():
    """LoRA B = 0: the fake score is the teacher, g = 0 iff w = 1."""
    weights = weights_of(NOISED)
    weights["fake_score"] = jnp.zeros_like(weights["fake_score"])
    plain = replace(NOISED, matching=DistributionMatching(guidance=1.0))
    assert touched(evaluate(plain, plain.generator_loss, weights)[2]) == set()
    assert touched(evaluate(NOISED, NOISED.generator_loss, weights)[2]) == {"generator"}


def gaussian(mean):
    def velocity(x, t, condition):
        t = expand(t, x)
        gain = (x - (1 - t) * mean) / ((1 - t) ** 2 * 0.49 + t**2)
        return t * gain - (mean + (1 - t) * 0.49 * gain)

    return velocity


@pytest.mark.parametrize("weighting", ["x0_norm", "none", "t2"])
def test_training_moves_the_generator_to_the_real_mean(weighting):
    """Fact 9's sign, end to end: a generator x0 = offset + .7 eps of a wrong mean is pulled to the teacher's."""
    high = replace(SCORE_TIMES, stated_for=None)
    method = PhaseOne(input="pure_noise", matching=DistributionMatching(weighting, high, guidance=1.0))

    def loss(offset, key):
        student = lambda x, t, condition: x - (offset + 0.7 * x)  # noqa: E731
        nets = {"generator": student, "teacher": gaussian(1.0), "fake_score": gaussian(offset)}
        return method.generator_loss(nets, BATCH, context(key=key))[0].mean()

    grad = jax.jit(jax.grad(loss))
    assert float(grad(jnp.float32(3.0), KEY)) > 0
    assert float(grad(jnp.float32(-1.0), KEY)) < 0
    offset = jnp.float32(3.0)
    for step in range(60):
        offset -= 0.5 * grad(offset, jax.random.fold_in(KEY, step))
    assert float(offset) == pytest.approx(1.0, abs=0.3)


def generated(method, step=0, latents=BATCH.latents):
    """(x, t) that the generator is shown."""
    seen = []

    def record(x, t, condition):
        seen.append((x, t))
        return x

    method.generate({"generator": record}, replace(BATCH, latents=latents), context(step), KEY)
    return np.asarray(seen[0][0]), np.asarray(seen[0][1])


def test_inputs_of_phase_one():
    paper = PhaseOne(t=HIGH)
    x, t = generated(paper)
    assert ((t > 0.9) & (t <= 1)).all() and len(np.unique(t)) == B
    moved, _ = generated(paper, latents=BATCH.latents + 1)
    np.testing.assert_allclose(moved - x, np.broadcast_to((1 - t).reshape(-1, 1, 1, 1, 1), SHAPE), atol=1e-5)
    x, t = generated(PhaseOne(input="pure_noise"))
    np.testing.assert_array_equal(t, 1)
    np.testing.assert_array_equal(generated(PhaseOne(input="pure_noise"), latents=BATCH.latents + 1)[0], x)
    assert (generated(PhaseOne(t=replace(HIGH, shift=5.0)))[1] > 0.978).all()


def test_annealing_widens_then_narrows_the_range():
    """From [.2, 1] at the start to [.9, 1] after 100 steps, with the same draw."""
    method = PhaseOne(input="anneal", t=HIGH, anneal_from=0.2, anneal_steps=100)
    u = (1 - generated(PhaseOne(t=HIGH))[1]) / 0.1
    for step, low in [(0, 0.2), (50, 0.55), (100, 0.9), (500, 0.9)]:
        np.testing.assert_allclose(generated(method, step)[1], 1 - (1 - low) * u, rtol=1e-4)


def test_images_are_withheld_everywhere_at_once():
    """Dropped images reach generator, scores and guidance alike."""
    seen = []

    def record(x, t, condition):
        seen.append(np.asarray(condition.frames))
        return x

    method = PhaseOne(image_dropout=1.0)
    method.generator_loss({"generator": record, "teacher": record, "fake_score": record}, BATCH, context())
    assert len(seen) == 4 and all((frames == 0).all() for frames in seen)


@pytest.mark.parametrize("method", [PhaseOne(ema=0.0), PhaseTwo(ema=0.0, backbone="online_sg")])
def test_without_an_average_the_weights_are_the_student(method):
    assert not method.roles["generator"].averages
    assert method.student.average is None


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: PhaseOne(fake_updates=0), "fake_updates"),
        (lambda: PhaseOne(fake_rank=0), "fake_rank"),
        (lambda: PhaseOne(image_dropout=2.0), "image_dropout"),
        (lambda: PhaseOne(ema=-1.0), r"PhaseOne\.ema"),
        (lambda: PhaseOne(generator_rank=0), r"PhaseOne\.generator_rank"),
        (lambda: PhaseOne(input="anneal", t=TimeDistribution("logit_normal")), r"PhaseOne\.t"),
        (lambda: PhaseTwo(disc_updates=0), "disc_updates"),
        (lambda: PhaseTwo(disc_warmup=-1), "disc_warmup"),
        (lambda: PhaseTwo(adversarial_weight=-1.0), "adversarial_weight"),
        (lambda: PhaseTwo(image_dropout=-0.5), "image_dropout"),
        (lambda: PhaseTwo(ema=0.0), r"PhaseTwo\.backbone is 'ema', but ema is 0"),
    ],
)
def test_bad_fields_are_named(make, field):
    with pytest.raises(UserError, match=field):
        make()


# Phase two.

FULL = DiscriminatorNoise(t=TimeDistribution())


def test_paper_defaults_of_phase_two():
    method = PhaseTwo()
    assert (method.adversarial, method.backbone, method.disc_updates, method.disc_warmup) == ("hinge", "ema", 1, 0)
    assert method.noise == DiscriminatorNoise("shared", method.noise.t, "noised")
    assert method.noise.t == TimeDistribution(low=0.9, high=0.999, stated_for=VALUES_720P)
    assert (method.csds.times, method.csds.t) == ("own", SCORE_TIMES)
    assert method.penalty == DifferencePenalty(1.0, "fake", 0.01, 0.1, "iid", "channel", "mean")
    assert (method.csds.weight, method.csds.guidance, method.csds.frames) == (10, 1, 0)
    assert (method.csds.reduction, method.csds.time_weight) == ("mean", "one")
    roles = method.roles
    assert set(roles) == {"generator", "teacher", "heads"}
    assert roles["generator"] == Role("previous", trains=True, averages={"ema": Average(0.995)})
    assert roles["heads"] == Role("fresh", trains=True, part="heads") and not roles["teacher"].trains
    assert method.views == {"backbone": View("generator", "ema")}
    assert method.student == Student("generator", Sampler("euler", (1.0, 0.0), 1.0), average="ema")
    assert [(u.name, u.repeats, u.starts) for u in method.updates] == [("heads", 1, 0), ("generator", 1, 0)]


def test_ratio_warmup_and_trained_backbone_are_data():
    updates = PhaseTwo(disc_updates=3, disc_warmup=50).updates
    assert [(u.name, u.repeats, u.starts) for u in updates] == [("heads", 3, 0), ("generator", 1, 50)]
    method = PhaseTwo(backbone="full_copy", disc_updates=2)
    assert [(u.trains, u.repeats) for u in method.updates] == [(("heads", "backbone"), 2), (("generator",), 1)]
    assert method.roles["backbone"] == Role("pretrained", trains=True) and not method.views
    assert PhaseTwo(init="pretrained").roles["generator"].start == "pretrained"


@pytest.mark.parametrize("kind", ["ema", "online_sg", "full_copy", "frozen_teacher"])
def test_each_step_trains_its_role_alone(kind):
    """Zero gradient to every frozen role, to the average, and, from the discriminator's step, to the generator."""
    method = PhaseTwo(backbone=kind, noise=FULL)
    trained = {"heads", "backbone"} if kind == "full_copy" else {"heads"}
    assert touched(evaluate(method, method.discriminator_loss)[2]) == trained
    # Heads and a trained backbone pass the gradient on; the update, which trains the generator, ignores theirs.
    assert touched(evaluate(method, method.generator_loss)[2]) == {"generator"}


@pytest.mark.parametrize(
    ("kind", "reads"),
    [("ema", "generator_ema"), ("online_sg", "generator"), ("full_copy", "backbone"), ("frozen_teacher", "teacher")],
)
def test_which_backbone_is_read(kind, reads):
    method = PhaseTwo(backbone=kind, noise=FULL, csds=ScoreDistillation(weight=0.0))
    weights = weights_of(method)
    base = evaluate(method, method.generator_loss)[1]["fake_logit"]
    for name in {"generator_ema", "backbone", "teacher"} & set(weights):
        changed = weights | {name: weights[name] + 0.5}
        moved = evaluate(method, method.generator_loss, changed)[1]["fake_logit"] != base
        assert moved == (name == reads)


def direct_loss(method, weights, stop_backbone=True):
    """Eq. 6 written out as one differentiable function of the generator, with the method's own draws."""
    nets = nets_of(method, weights)
    stopped = nets_of(method, jax.lax.stop_gradient(weights))
    keys = named_keys(KEY, "images", "generate", "noise", "csds")
    ones = jnp.ones(B)
    noise = draws.normal(keys.generate, SHAPE, jnp.float32)
    x0 = noise - nets["generator"](noise, ones, BATCH.condition)
    shown = method.noise(x0, BATCH.latents, keys.noise)
    backbone = (stopped if stop_backbone else nets)["backbone"]
    logit = lambda x, t: stopped["heads"](backbone.features(x, t, BATCH.condition, (1,)))  # noqa: E731
    real, fake = logit(shown.real, shown.real_t), logit(shown.fake, shown.fake_t)
    loss = LOSSES[method.adversarial].generator(real, fake)[:, 0]
    csds = named_keys(keys.csds, "t", "noise")
    t = method.csds.t(csds.t, SHAPE) if method.csds.times == "own" else shown.fake_t
    x = add_noise(x0, draws.normal(csds.noise, SHAPE), t)
    target = jax.lax.stop_gradient(predict_x0(stopped["teacher"], x, t, BATCH.condition))
    return method.adversarial_weight * loss + method.csds.weight * ((x0 - target) ** 2).mean((1, 2, 3, 4))


@pytest.mark.parametrize(
    ("kind", "adversarial", "times"),
    [
        ("ema", "hinge", "own"),
        ("ema", "rpgan", "discriminator"),
        ("online_sg", "pcm_hinge", "own"),
        ("full_copy", "literal", "own"),
    ],
)
def test_injected_gradients_equal_direct_ones(kind, adversarial, times):
    csds = ScoreDistillation(times=times)
    method = PhaseTwo(backbone=kind, noise=FULL, adversarial=adversarial, adversarial_weight=0.7, csds=csds)
    weights = weights_of(method)
    values, _, grads = evaluate(method, method.generator_loss)
    direct = direct_loss(method, weights)
    expected = jax.jit(jax.grad(lambda w: direct_loss(method, weights | {"generator": w}).mean()))(weights["generator"])
    np.testing.assert_allclose(values, direct, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads["generator"], expected, rtol=1e-3, atol=1e-6)


def test_trainable_backbone_adds_the_gradient_through_its_weights():
    with pytest.warns(UserWarning, match="blinding"):
        method = PhaseTwo(backbone="online_trainable", noise=FULL)
    weights = weights_of(method)
    _, metrics, grads = evaluate(method, method.generator_loss)
    whole = jax.jit(jax.grad(lambda w: direct_loss(method, weights | {"generator": w}, stop_backbone=False).mean()))
    np.testing.assert_allclose(grads["generator"], whole(weights["generator"]), rtol=1e-3, atol=1e-6)
    online = PhaseTwo(backbone="online_sg", noise=FULL)
    stopped = evaluate(online, online.generator_loss)[2]
    assert np.abs(grads["generator"] - stopped["generator"]).max() > 1e-4
    assert "csds_grad" in metrics and "adv_grad" not in metrics
    with pytest.warns(UserWarning, match="blinding"):
        alone = PhaseTwo(backbone="online_trainable", noise=FULL, csds=ScoreDistillation(weight=0.0))
    assert touched(evaluate(alone, alone.generator_loss)[2]) == {"generator", "heads"}


def test_the_distance_of_every_second_step():
    """Twice its weight on steps 2, 4, ...; the adversarial term alone on the others."""
    csds = ((3.0, 2), (0.0, 1), (6.0, 1))
    lazy, plain, twice = (PhaseTwo(noise=FULL, csds=ScoreDistillation(weight, every=k)) for weight, k in csds)
    for step, expected in ((0, plain), (1, twice), (2, plain)):
        values, metrics, grads = evaluate(lazy, lazy.generator_loss, step=step)
        wanted, _, moved = evaluate(expected, expected.generator_loss, step=step)
        np.testing.assert_allclose(values, wanted, rtol=1e-5)
        np.testing.assert_allclose(grads["generator"], moved["generator"], rtol=1e-4, atol=1e-7)
        assert all((metrics[name] > 0) == (expected is twice) for name in ("csds", "csds_grad", "adv_csds_ratio"))
    with pytest.raises(UserError, match=r"ScoreDistillation\.every is 0, expected 1 or more"):
        ScoreDistillation(every=0)


def test_pure_noise_gives_the_generator_no_adversarial_gradient():
    """At discriminator noise t = 1 the input does not depend on the generator."""
    with pytest.warns(UserWarning, match=r"PhaseTwo\.noise\.t is always 1: .* the generator learns nothing from it"):
        method = PhaseTwo(noise=DiscriminatorNoise(t=TimeDistribution(low=1.0)), csds=ScoreDistillation(weight=0.0))
    _, metrics, grads = evaluate(method, method.generator_loss)
    assert touched(grads) == set() and metrics["adv_grad"] == 0


def test_reported_gradients():
    """Norms with respect to x0 of a clip: they scale with the weights, and the ratio is theirs."""
    method = PhaseTwo(noise=FULL)
    metrics = evaluate(method, method.generator_loss)[1]
    assert metrics["adv_csds_ratio"] == pytest.approx(metrics["adv_grad"] / metrics["csds_grad"], rel=1e-4)
    scaled = replace(method, adversarial_weight=3.0, csds=ScoreDistillation(weight=5.0))
    more = evaluate(scaled, scaled.generator_loss)[1]
    assert more["adv_grad"] == pytest.approx(3 * metrics["adv_grad"], rel=1e-4)
    assert more["csds_grad"] == pytest.approx(0.5 * metrics["csds_grad"], rel=1e-4)
    for name in ("adversarial", "csds"):
        assert more[name] == pytest.approx(metrics[name], rel=1e-4), "values are those of the unweighted terms"
    without = replace(method, csds=ScoreDistillation(weight=0.0))
    alone = evaluate(without, without.generator_loss)[1]
    assert "csds_grad" not in alone and "adv_csds_ratio" not in alone
    for name in ("x0_mean_drift", "x0_std_ratio", "fake_logit", "adversarial"):
        assert np.isfinite(alone[name])


def test_high_noise_drowns_the_adversarial_term():
    """The factor 1 - t: the paper's range leaves a small fraction of the full range's gradient."""

    def ratio(noise):
        method = PhaseTwo(noise=noise)
        return evaluate(method, method.generator_loss)[1]["adv_grad"]

    low, high = TimeDistribution(low=0.1, high=0.5), TimeDistribution(low=0.9, high=0.999)
    assert ratio(DiscriminatorNoise(t=high)) < 0.3 * ratio(DiscriminatorNoise(t=low))


def test_the_generator_starts_from_pure_noise():
    seen = []

    def record(x, t, condition):
        seen.append((np.asarray(x), np.asarray(t)))
        return jnp.zeros_like(x)

    x0 = PhaseTwo().generate({"generator": record}, BATCH, context(), KEY)
    np.testing.assert_array_equal(seen[0][1], 1)
    np.testing.assert_array_equal(seen[0][0], x0)
    assert abs(np.corrcoef(np.ravel(x0), np.ravel(BATCH.latents))[0, 1]) < 0.5


def test_discriminator_metrics():
    method = PhaseTwo(noise=FULL)
    metrics = evaluate(method, method.discriminator_loss)[1]
    assert set(metrics) == {"real_logit", "fake_logit", "logit_gap", "accuracy", "adversarial", "penalty"}
    assert metrics["logit_gap"] == pytest.approx(metrics["real_logit"] - metrics["fake_logit"], abs=1e-5)
    without = PhaseTwo(noise=FULL, penalty=DifferencePenalty(weight=0.0))
    assert "penalty" not in evaluate(without, without.discriminator_loss)[1]


@pytest.mark.parametrize("adversarial", sorted(LOSSES))
def test_every_adversarial_loss_runs_in_both_steps(adversarial):
    method = PhaseTwo(adversarial=adversarial, noise=FULL)
    assert touched(evaluate(method, method.discriminator_loss)[2]) == {"heads"}
    assert touched(evaluate(method, method.generator_loss)[2]) == {"generator"}


@pytest.mark.parametrize(
    "changed",
    [
        {"penalty": DifferencePenalty(on="real")},
        {"penalty": DifferencePenalty(on="both")},
        {"penalty": DifferencePenalty(norm="sum")},
        {"penalty": DifferencePenalty(norm="fixed")},
        {"penalty": DifferencePenalty(spatial="shared")},
        {"penalty": DifferencePenalty(temporal="frame")},
        {"penalty": DifferencePenalty(temporal="iid")},
        {"noise": DiscriminatorNoise(kind="clean")},
        {"noise": DiscriminatorNoise(real="clean")},
        {"noise": DiscriminatorNoise(t=TimeDistribution(low=0.2, high=0.6))},
    ],
)
def test_alternatives_change_the_discriminator_s_loss(changed):
    base, other = (evaluate(m, m.discriminator_loss)[0] for m in (PhaseTwo(), PhaseTwo(**changed)))
    assert np.isfinite(other).all() and np.abs(other - base).max() > 1e-6


@pytest.mark.parametrize(
    "csds",
    [
        ScoreDistillation(times="discriminator"),
        ScoreDistillation(t=TimeDistribution(low=0.02, high=0.98)),
        ScoreDistillation(guidance=5.0),
        ScoreDistillation(reduction="sum"),
        ScoreDistillation(time_weight="one_minus_t"),
        ScoreDistillation(frames=1),
    ],
)
def test_alternatives_change_the_generator_s_loss(csds):
    base, other = (evaluate(m, m.generator_loss)[1]["csds"] for m in (PhaseTwo(), PhaseTwo(csds=csds)))
    assert np.isfinite(other) and abs(other - base) > 1e-6


def test_figure_literal_is_warned_about():
    with pytest.warns(UserWarning, match="noise level alone"):
        method = PhaseTwo(noise=DiscriminatorNoise(kind="fig_literal"))
    assert touched(evaluate(method, method.discriminator_loss)[2]) == {"heads"}
