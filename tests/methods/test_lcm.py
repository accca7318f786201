"""Consistency distillation on networks and distributions whose answers are known."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import BATCH, KEY, B, context, evaluate, touched, weights_of

from vpae_jax.flow.sampler import Sampler
from vpae_jax.flow.schedule import expand
from vpae_jax.flow.times import VALUES_720P, TimeDistribution
from vpae_jax.methods.base import Adapters, Average, Role, Student, View
from vpae_jax.methods.lcm import LCM
from vpae_jax.types import UserError

GRID = TimeDistribution(kind="grid", points=10)


def loss_of(method, nets):
    values, metrics = method.loss(nets, BATCH, context())
    return np.asarray(values), metrics


def test_defaults():
    method = LCM()
    assert method.t == TimeDistribution(kind="grid", points=50, shift=5.0, stated_for=VALUES_720P)
    assert method.roles == {
        "generator": Role("pretrained", trains=True, averages={"ema": Average(0.95)}),
        "teacher": Role("pretrained"),
    }
    assert method.views == {"target": View("generator", constant=True)}
    assert [u.name for u in method.updates] == ["generator"]
    assert method.student == Student("generator", Sampler.even(4, 5.0, solver="consistency"), average="ema")


def test_one_step_is_one_euler_step():
    assert LCM(steps=1).student.sampler == Sampler("euler", (1.0, 0.0), 1.0)


def test_the_student_is_never_guided():
    """Guidance is distilled into it; a student sampled at the teacher's guidance would be guided twice."""
    assert LCM(guidance=7.5).student.sampler.guidance == 1


def test_the_target_may_be_an_average():
    method = LCM(target="average", target_decay=0.9)
    assert method.roles["generator"].averages == {"ema": Average(0.95), "target": Average(0.9)}
    assert method.views == {"target": View("generator", "target")}
    assert touched(evaluate(method, method.loss)[2]) == {"generator"}
    alone = LCM(target="average", ema=0.0)
    assert set(alone.roles["generator"].averages) == {"target"} and alone.student.average is None


def test_only_the_student_is_trained():
    method = LCM(t=GRID)
    values, metrics, grads = evaluate(method, method.loss)
    assert values.shape == (B,) and touched(grads) == {"generator"}
    assert set(metrics) == {"x0_mean_drift", "x0_std_ratio", "teacher_gap", "consistency_gap"}


def test_no_gradient_through_the_target():
    """d L / d theta is that of the first prediction alone."""
    method = LCM(t=GRID, distance="squared")
    weights = weights_of(method)
    grads = evaluate(method, method.loss, weights)[2]
    apart = LCM(t=GRID, distance="squared", target="average")
    stopped = evaluate(apart, apart.loss, weights | {"generator_target": weights["generator"]})[2]
    np.testing.assert_allclose(grads["generator"], stopped["generator"], rtol=1e-5)


@pytest.mark.parametrize("distance", ["huber", "squared"])
def test_data_that_is_one_clip_is_consistent(distance):
    """Fact 12: v = (x - c) / t maps every point of a path to c, and so does every Euler step of it: the loss is 0."""
    clip = BATCH.latents
    exact = lambda x, t, condition: (x - clip) / jnp.maximum(expand(t, x), 1e-9)  # noqa: E731
    values, metrics = loss_of(
        LCM(t=GRID, guidance=1.0, distance=distance), dict.fromkeys(("generator", "target", "teacher"), exact)
    )
    np.testing.assert_allclose(values, 0, atol=1e-5)
    np.testing.assert_allclose(metrics["consistency_gap"], 0, atol=1e-4)


def gaussian(m, s):
    """Velocity of data N(m, s^2)."""

    def velocity(x, t, condition):
        t = expand(t, x)
        gain = (x - (1 - t) * m) / ((1 - t) ** 2 * s**2 + t**2)
        return t * gain - (m + (1 - t) * s**2 * gain)

    return velocity


def test_the_flow_of_a_gaussian_is_consistent():
    """Fact 11: the map m + s eps, told x_t at t, gives one clip a path; the target differs by the Euler step's error,
    which falls with the square of the step."""
    m, s = 1.3, 0.7

    def consistent(x, t, condition):
        t = expand(t, x)
        x0 = m + s * (x - (1 - t) * m) / jnp.sqrt((1 - t) ** 2 * s**2 + t**2)
        return (x - x0) / jnp.maximum(t, 1e-9)

    nets = {"generator": consistent, "target": consistent, "teacher": gaussian(m, s)}
    gaps = {}
    for points in (20, 40, 80):
        method = LCM(t=TimeDistribution(kind="grid", points=points, low=0.4, high=0.6), guidance=1.0)
        gaps[points] = float(np.mean(loss_of(method, nets)[1]["consistency_gap"]))
    assert gaps[20] < 0.02
    assert gaps[20] / gaps[40] == pytest.approx(4, rel=0.4) and gaps[40] / gaps[80] == pytest.approx(4, rel=0.4)


def test_the_pseudo_huber_distance():
    """0 at 0, about |z| beyond c: at z = 1 and c = .001 it is .9990005."""
    method = LCM()
    z = jnp.array([0.0, 1.0, 3.0]).reshape(1, 1, 1, 1, 3)
    np.testing.assert_allclose(method._distance(z).ravel(), [0, 0.9990005, 2.9990001], atol=1e-6)
    np.testing.assert_allclose(replace(method, distance="squared")._distance(z).ravel(), [0, 1, 9])


def test_guidance_moves_the_target_alone():
    base, unguided = (evaluate(method, method.loss)[1] for method in (LCM(t=GRID), LCM(t=GRID, guidance=1.0)))
    assert unguided["consistency_gap"] != base["consistency_gap"]
    assert unguided["x0_std_ratio"] == base["x0_std_ratio"]


def test_training_brings_the_points_of_a_path_together():
    """A student that starts as the teacher's one-step prediction learns the flow's map: its clips spread from m to
    m + s eps. Ten points, a student that is affine in x at each of them."""
    m, s, points = 1.0, 0.8, 10
    teacher = gaussian(m, s)
    method = LCM(t=TimeDistribution(kind="grid", points=points), guidance=1.0, distance="squared")

    def net(w):
        def velocity(x, t, condition):
            row = w[jnp.round(t * points).astype(jnp.int32)]
            x0 = row[:, :1, None, None, None] + row[:, 1:, None, None, None] * x
            return jnp.where(expand(t, x) > 0, (x - x0) / jnp.maximum(expand(t, x), 1e-9), 0.0)

        return velocity

    t = jnp.arange(points + 1) / points
    slope = (1 - t) * s**2 / ((1 - t) ** 2 * s**2 + t**2)
    start = jnp.stack([m - slope * (1 - t) * m, slope], 1)
    rng = np.random.default_rng(0)
    clips = replace(BATCH, latents=jnp.asarray(m + s * rng.normal(size=(B, 4, 6, 6, 4)), jnp.float32))

    @jax.jit
    def step(w, key):
        def loss(w):
            nets = {"generator": net(w), "target": net(jax.lax.stop_gradient(w)), "teacher": teacher}
            return method.loss(nets, clips, context(key=key))[0].mean()

        return w - 0.3 * jax.grad(loss)(w)

    w = start
    for number in range(1500):
        w = step(w, jax.random.fold_in(KEY, number))
    assert float(start[-1, 1]) == 0, "one step of the teacher gives its mean"
    assert float(w[-1, 1]) == pytest.approx(s, abs=0.25), "the student's one step keeps the noise"


def test_a_low_rank_student():
    method = LCM(generator="lora", generator_rank=4, generator_scale=0.5)
    assert method.roles["generator"].adapters == Adapters("teacher", 4, 2.0)
    assert method.roles["generator"].start == "fresh"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"t": TimeDistribution()}, r"LCM\.t is of kind 'uniform', expected 'grid' or 'list'"),
        ({"huber": 0.0}, r"LCM\.huber is 0.0"),
        ({"guidance": -1.0}, r"LCM\.guidance"),
        ({"target_decay": 1.5}, r"LCM\.target_decay"),
        ({"steps": 0}, r"steps is 0"),
        ({"ema": 1.0}, r"LCM\.ema is 1.0"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        LCM(**fields)
