"""Adversarial losses by value, the discriminator's inputs, and the difference penalty on linear discriminators."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpae_jax.flow.schedule import translate
from vpae_jax.flow.times import VALUES_720P, TimeDistribution
from vpae_jax.methods.adversarial import (
    DISC_TIMES,
    LOSSES,
    DifferencePenalty,
    DiscriminatorNoise,
    Judged,
    accuracy,
    discriminator_loss,
)
from vpae_jax.methods.common import named_keys
from vpae_jax.types import UserError

# This generator compiles three times faster than the default one; the draws only need to be independent.
KEY = jax.random.key(3, impl="unsafe_rbg")
SHAPE = (2, 3, 4, 4, 5)
D = 240


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def values(kind, real, fake):
    real, fake = jnp.array([[real]]), jnp.array([[fake]])
    return tuple(float(loss(real, fake)[0, 0]) for loss in (LOSSES[kind].discriminator, LOSSES[kind].generator))


@pytest.mark.parametrize(
    ("kind", "real", "fake", "expected"),
    [
        ("hinge", 0.0, 0.0, (2, 0)),
        ("hinge", 2.0, -2.0, (0, 2)),
        ("hinge", 0.5, -0.25, (1.25, 0.25)),
        ("hinge", -1.0, 1.0, (4, -1)),
        ("pcm_hinge", 0.0, 0.0, (2, 1)),
        ("pcm_hinge", 2.0, -2.0, (0, 3)),
        ("pcm_hinge", 0.5, -0.25, (1.25, 1.25)),
        ("pcm_hinge", -1.0, 1.0, (4, 0)),
        ("ns_logistic", 0.0, 0.0, (1.386294, 0.693147)),
        ("ns_logistic", 1.0, -1.0, (0.626523, 1.313262)),
        ("rpgan", 0.0, 0.0, (0.693147, 0.693147)),
        ("rpgan", 1.0, -1.0, (0.126928, 2.126928)),
        ("literal", 0.0, 0.0, (1.386294, -0.693147)),
    ],
)
def test_values(kind, real, fake, expected):
    assert values(kind, real, fake) == pytest.approx(expected, abs=1e-5)


def test_literal_equation_3():
    """With D = P(fake) = sigmoid(-logit), log D(fake) + log(1 - D(real)) is -1.386294 at 0 and D maximises it."""
    for real, fake in [(0.0, 0.0), (0.7, -1.3)]:
        p_fake = lambda logit: 1 / (1 + np.exp(logit))  # noqa: E731
        eq3 = np.log(p_fake(fake)) + np.log(1 - p_fake(real))
        assert values("literal", real, fake)[0] == pytest.approx(-eq3, abs=1e-5)
        assert values("literal", real, fake)[1] == pytest.approx(np.log(p_fake(fake)), abs=1e-5)
    assert -values("literal", 0.0, 0.0)[0] == pytest.approx(-1.386294, abs=1e-5)


def test_only_the_relative_loss_ignores_a_common_shift():
    for kind, loss in LOSSES.items():
        same = np.allclose(values(kind, 1.5, 0.25), values(kind, 0.5, -0.75), atol=1e-6)
        assert same == loss.relative


def test_every_generator_wants_a_higher_logit():
    for loss in LOSSES.values():
        grad = jax.grad(lambda f, loss=loss: loss.generator(jnp.zeros((1, 1)), f)[0, 0])(jnp.zeros((1, 1)))
        assert grad[0, 0] < 0


def test_accuracy():
    real, fake = jnp.array([[1.0], [2.0], [-1.0]]), jnp.array([[-1.0], [1.0], [-2.0]])
    assert float(accuracy(real, fake, relative=False)) == pytest.approx(4 / 6)
    assert float(accuracy(real, fake, relative=True)) == 1
    assert float(accuracy(jnp.zeros((2, 1)), jnp.zeros((2, 1)), relative=False)) == 0.5


@pytest.fixture
def clips():
    return normal(*SHAPE), 5 + normal(*SHAPE, seed=1)


def noise_of(x_t, x0, t):
    """The noise that made x_t."""
    t = np.asarray(t).reshape(-1, 1, 1, 1, 1)
    return (np.asarray(x_t) - (1 - t) * np.asarray(x0)) / t


FREE = DifferencePenalty(weight=0.0)
ALL, PURE = TimeDistribution(), TimeDistribution(low=1.0)


@pytest.mark.parametrize("t", [DISC_TIMES, ALL])
def test_shared_time_and_independent_noise(clips, t):
    shown = DiscriminatorNoise(t=t)(*clips, KEY)
    np.testing.assert_array_equal(shown.fake_t, shown.real_t)
    fake, real = noise_of(shown.fake, clips[0], shown.fake_t), noise_of(shown.real, clips[1], shown.real_t)
    assert abs(np.corrcoef(fake.ravel(), real.ravel())[0, 1]) < 0.2
    assert 0.85 < fake.std() < 1.15 and 0.85 < real.std() < 1.15


def test_the_figures_times_of_real_clips_are_all():
    fake = real = jnp.zeros((2000, 1, 1, 1, 1))
    for kind in ("shared", "fig_literal", "clean"):
        shown = DiscriminatorNoise(kind, TimeDistribution(low=0.9))(fake, real, KEY)
        assert 0.9 < shown.fake_t.min() < 0.91 and 0.99 < shown.fake_t.max() <= 1
        if kind == "fig_literal":
            assert shown.real_t.min() < 0.01 and shown.real_t.max() > 0.99
        else:
            np.testing.assert_array_equal(shown.real_t, shown.fake_t)


def test_clean_inputs(clips):
    shown = DiscriminatorNoise(kind="clean")(*clips, KEY)
    np.testing.assert_array_equal(shown.fake, clips[0])
    np.testing.assert_array_equal(shown.real, clips[1])
    shown = DiscriminatorNoise(real="clean")(*clips, KEY)
    np.testing.assert_array_equal(shown.real, clips[1])
    assert np.abs(shown.fake - clips[0]).max() > 0.1


@pytest.mark.parametrize("kind", ["shared", "fig_literal", "clean"])
def test_times_follow_the_size_of_the_clips(kind):
    """Also those of the real clips that have times of their own."""
    fake = real = jnp.zeros((50, 2, 3, 3, 1))
    stated, moved = (
        DiscriminatorNoise(kind, TimeDistribution(low=0.5, high=0.9, stated_for=values))(fake, real, KEY)
        for values in (None, VALUES_720P)
    )
    for name in ("fake_t", "real_t"):
        expected = translate(getattr(stated, name), VALUES_720P, 18)
        np.testing.assert_allclose(getattr(moved, name), expected, rtol=1e-5)


def test_pure_noise_carries_no_gradient(clips):
    grad = lambda t: jax.grad(lambda x: DiscriminatorNoise(t=t)(x, clips[1], KEY).fake.sum())(clips[0])  # noqa: E731
    assert (grad(PURE) == 0).all()
    high = grad(TimeDistribution(low=0.9, high=0.999))
    assert (jnp.abs(high) <= 0.1 + 1e-6).all() and (high > 0).all()


@dataclass(frozen=True)
class Linear:
    """D(x, t) = w . x + b."""

    w: jax.Array
    b: float = 0.3

    def __call__(self, x, t):
        return ((x * self.w).sum((1, 2, 3, 4)) + self.b)[:, None]


def linear():
    return Linear(normal(*SHAPE[1:], seed=5))


def penalise(judge, shown, **fields):
    def run(shown):
        real, fake = judge(shown.real, shown.real_t), judge(shown.fake, shown.fake_t)
        return DifferencePenalty(**fields)(judge, shown, real, fake, KEY)

    return np.asarray(jax.jit(run)(shown))


def shown_of(size=2):
    fake, real = (normal(size, *SHAPE[1:], seed=seed) for seed in (6, 7))
    return Judged(fake, jnp.full(size, 0.5), real, jnp.full(size, 0.5))


def test_ratio_on_chosen_directions():
    """Sum-norm: |w|^2 along w, 0 across it, and between for anything else; mean-norm is d times that."""
    w = np.asarray(linear().w)
    across = np.random.default_rng(0).normal(size=w.shape).astype(np.float32)
    across -= (across * w).sum() / (w * w).sum() * w
    square = (w * w).sum()
    for delta, expected in [(0.1 * w, square), (across, 0.0)]:
        delta = jnp.asarray(delta)[None]
        change = (delta * w).sum((1, 2, 3, 4))[:, None]
        assert float(DifferencePenalty(norm="sum").ratio(change, delta)[0]) == pytest.approx(expected, abs=1e-3)
        assert float(DifferencePenalty(norm="mean").ratio(change, delta)[0]) == pytest.approx(D * expected, abs=0.1)
        assert float(DifferencePenalty(norm="fixed").ratio(change, delta)[0]) == pytest.approx(
            float(change[0, 0]) ** 2, abs=1e-4
        )
    values = penalise(linear(), shown_of(50), norm="sum")
    assert (values >= 0).all() and (values <= square * (1 + 1e-4)).all()


@pytest.mark.parametrize(("norm", "scale"), [("mean", 1.0), ("sum", 1 / D)])
def test_expectation_for_independent_noise(norm, scale):
    """|w|^2 (mean) or |w|^2 / d (sum), whatever sigma and b are."""
    judge = linear()
    square = float((judge.w**2).sum())
    for sigma in (0.01, 0.3):
        for b in (0.0, 7.0):
            found = penalise(Linear(judge.w, b), shown_of(4000), norm=norm, sigma_s=sigma, sigma_t=0.0).mean()
            # 0.1 / sqrt(4000) of relative standard error a standard deviation of 1.41.
            assert float(found) == pytest.approx(scale * square, rel=0.08)


def test_composite_noise():
    """E[num] = sigma_s^2 |w|^2 + sigma_t^2 sum over frames and channels of (sum over rows and columns of w)^2."""
    judge = linear()
    w = np.asarray(judge.w)
    groups = (w.sum((1, 2)) ** 2).sum()
    found = penalise(judge, shown_of(4000), norm="fixed").mean()
    assert float(found) == pytest.approx(0.01**2 * (w**2).sum() + 0.1**2 * groups, rel=0.08)
    frames = (w.sum((1, 2, 3)) ** 2).sum()
    found = penalise(judge, shown_of(4000), norm="fixed", temporal="frame").mean()
    assert float(found) == pytest.approx(0.01**2 * (w**2).sum() + 0.1**2 * frames, rel=0.08)


def test_effective_weight_is_99():
    """Weight 1 under "mean" is 1 / (.01^2 + .1^2) on the plain squared difference, up to the spread of ||delta||^2."""
    delta = DifferencePenalty().perturbation(jnp.zeros((4000, *SHAPE[1:])), KEY)
    assert float((delta**2).mean()) == pytest.approx(0.0101, rel=0.03)
    plain = DifferencePenalty(norm="fixed").ratio(jnp.ones((1, 1)), jnp.full((1, *SHAPE[1:]), 0.0101**0.5))
    mean = DifferencePenalty(norm="mean").ratio(jnp.ones((1, 1)), jnp.full((1, *SHAPE[1:]), 0.0101**0.5))
    assert float(mean[0] / plain[0]) == pytest.approx(99.0099, rel=1e-4)


def test_shapes_of_the_perturbation():
    """What is shared along which axis."""
    like = jnp.zeros((2, 3, 4, 4, 5))
    only = {"sigma_s": 0.0, "sigma_t": 1.0}
    channel = DifferencePenalty(temporal="channel", **only).perturbation(like, KEY)
    assert (channel == channel[:, :, :1, :1]).all() and not (channel == channel[..., :1]).all()
    frame = DifferencePenalty(temporal="frame", **only).perturbation(like, KEY)
    assert (frame == frame[:, :, :1, :1, :1]).all() and not (frame == frame[:, :1]).all()
    iid = DifferencePenalty(temporal="iid", **only).perturbation(like, KEY)
    assert len(np.unique(iid)) == iid.size
    spatial = {"sigma_s": 1.0, "sigma_t": 0.0}
    assert len(np.unique(DifferencePenalty(**spatial).perturbation(like, KEY))) == like.size
    shared = DifferencePenalty(spatial="shared", **spatial).perturbation(like, KEY)
    assert (shared == shared[:, :1]).all() and len(np.unique(shared[:, 0])) == 2 * 4 * 4 * 5


def test_constant_discriminator_is_not_penalised():
    for on in ("fake", "real", "both"):
        assert (penalise(lambda x, t: jnp.full((len(x), 1), 0.7), shown_of(), on=on) == 0).all()


def test_which_clips_are_perturbed():
    shown = shown_of()

    def judge(x, t):
        """Steep on real clips only: these are told apart by their time."""
        return (jnp.where(t > 0.6, 1.0, 0.0) * x.sum((1, 2, 3, 4)))[:, None]

    shown = shown._replace(real_t=jnp.full(2, 0.9))
    assert (penalise(judge, shown, on="fake") == 0).all()
    assert (penalise(judge, shown, on="real") > 0).all()
    np.testing.assert_allclose(penalise(judge, shown, on="both"), penalise(judge, shown, on="real"), rtol=1e-5)


def test_the_whole_loss():
    """Hinge plus weight times penalty, and what is reported."""
    judge, shown = linear(), shown_of()
    plain, metrics = discriminator_loss(judge, shown, "hinge", DifferencePenalty(weight=0.0), KEY, 0)
    real, fake = judge(shown.real, shown.real_t), judge(shown.fake, shown.fake_t)
    np.testing.assert_allclose(plain, (jnp.maximum(1 - real, 0) + jnp.maximum(1 + fake, 0))[:, 0], rtol=1e-5)
    assert "penalty" not in metrics
    assert float(metrics["logit_gap"]) == pytest.approx(float((real - fake).mean()), rel=1e-4)
    full, metrics = discriminator_loss(judge, shown, "hinge", DifferencePenalty(weight=0.5), KEY, 0)
    np.testing.assert_allclose(full.mean() - plain.mean(), 0.5 * metrics["penalty"], rtol=1e-3)


def test_a_lazy_penalty_is_there_on_every_third_step_alone():
    """At three times its weight then; else it is not computed."""
    shown, w, seen = shown_of(), linear().w, []

    @jax.jit
    def run(w, step):
        def loss(w):
            def judge(x, t):
                jax.debug.callback(lambda: seen.append(1))
                return Linear(w)(x, t)

            values, metrics = discriminator_loss(judge, shown, "hinge", DifferencePenalty(0.5, every=3), KEY, step)
            return values.mean(), metrics["penalty"]

        return jax.value_and_grad(loss, has_aux=True)(w)

    def run_at(weight):
        def loss(w):
            found = discriminator_loss(Linear(w), shown, "hinge", DifferencePenalty(weight), KEY, 0)
            return found[0].mean()

        return jax.value_and_grad(loss)(w)

    for step, weight, evaluations in ((0, 0.0, 2), (1, 0.0, 2), (2, 1.5, 3), (3, 0.0, 2), (5, 1.5, 3)):
        seen.clear()
        (value, penalty), grad = run(w, jnp.int32(step))
        jax.effects_barrier()
        expected, wanted = run_at(weight)
        assert float(value) == pytest.approx(float(expected), rel=1e-5) and len(seen) == evaluations
        np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-5)
        assert (float(penalty) > 0) == (weight > 0)


def test_halves_apart_are_each_its_own_square():
    """For a linear judge the spatial amplitude cancels: (w delta_s)^2 + (w delta_t)^2, of the very draws of "together",
    whose square has the product of the two besides."""
    judge, shown = linear(), shown_of()
    key = named_keys(KEY, "fake", "real").fake
    spatial, temporal = (jnp.broadcast_to(d, shown.fake.shape) for d in DifferencePenalty().halves(shown.fake, key))
    changes = [np.asarray((d * judge.w).sum((1, 2, 3, 4))) for d in (spatial, temporal)]
    together = penalise(judge, shown, norm="fixed")
    np.testing.assert_allclose(together, (changes[0] + changes[1]) ** 2, rtol=1e-3)
    for amplitude in (0.001, 0.1):
        found = penalise(judge, shown, norm="fixed", apart=amplitude)
        np.testing.assert_allclose(found, changes[0] ** 2 + changes[1] ** 2, rtol=1e-2)
    mean = np.asarray(((spatial + temporal) ** 2).mean((1, 2, 3, 4)))
    np.testing.assert_allclose(penalise(judge, shown, apart=0.1), found / mean, rtol=1e-2)


def test_spatial_noise_apart_has_the_amplitude_asked_for():
    """And one half alone costs one evaluation."""
    shown, seen = shown_of(50), []

    def judge(x, t):
        seen.append(x - shown.fake)
        return x.mean((1, 2, 3, 4))[:, None]

    logit = jnp.zeros((50, 1))
    for sigmas, stds in (((0.01, 0.1), (0.3, 0.1)), ((0.5, 0.0), (0.5,)), ((0.0, 0.1), (0.1,))):
        seen.clear()
        penalty = DifferencePenalty(sigma_s=sigmas[0], sigma_t=sigmas[1], apart=0.3)
        penalty(judge, shown, logit, logit, KEY)
        assert [float(change.std()) for change in seen] == [pytest.approx(std, rel=0.1) for std in stds]


def test_each_logit_is_judged_alone():
    """Losses are averaged after their non-linearity: logits of 3 and -3 cost a hinge 2, their mean of 0 costs 1."""
    shown = shown_of()

    def judge(x, t):
        return jnp.broadcast_to(jnp.array([3.0, -3.0]), (len(x), 2))

    loss, _ = discriminator_loss(judge, shown, "hinge", DifferencePenalty(weight=0.0), KEY, 0)
    np.testing.assert_allclose(loss, 2 + 2)
    mean, _ = discriminator_loss(lambda x, t: judge(x, t).mean(1, keepdims=True), shown, "hinge", FREE, KEY, 0)
    np.testing.assert_allclose(mean, 1 + 1)


def test_a_penalty_is_the_mean_over_logits():
    one, shown = linear(), shown_of()
    two = penalise(lambda x, t: jnp.concatenate([one(x, t), 0 * one(x, t)], 1), shown)
    np.testing.assert_allclose(two, 0.5 * penalise(one, shown), rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: DifferencePenalty(weight=-1.0), "weight"),
        (lambda: DifferencePenalty(sigma_s=0.0, sigma_t=0.0), "sigma_s"),
        (lambda: DifferencePenalty(apart=-0.1), r"DifferencePenalty\.apart"),
        (lambda: DifferencePenalty(every=0), r"DifferencePenalty\.every is 0, expected 1 or more"),
        (lambda: DiscriminatorNoise(kind="v1"), "kind"),
        (lambda: DiscriminatorNoise(kind="clean", real="clean"), r"DiscriminatorNoise\.real"),
    ],
)
def test_bad_fields_are_named(make, field):
    with pytest.raises((UserError, TypeError), match=field):
        make()
