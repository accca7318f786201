"""What the consistency distillations share, on networks whose answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import BATCH, KEY, SHAPE, B, number

from vpae_jax.flow import draws
from vpae_jax.flow.schedule import add_noise, expand
from vpae_jax.methods.common import Term, example_mean
from vpae_jax.methods.consistency import Jumps, check_huber, consistency_loss, jump, jumps, pseudo_huber
from vpae_jax.types import UserError

T, BEFORE, END = (jnp.array(times) for times in ([0.9, 0.8, 0.5], [0.7, 0.5, 0.4], [0.6, 0.5, 0.0]))


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def constant(value):
    """A network of one velocity, for the prompt; half of it for the negative prompt."""

    def velocity(x, t, condition):
        own = np.array_equal(condition.text, BATCH.condition.text)
        return jnp.full_like(x, value if own else 0.5 * value)

    return velocity


def test_a_jump_is_one_euler_step_to_the_end():
    x = BATCH.latents
    reached, v = jump(constant(2.0), x, T, END, BATCH.condition)
    np.testing.assert_allclose(reached, x + 2.0 * (END - T).reshape(-1, 1, 1, 1, 1), rtol=1e-6)
    np.testing.assert_array_equal(v, np.full(SHAPE, 2.0))
    stays, _ = jump(constant(2.0), x, END, END, BATCH.condition)
    np.testing.assert_array_equal(stays, x)


def test_both_jumps_and_the_guided_step_between_them():
    """v = 2 + w (2 - 1) - 1 = 4 at w = 3; the target jumps on from there with its own velocity."""
    nets = {"teacher": constant(2.0), "target": constant(-1.0), "generator": constant(0.5)}
    found = jumps(nets, BATCH, T, BEFORE, END, 3.0, KEY)
    x = add_noise(BATCH.latents, draws.normal(KEY, SHAPE), T)
    np.testing.assert_allclose(found.reached, x + 0.5 * expand(END - T, x), rtol=1e-5, atol=1e-6)
    target = x + 4.0 * expand(BEFORE - T, x) - 1.0 * expand(END - BEFORE, x)
    np.testing.assert_allclose(found.target, target, rtol=1e-5, atol=1e-5)
    gap = np.abs(0.5 * (END - T) - 4.0 * (BEFORE - T) + (END - BEFORE))
    np.testing.assert_allclose(found.metrics["consistency_gap"], gap, atol=1e-5)
    np.testing.assert_allclose(found.metrics["teacher_gap"], np.abs(3.5 * (END - T)), atol=1e-5)
    # The student's clip x - t v, against the data's.
    drift = jnp.abs(jnp.mean(x - 0.5 * expand(T, x) - BATCH.latents, (0, 1, 2, 3))).mean()
    assert number(found.metrics["x0_mean_drift"]) == pytest.approx(float(drift), rel=1e-4)


def test_the_teachers_step_is_an_exact_turn_from_noise_to_signal():
    """In TrigFlow's coordinates, z = x / |(1 - t, t)| at the angle whose tangent is t / (1 - t), Euler's step on a
    rectified flow is z cos d - F sin d; rCM takes z - d F."""
    velocity = lambda x, t, condition: jnp.sin(3 * x) + expand(t, x)  # noqa: E731
    found = jumps(
        {"teacher": velocity, "target": constant(0.0), "generator": constant(0.0)}, BATCH, T, BEFORE, END, 1.0, KEY
    )
    x = np.asarray(add_noise(BATCH.latents, draws.normal(KEY, SHAPE), T))
    t, before = (np.asarray(times).reshape(-1, 1, 1, 1, 1) for times in (T, BEFORE))
    v, length = np.sin(3 * x) + t, np.hypot(1 - t, t)
    angle, after = np.arctan2(t, 1 - t), np.arctan2(before, 1 - before)
    clean, noise = x - t * v, x + (1 - t) * v
    turned = np.cos(angle - after) * x / length - np.sin(angle - after) * (
        np.cos(angle) * noise - np.sin(angle) * clean
    )
    np.testing.assert_allclose(found.target, turned * np.hypot(1 - before, before), rtol=1e-4, atol=1e-5)


def test_only_the_jump_of_the_student_is_differentiated():
    def loss(weights):
        nets = {name: lambda x, t, condition, w=w: jnp.full_like(x, 1.0) * w for name, w in weights.items()}
        found = jumps(nets, BATCH, T, BEFORE, END, 3.0, KEY)
        return found.reached.sum() + found.target.sum()

    weights = {name: jnp.float32(0.3) for name in ("teacher", "target", "generator")}
    grads = jax.grad(loss)(weights)
    assert grads["teacher"] == grads["target"] == 0
    assert float(grads["generator"]) == pytest.approx(float((END - T).sum()) * BATCH.latents[0].size, rel=1e-5)


def test_the_pseudo_huber_distance():
    """0 at 0, about |z| beyond c: at z = 1 and c = .001 it is .9990005; its slope is z / sqrt(z^2 + c^2)."""
    z = jnp.array([0.0, 1.0, -3.0]).reshape(1, 1, 1, 1, 3)
    np.testing.assert_allclose(pseudo_huber(z, 0.001).ravel(), [0, 0.9990005, 2.9990001], atol=1e-6)
    slope = jax.grad(lambda z: pseudo_huber(z, 0.5).sum())(z)
    np.testing.assert_allclose(slope, z / np.sqrt(np.asarray(z) ** 2 + 0.25), rtol=1e-6)


def test_a_judges_term_is_added_in_value_and_gradient():
    reached, target = BATCH.latents, BATCH.latents[::-1]
    other = Term(jnp.array([1.0, 2.0, 3.0]), jnp.full(SHAPE, 0.01))

    def loss(x):
        values, metrics = consistency_loss(Jumps(x, target, {}), 0.1, other)
        return values.mean(), (values, metrics)

    grad, (values, metrics) = jax.grad(loss, has_aux=True)(reached)
    distance = example_mean(pseudo_huber(reached - target, 0.1))
    np.testing.assert_allclose(values, distance + other.value, rtol=1e-6)
    own = jax.grad(lambda x: example_mean(pseudo_huber(x - target, 0.1)).sum())(reached)
    np.testing.assert_allclose(grad, (own + 0.01) / B, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(metrics["consistency"], distance, rtol=1e-6)
    np.testing.assert_allclose(metrics["consistency_grad"], np.sqrt((own**2).sum((1, 2, 3, 4))), rtol=1e-5)
    np.testing.assert_allclose(metrics["adv_grad"], 0.01 * np.sqrt(reached[0].size), rtol=1e-5)
    ratio = metrics["adv_grad"].sum() / metrics["consistency_grad"].sum()
    assert number(metrics["adv_consistency_ratio"]) == pytest.approx(float(ratio), rel=1e-5)
    alone, reported = consistency_loss(Jumps(reached, target, {}), 0.1)
    np.testing.assert_allclose(alone, distance, rtol=1e-6)
    assert set(reported) == {"consistency", "consistency_grad"}


def test_metrics_of_parts_are_those_of_the_batch():
    """The ratio of gradients is one of sums."""
    other = Term(jnp.ones(B), jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32))
    both = Jumps(BATCH.latents, jnp.zeros(SHAPE), {})
    whole = consistency_loss(both, 0.1, other)[1]["adv_consistency_ratio"]
    parts = [
        consistency_loss(
            Jumps(both.reached[i : i + 1], both.target[i : i + 1], {}), 0.1, Term(*(p[i : i + 1] for p in other))
        )[1]["adv_consistency_ratio"]
        for i in range(B)
    ]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert float(merged.compute()) == pytest.approx(float(whole.compute()), rel=1e-5)


@pytest.mark.parametrize("huber", [0.0, -1.0, float("nan")])
def test_c_is_positive(huber):
    with pytest.raises(UserError, match=r"PCM\.huber is .*, expected a positive number"):
        check_huber("PCM", huber)
