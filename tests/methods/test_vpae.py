"""Both phases of V-PAE on small networks: who is trained, in which order, and by which gradients."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpae_jax.flow import draws
from vpae_jax.flow.schedule import add_noise, expand
from vpae_jax.flow.times import VALUES_720P, TimeDistribution
from vpae_jax.methods.adversarial import LOSSES, DifferencePenalty, DiscriminatorNoise
from vpae_jax.methods.common import named_keys, predict_x0
from vpae_jax.methods.scores import SCORE_TIMES, DistributionMatching, ScoreDistillation
from vpae_jax.methods.vpae import PhaseOne, PhaseTwo
from vpae_jax.types import Batch, Condition, Features, UserError

B, C = 3, 4
SHAPE = (B, 2, 2, 2, C)
# This generator compiles three times faster than the default one; the draws only need to be independent.
KEY = jax.random.key(11, impl="unsafe_rbg")
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape).astype(np.float32))


BATCH = Batch(
    latents=normal(*SHAPE),
    condition=Condition(
        text=normal(B, 2, C), text_mask=jnp.ones((B, 2), bool), image=normal(B, 2, C), frames=normal(B, 2, 2, 2, C)
    ),
    null_text=normal(2, C),
    null_mask=jnp.ones(2, bool),
)


@dataclass(frozen=True)
class Net:
    """A nonlinear velocity network with hidden states; uses every part of the condition."""

    w: jax.Array

    def hidden(self, x, t, condition):
        mixed = jnp.tanh(x @ self.w[:C] + expand(t, x) * self.w[C])
        return (
            mixed + condition.text.mean(1)[:, None, None, None] + 0.1 * condition.frames + 0.1 * condition.image.mean()
        )

    def __call__(self, x, t, condition):
        return self.hidden(x, t, condition) @ self.w[:C]

    def features(self, x, t, condition):
        tokens = self.hidden(x, t, condition).reshape(len(x), -1, C)
        return Features(taps=(tokens,), text=condition.text, text_mask=condition.text_mask)


@dataclass(frozen=True)
class Heads:
    """One nonlinear logit a clip."""

    w: jax.Array

    def __call__(self, features):
        return jnp.tanh(features.taps[0] @ self.w[:C]).mean((1, 2)) * 3


ROLES = ("generator", "generator_ema", "teacher", "fake_score", "heads", "backbone")
WEIGHTS = {name: 0.6 * normal(C + 1, C) for name in ROLES}


def networks(weights, leave_out=()):
    made = {name: (Heads if name == "heads" else Net)(w) for name, w in weights.items() if name not in leave_out}
    return made | {"step": jnp.int32(0)}


def evaluate(loss, trained, weights=WEIGHTS, batch=BATCH, key=KEY, step=0):
    """(per-example loss, metrics, gradient of its mean with respect to every role's weights)."""

    def run(weights, step):
        nets = networks(weights) | {"step": step}
        values, metrics = loss(nets[trained], nets, batch, key)
        return values.mean(), (values, metrics)

    grads, (values, metrics) = jax.jit(jax.grad(run, has_aux=True))(weights, jnp.int32(step))
    return np.asarray(values), {k: float(v) for k, v in metrics.items()}, jax.device_get(grads)


def touched(grads):
    return {name for name, grad in grads.items() if np.abs(grad).max() > 0}


# Phase one.

NOISED = PhaseOne(fake_updates=2)
# The paper's range, in these clips of few values too.
HIGH = TimeDistribution(low=0.9)


def test_paper_defaults_of_phase_one():
    method = PhaseOne()
    assert method.input == "noised_real" and method.t == TimeDistribution(low=0.9, stated_for=VALUES_720P)
    assert method.matching == DistributionMatching("x0_norm", guidance=5.0, floor=0.0)
    recipe = TimeDistribution(low=0.02, high=0.98, shift=5.0, clip=(0.02, 0.98), stated_for=VALUES_720P)
    assert method.matching.t == method.fake_t == recipe
    roles = method.roles
    assert (roles["generator"].init, roles["generator"].trains, roles["generator"].ema) == ("pretrained", "all", 0.995)
    assert roles["teacher"].trains == "none"
    fake = roles["fake_score"]
    assert (fake.trains, fake.lora_rank, fake.lora_alpha, fake.base) == ("lora", 128, 64, "teacher")
    assert [(u.trains, u.every, u.repeats) for u in method.updates] == [("fake_score", 1, 5), ("generator", 1, 1)]


def test_ratio_order_and_full_fake_are_data():
    assert [(u.trains, u.repeats) for u in NOISED.updates] == [("fake_score", 2), ("generator", 1)]
    every = PhaseOne(fake_updates=4, count="all").updates
    assert [(u.trains, u.every, u.starts) for u in every] == [("fake_score", 1, 0), ("generator", 4, 3)]
    assert all(u.repeats == 1 for u in every)
    assert PhaseOne(fake="all").roles["fake_score"].trains == "all"
    assert PhaseOne(fake="all").roles["fake_score"].base is None
    assert PhaseOne(fake_rank=16, fake_scale=2.0).roles["fake_score"].lora_alpha == 32


def test_the_generator_step_trains_the_generator_alone():
    values, metrics, grads = evaluate(NOISED.generator_loss, "generator")
    assert values.shape == (B,) and touched(grads) == {"generator"}
    assert set(metrics) == {"dmd_grad", "dmd_normaliser", "dmd_gap", "x0_mean_drift", "x0_std_ratio"}
    assert all(np.isfinite(v) for v in metrics.values())


@pytest.mark.parametrize("space", ["velocity", "x0"])
def test_the_fake_step_trains_the_fake_score_alone(space):
    values, _, grads = evaluate(PhaseOne(fake_loss=space).fake_score_loss, "fake_score")
    assert values.shape == (B,) and touched(grads) == {"fake_score"}


def test_a_fresh_fake_score_teaches_only_through_guidance():
    """LoRA B = 0: the fake score is the teacher, g = 0 iff w = 1."""
    weights = WEIGHTS | {"fake_score": WEIGHTS["teacher"]}
    plain = replace(NOISED, matching=DistributionMatching(guidance=1.0))
    assert touched(evaluate(plain.generator_loss, "generator", weights)[2]) == set()
    assert touched(evaluate(NOISED.generator_loss, "generator", weights)[2]) == {"generator"}


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
        others = {"teacher": gaussian(1.0), "fake_score": gaussian(offset)}
        return method.generator_loss(student, others, BATCH, key)[0].mean()

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

    method.generate(record, replace(BATCH, latents=latents), {"step": jnp.int32(step)}, KEY)
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
    method.generator_loss(record, {"teacher": record, "fake_score": record}, BATCH, KEY)
    assert len(seen) == 4 and all((frames == 0).all() for frames in seen)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: PhaseOne(fake_updates=0), "fake_updates"),
        (lambda: PhaseOne(fake_rank=0), "fake_rank"),
        (lambda: PhaseOne(image_dropout=2.0), "image_dropout"),
        (lambda: PhaseOne(ema=-1.0), "ema"),
        (lambda: PhaseOne(input="anneal", t=TimeDistribution("logit_normal")), r"PhaseOne\.t"),
        (lambda: PhaseTwo(disc_updates=0), "disc_updates"),
        (lambda: PhaseTwo(disc_warmup=-1), "disc_warmup"),
        (lambda: PhaseTwo(adversarial_weight=-1.0), "adversarial_weight"),
        (lambda: PhaseTwo(image_dropout=-0.5), "image_dropout"),
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
    assert (roles["generator"].init, roles["generator"].ema) == ("previous", 0.995)
    assert (roles["heads"].init, roles["heads"].model, roles["teacher"].trains) == ("fresh", "heads", "none")
    assert [(u.trains, u.repeats, u.starts) for u in method.updates] == [("heads", 1, 0), ("generator", 1, 0)]


def test_ratio_warmup_and_trained_backbone_are_data():
    updates = PhaseTwo(disc_updates=3, disc_warmup=50).updates
    assert [(u.trains, u.repeats, u.starts) for u in updates] == [("heads", 3, 0), ("generator", 1, 50)]
    method = PhaseTwo(backbone="full_copy", disc_updates=2)
    assert [(u.trains, u.repeats) for u in method.updates] == [("heads", 2), ("backbone", 2), ("generator", 1)]
    assert (method.roles["backbone"].trains, method.roles["backbone"].init) == ("all", "pretrained")
    assert PhaseTwo(init="pretrained").roles["generator"].init == "pretrained"


@pytest.mark.parametrize("kind", ["ema", "online_sg", "full_copy", "frozen_teacher"])
def test_each_step_trains_its_role_alone(kind):
    """Zero gradient to every frozen role, to the average, and, from the discriminator's step, to the generator."""
    method = PhaseTwo(backbone=kind, noise=FULL)
    assert touched(evaluate(method.heads_loss, "heads")[2]) == {"heads"}
    # The generator's network here is also `others["generator"]`, so "online_sg" would show as a second path.
    assert touched(evaluate(method.generator_loss, "generator")[2]) == {"generator"}


def test_the_trained_backbone_has_its_own_step():
    method = PhaseTwo(backbone="full_copy", noise=FULL)
    grads = evaluate(method.backbone_loss, "backbone")[2]
    assert "backbone" in touched(grads) and touched(grads) <= {"backbone", "heads"}
    values = [
        evaluate(loss, role)[0] for loss, role in ((method.heads_loss, "heads"), (method.backbone_loss, "backbone"))
    ]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "reads"),
    [("ema", "generator_ema"), ("online_sg", "generator"), ("full_copy", "backbone"), ("frozen_teacher", "teacher")],
)
def test_which_backbone_is_read(kind, reads):
    method = PhaseTwo(backbone=kind, noise=FULL, csds=ScoreDistillation(weight=0.0))
    base = evaluate(method.generator_loss, "generator")[1]["fake_logit"]
    for name in ("generator_ema", "backbone", "teacher"):
        weights = WEIGHTS | {name: WEIGHTS[name] + 0.5}
        moved = evaluate(method.generator_loss, "generator", weights)[1]["fake_logit"] != base
        assert moved == (name == reads)


def direct_loss(method, weights, stop_backbone=True):
    """Eq. 6 written out as one differentiable function of the generator, with the method's own draws."""
    nets = networks(weights)
    stopped = networks(jax.lax.stop_gradient(weights))
    keys = named_keys(KEY, "images", "generate", "noise", "csds")
    ones = jnp.ones(B)
    noise = draws.normal(keys.generate, SHAPE, jnp.float32)
    x0 = noise - nets["generator"](noise, ones, BATCH.condition)
    shown = method.noise(x0, BATCH.latents, keys.noise)
    name = {"ema": "generator_ema", "frozen_teacher": "teacher", "full_copy": "backbone"}.get(
        method.backbone, "generator"
    )
    backbone = (stopped if stop_backbone else nets)[name]
    logit = lambda x, t: stopped["heads"](backbone.features(x, t, BATCH.condition))  # noqa: E731
    loss = LOSSES[method.adversarial].generator(logit(shown.real, shown.real_t), logit(shown.fake, shown.fake_t))
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
    values, _, grads = evaluate(method.generator_loss, "generator")
    direct = direct_loss(method, WEIGHTS)
    expected = jax.jit(jax.grad(lambda w: direct_loss(method, WEIGHTS | {"generator": w}).mean()))(WEIGHTS["generator"])
    np.testing.assert_allclose(values, direct, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads["generator"], expected, rtol=1e-3, atol=1e-6)


def test_trainable_backbone_adds_the_gradient_through_its_weights():
    with pytest.warns(UserWarning, match="blinding"):
        method = PhaseTwo(backbone="online_trainable", noise=FULL)
    _, metrics, grads = evaluate(method.generator_loss, "generator")
    whole = jax.jit(jax.grad(lambda w: direct_loss(method, WEIGHTS | {"generator": w}, stop_backbone=False).mean()))
    np.testing.assert_allclose(grads["generator"], whole(WEIGHTS["generator"]), rtol=1e-3, atol=1e-6)
    stopped = evaluate(PhaseTwo(backbone="online_sg", noise=FULL).generator_loss, "generator")[2]
    assert np.abs(grads["generator"] - stopped["generator"]).max() > 1e-4
    assert "csds_grad" in metrics and "adv_grad" not in metrics
    with pytest.warns(UserWarning, match="blinding"):
        alone = PhaseTwo(backbone="online_trainable", noise=FULL, csds=ScoreDistillation(weight=0.0))
    assert touched(evaluate(alone.generator_loss, "generator")[2]) == {"generator", "heads"}


def test_pure_noise_gives_the_generator_no_adversarial_gradient():
    """At discriminator noise t = 1 the input does not depend on the generator."""
    method = PhaseTwo(noise=DiscriminatorNoise(t=TimeDistribution(low=1.0)), csds=ScoreDistillation(weight=0.0))
    _, metrics, grads = evaluate(method.generator_loss, "generator")
    assert touched(grads) == set() and metrics["adv_grad"] == 0


def test_reported_gradients():
    """Norms with respect to x0 of a clip: they scale with the weights, and the ratio is theirs."""
    method = PhaseTwo(noise=FULL)
    metrics = evaluate(method.generator_loss, "generator")[1]
    assert metrics["adv_csds_ratio"] == pytest.approx(metrics["adv_grad"] / metrics["csds_grad"], rel=1e-4)
    scaled = replace(method, adversarial_weight=3.0, csds=ScoreDistillation(weight=5.0))
    more = evaluate(scaled.generator_loss, "generator")[1]
    assert more["adv_grad"] == pytest.approx(3 * metrics["adv_grad"], rel=1e-4)
    assert more["csds_grad"] == pytest.approx(0.5 * metrics["csds_grad"], rel=1e-4)
    alone = evaluate(replace(method, csds=ScoreDistillation(weight=0.0)).generator_loss, "generator")[1]
    assert "csds_grad" not in alone and "adv_csds_ratio" not in alone
    for name in ("x0_mean_drift", "x0_std_ratio", "fake_logit", "adversarial"):
        assert np.isfinite(alone[name])


def test_high_noise_drowns_the_adversarial_term():
    """The factor 1 - t: the paper's range leaves a small fraction of the full range's gradient."""
    ratio = lambda noise: evaluate(PhaseTwo(noise=noise).generator_loss, "generator")[1]["adv_grad"]  # noqa: E731
    low, high = TimeDistribution(low=0.1, high=0.5), TimeDistribution(low=0.9, high=0.999)
    assert ratio(DiscriminatorNoise(t=high)) < 0.3 * ratio(DiscriminatorNoise(t=low))


def test_the_generator_starts_from_pure_noise():
    seen = []

    def record(x, t, condition):
        seen.append((np.asarray(x), np.asarray(t)))
        return jnp.zeros_like(x)

    x0 = PhaseTwo().generate(record, BATCH, KEY)
    np.testing.assert_array_equal(seen[0][1], 1)
    np.testing.assert_array_equal(seen[0][0], x0)
    assert abs(np.corrcoef(np.ravel(x0), np.ravel(BATCH.latents))[0, 1]) < 0.5


def test_discriminator_metrics():
    metrics = evaluate(PhaseTwo(noise=FULL).heads_loss, "heads")[1]
    assert set(metrics) == {"real_logit", "fake_logit", "logit_gap", "accuracy", "adversarial", "penalty"}
    assert metrics["logit_gap"] == pytest.approx(metrics["real_logit"] - metrics["fake_logit"], abs=1e-5)
    without = PhaseTwo(noise=FULL, penalty=DifferencePenalty(weight=0.0))
    assert "penalty" not in evaluate(without.heads_loss, "heads")[1]


@pytest.mark.parametrize("adversarial", sorted(LOSSES))
def test_every_adversarial_loss_runs_in_both_steps(adversarial):
    method = PhaseTwo(adversarial=adversarial, noise=FULL)
    assert touched(evaluate(method.heads_loss, "heads")[2]) == {"heads"}
    assert touched(evaluate(method.generator_loss, "generator")[2]) == {"generator"}


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
    base = evaluate(PhaseTwo().heads_loss, "heads")[0]
    other = evaluate(PhaseTwo(**changed).heads_loss, "heads")[0]
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
    base = evaluate(PhaseTwo().generator_loss, "generator")[1]["csds"]
    other = evaluate(PhaseTwo(csds=csds).generator_loss, "generator")[1]["csds"]
    assert np.isfinite(other) and abs(other - base) > 1e-6


def test_figure_literal_is_warned_about():
    with pytest.warns(UserWarning, match="noise level alone"):
        method = PhaseTwo(noise=DiscriminatorNoise(kind="fig_literal"))
    assert touched(evaluate(method.heads_loss, "heads")[2]) == {"heads"}
