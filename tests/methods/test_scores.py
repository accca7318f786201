"""Losses between scores, against Gaussians whose velocity is known in closed form."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpae_jax.flow import draws
from vpae_jax.flow.schedule import add_noise, expand
from vpae_jax.flow.times import TimeDistribution
from vpae_jax.methods.common import example_mean, inject, named_keys
from vpae_jax.methods.scores import DistributionMatching, ScoreDistillation, fake_score_loss
from vpae_jax.types import Condition, UserError

SHAPE = (4, 3, 2, 2, 5)
N = 60
SD = 0.7
# This generator compiles three times faster than the default one; the draws only need to be independent.
KEY = jax.random.key(7, impl="unsafe_rbg")


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def gaussian(mean, sd=SD):
    """The exact velocity network for data N(mean + the condition's text, sd^2)."""

    def velocity(x, t, condition):
        t = expand(t, x)
        m = mean + condition.text[:, :, :, None, None]
        gain = (x - (1 - t) * m) / ((1 - t) ** 2 * sd**2 + t**2)
        return t * gain - (m + (1 - t) * sd**2 * gain)

    return velocity


def prompt(value):
    return Condition(text=jnp.full((SHAPE[0], 1, 1), value), text_mask=jnp.ones((SHAPE[0], 1), bool))


COND, UNCOND = prompt(0.0), prompt(-1.0)
REAL, FAKE = gaussian(1.0), gaussian(3.0)


def at(t):
    """A fixed time."""
    return TimeDistribution(low=t, high=t)


@pytest.fixture
def x0():
    return jnp.asarray(np.random.default_rng(0).normal(3.0, SD, SHAPE).astype(np.float32))


def matching(x0, real=REAL, fake=FAKE, **fields):
    fields = {"t": at(0.6), "guidance": 1.0, **fields}
    method = DistributionMatching(**fields)
    return jax.jit(lambda x0: method(x0, real, fake, COND, UNCOND, KEY))(x0)


def test_value_is_half_the_mean_square_and_gradient_is_g_over_n(x0):
    """Fact 5."""
    term, metrics = matching(x0)
    g = term.grad * N
    np.testing.assert_allclose(term.value, 0.5 * example_mean(g**2), rtol=1e-5)
    np.testing.assert_allclose(metrics["dmd_grad"], np.sqrt((term.grad**2).sum((1, 2, 3, 4))), rtol=1e-5)
    surrogate = lambda x: (0.5 * example_mean((x - jax.lax.stop_gradient(x - g)) ** 2)).mean()  # noqa: E731
    found = jax.value_and_grad(lambda x: inject(x, matching(x)[0]).mean())(x0)
    expected = jax.value_and_grad(surrogate)(x0)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-7)


def test_gap_of_means(x0):
    """Fact 9: x0_f - x0_r = 1.642336 for means 2 apart at t' = .6, S = .7; "none" passes it on unchanged."""
    term, metrics = matching(x0, weighting="none")
    np.testing.assert_allclose(term.grad * N, 1.642336, rtol=1e-5)
    assert float(metrics["dmd_gap"]) == pytest.approx(1.642336, rel=1e-5)


def test_descent_moves_towards_the_real_distribution(x0):
    """Fact 9's sign: the fake mean is above the real one, so the step must go down, whatever the weight."""
    for weighting in ("x0_norm", "none", "t2"):
        grad = matching(x0, weighting=weighting)[0].grad
        assert (grad > 0).all()
        grad = matching(x0, real=FAKE, fake=REAL, weighting=weighting)[0].grad
        assert (grad < 0).all()


def test_weights(x0):
    keys = named_keys(KEY, "t", "noise")
    t = jnp.full(4, 0.6)
    x = add_noise(x0, draws.normal(keys.noise, SHAPE), t)
    x0_real = x - 0.6 * REAL(x, t, COND)
    gap = 1.642336
    normaliser = example_mean(jnp.abs(x0 - x0_real))
    term, metrics = matching(x0)
    np.testing.assert_allclose(term.grad * N, jnp.broadcast_to(expand(gap / normaliser, x0), SHAPE), rtol=1e-4)
    assert float(metrics["dmd_normaliser"]) == pytest.approx(float(normaliser.mean()), rel=1e-5)
    np.testing.assert_allclose(matching(x0, weighting="t2")[0].grad * N, (0.4 / 0.6) ** 2 * gap, rtol=1e-4)
    np.testing.assert_allclose(matching(x0, floor=100.0)[0].grad * N, gap / 100, rtol=1e-4)


def test_t2_is_the_raw_score_difference_through_the_noising(x0):
    """Fact 3: -(1 - t') (s_r - s_f), with the scores of the Gaussians themselves."""
    keys = named_keys(KEY, "t", "noise")
    x = add_noise(x0, draws.normal(keys.noise, SHAPE), jnp.full(4, 0.6))
    var = 0.16 * SD**2 + 0.36
    score = lambda m: -(x - 0.4 * m) / var  # noqa: E731
    np.testing.assert_allclose(
        matching(x0, weighting="t2")[0].grad * N, -0.4 * (score(1.0) - score(3.0)), rtol=1e-3, atol=1e-5
    )


def test_a_fresh_fake_score_gives_no_gradient_unless_guided(x0):
    """LoRA starts with B = 0, so fake = real: g = 0 iff the real score is not guided."""
    assert (matching(x0, fake=REAL)[0].grad == 0).all()
    guided = matching(x0, fake=REAL, guidance=5.0)[0].grad
    assert (jnp.abs(guided) > 0).all()


def test_guidance_is_of_the_real_score_only(x0):
    """Guiding moves x0_r by (w - 1) (x0_c - x0_u) = 4 t^2 / V for means 1 apart."""
    var = 0.16 * SD**2 + 0.36
    shift = 4 * 0.36 / var
    found = matching(x0, weighting="none", guidance=5.0)[0].grad * N
    np.testing.assert_allclose(found, 1.642336 - shift, rtol=1e-4)


def test_a_perfect_clip_gives_zero_not_nan(x0):
    """Where x0 equals the real prediction the normaliser is 0."""
    exact = lambda x, t, condition: (x - x0) / expand(t, x)  # noqa: E731
    term, metrics = DistributionMatching(t=at(1.0), guidance=1.0)(x0, exact, exact, COND, UNCOND, KEY)
    assert np.isfinite(term.grad).all() and np.isfinite(term.value).all()
    assert all(np.isfinite(v).all() for v in metrics.values())


def test_a_clip_at_the_teachers_prediction_does_not_erase_the_others(x0):
    """Without a floor its gradient is many times that of all other clips, and clipping leaves nothing of theirs."""
    at_it = jnp.arange(len(x0)) == 0

    def real(x, t, condition):
        wrong = jnp.where(at_it, 1e-5, 0.5).reshape(-1, 1, 1, 1, 1)
        return (x - (x0 + wrong)) / expand(t, x)

    fake = lambda x, t, condition: (x - x0 - 0.3) / expand(t, x)  # noqa: E731
    shares = {}
    for floor in (0.0, DistributionMatching().floor):
        method = DistributionMatching(t=at(1.0), guidance=1.0, floor=floor)
        norms = np.asarray(method(x0, real, fake, COND, UNCOND, KEY)[0].grad_norm)
        shares[floor] = norms[1:].min() / norms[0]
    assert shares[0.0] < 1e-4 and shares[DistributionMatching().floor] > 1e-2


def test_the_fake_score_learns_velocity_of_the_generator(x0):
    """Fact 12: for clips that are always x0 the exact velocity has no error, in either space."""
    exact = lambda x, t, condition: (x - x0) / expand(t, x)  # noqa: E731
    wrong = lambda x, t, condition: exact(x, t, condition) + 0.5  # noqa: E731
    for space in ("velocity", "x0"):
        np.testing.assert_allclose(
            fake_score_loss(exact, x0, COND, TimeDistribution(low=0.2, high=1.0), KEY, space), 0, atol=1e-9
        )
    np.testing.assert_allclose(fake_score_loss(wrong, x0, COND, at(0.6), KEY), 0.25, rtol=1e-4)
    np.testing.assert_allclose(fake_score_loss(wrong, x0, COND, at(0.6), KEY, "x0"), 0.36 * 0.25, rtol=1e-4)


def test_the_fake_loss_does_not_reach_the_generator(x0):
    grad = jax.grad(lambda x: fake_score_loss(FAKE, x, COND, TimeDistribution(low=0.2, high=0.9), KEY).sum())(x0)
    assert (grad == 0).all()


def distil(x0, disc_t=None, **fields):
    fields = {"t": at(0.6), **fields}
    disc_t = jnp.full(len(x0), 0.3) if disc_t is None else disc_t
    method = ScoreDistillation(**fields)
    return jax.jit(lambda x0: method(x0, REAL, COND, UNCOND, KEY, disc_t))(x0)


def direct_distillation(x0, w=1.0, t=0.6, frames=3, reduce="mean"):
    """The term as a plain function of x0 with a stopped target."""
    keys = named_keys(KEY, "t", "noise")
    times = jnp.full(len(x0), t)

    def loss(x0):
        x = jax.lax.stop_gradient(add_noise(x0, draws.normal(keys.noise, x0.shape), times))
        v_c, v_u = REAL(x, times, COND), REAL(x, times, UNCOND)
        target = jax.lax.stop_gradient(x - t * (v_u + w * (v_c - v_u)))
        error = (x0 - target)[:, :frames] ** 2
        return error.mean((1, 2, 3, 4)) if reduce == "mean" else error.sum((1, 2, 3, 4))

    return jax.jit(lambda x: (loss(x), jax.grad(lambda x: loss(x).sum())(x)))(x0)


@pytest.mark.parametrize(
    ("fields", "direct"),
    [
        ({}, {}),
        ({"guidance": 5.0}, {"w": 5.0}),
        ({"times": "discriminator"}, {"t": 0.3}),
        ({"reduction": "sum"}, {"reduce": "sum"}),
        ({"frames": 1}, {"frames": 1}),
        ({"frames": 2, "reduction": "sum"}, {"frames": 2, "reduce": "sum"}),
        ({"frames": 9}, {}),
    ],
)
def test_distillation_equals_the_direct_loss(x0, fields, direct):
    term = distil(x0, **fields)
    value, grad = direct_distillation(x0, **direct)
    np.testing.assert_allclose(term.value, value, rtol=1e-4)
    np.testing.assert_allclose(term.grad, grad, rtol=1e-3, atol=1e-6)


def test_time_weight(x0):
    plain, weighted = distil(x0), distil(x0, time_weight="one_minus_t")
    np.testing.assert_allclose(weighted.value, 0.4 * plain.value, rtol=1e-5)
    np.testing.assert_allclose(weighted.grad, 0.4 * plain.grad, rtol=1e-5)


def test_sum_is_mean_times_the_number_of_values(x0):
    np.testing.assert_allclose(distil(x0, reduction="sum").value, N * distil(x0).value, rtol=1e-5)


def test_distillation_contracts_to_the_mean():
    """Fact 13: the expected gradient is 2 (1 - k) (x0 - m) / N, k = .178832: C-SDS alone blurs."""
    size = 2000
    x0 = jnp.full((size, 1, 2, 2, 5), 2.5)
    cond = Condition(text=jnp.zeros((size, 1, 1)), text_mask=jnp.ones((size, 1), bool))
    term = ScoreDistillation(t=at(0.6))(x0, REAL, cond, cond, KEY, jnp.full(size, 0.6))
    k = 0.16 * SD**2 / (0.16 * SD**2 + 0.36)
    assert k == pytest.approx(0.178832, abs=1e-6)
    assert float((term.grad * 20).mean()) == pytest.approx(2 * (1 - k) * 1.5, abs=0.01)


def test_each_draw_has_its_own_key(x0):
    """Times and noise move independently: the same key with another time keeps the noise."""
    seen = []

    def record(x, t, condition):
        seen.append((np.asarray(x), np.asarray(t)))
        return x

    for t in (at(0.5), at(1.0)):
        DistributionMatching(t=t, guidance=1.0)(x0, record, REAL, COND, UNCOND, KEY)
    noise = seen[1][0]
    np.testing.assert_allclose(seen[0][0], 0.5 * np.asarray(x0) + 0.5 * noise, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "t",
    [
        TimeDistribution(low=0.02, high=0.98),
        TimeDistribution(low=0.001, high=0.999),
        TimeDistribution("logit_normal", mean=1.0, shift=5.0),
    ],
)
def test_other_times(x0, t):
    term, _ = matching(x0, t=t)
    assert np.isfinite(term.grad).all() and (term.grad > 0).all()


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: DistributionMatching(weighting="other"), "weighting"),
        (lambda: DistributionMatching(floor=-1.0), "floor"),
        (lambda: ScoreDistillation(weight=-1.0), "weight"),
        (lambda: replace(ScoreDistillation(), frames=-1), "frames"),
    ],
)
def test_bad_fields_are_named(make, field):
    with pytest.raises((UserError, TypeError), match=field):
        make()
