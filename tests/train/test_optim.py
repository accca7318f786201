"""Optimizers against their update rules written out in numpy, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vpae_jax.config import OptimizerConfig
from vpae_jax.train.optim import learning_rate, make_optimizer

STEPS = 12


def trajectory(config, grads, start):
    """The weights after each update, as the optimizer of this config makes them."""
    optimizer = make_optimizer(config)
    update = jax.jit(optimizer.update)
    params = jax.tree.map(jnp.float32, start)
    state, seen = optimizer.init(params), []
    for grad in grads:
        steps, state = update(jax.tree.map(jnp.float32, grad), state, params)
        params = optax.apply_updates(params, steps)
        seen.append(jax.device_get(params))
    return seen


def random_trees(seed=0):
    """Weights of two shapes, and gradients whose global norms lie on both sides of 1, 8 and 10."""
    rng = np.random.default_rng(seed)
    tree = lambda scale: {"w": scale * rng.normal(size=(3, 4)), "b": scale * rng.normal(size=2)}  # noqa: E731
    return tree(1.0), [tree(0.1 if step % 3 == 0 else 12.0 / (1 + step)) for step in range(STEPS)]


def global_norm(tree):
    return np.sqrt(sum((leaf**2).sum() for leaf in tree.values()))


def by_hand(config, grads, start, rates):
    """The same trajectory in float64, from the papers' rules.

    Adam with decoupled decay (Loshchilov and Hutter, 1711.05101, Algorithm 2) or RMSProp as PyTorch has it, on
    gradients scaled down to a global norm of at most `clip_norm`.
    """
    weights = dict(start)
    m, v = ({name: np.zeros_like(leaf) for name, leaf in start.items()} for _ in range(2))
    seen = []
    for step, (grad, rate) in enumerate(zip(grads, rates, strict=True), 1):
        scale = min(1.0, config.clip_norm / global_norm(grad)) if config.clip_norm else 1.0
        for name, g in ((name, scale * leaf) for name, leaf in grad.items()):
            if config.algorithm == "adam":
                m[name] = config.b1 * m[name] + (1 - config.b1) * g
                v[name] = config.b2 * v[name] + (1 - config.b2) * g**2
                mean, square = m[name] / (1 - config.b1**step), v[name] / (1 - config.b2**step)
                direction = mean / (np.sqrt(square) + config.eps)
            else:
                v[name] = config.rms_decay * v[name] + (1 - config.rms_decay) * g**2
                direction = g / (np.sqrt(v[name]) + config.eps)
            weights[name] = weights[name] - rate * (direction + config.weight_decay * weights[name])
        seen.append(dict(weights))
    return seen


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(0.1),
        OptimizerConfig(0.1, b1=0.5, b2=0.95, eps=0.3, clip_norm=1.0),
        OptimizerConfig(0.1, b1=0.0, weight_decay=0.5, clip_norm=8.0),
        OptimizerConfig(0.1, algorithm="rmsprop"),
        OptimizerConfig(0.1, algorithm="rmsprop", rms_decay=0.6, eps=0.3, weight_decay=0.5, clip_norm=1.0),
    ],
    ids=["adam", "adam clipped", "adamw", "rmsprop", "rmsprop clipped and decayed"],
)
def test_every_update_is_the_papers(config):
    start, grads = random_trees()
    norms = [global_norm(grad) for grad in grads]
    assert min(norms) < config.clip_norm < max(norms)
    expected = by_hand(config, grads, start, [0.1] * STEPS)
    for got, want in zip(trajectory(config, grads, start), expected, strict=True):
        for name in want:
            # In float32, 1 - b2 after few updates has four digits.
            np.testing.assert_allclose(got[name], want[name], rtol=0, atol=5e-5)


def test_the_defaults_are_adams_and_apts():
    config = OptimizerConfig(0.1)
    assert (config.algorithm, config.b1, config.b2, config.eps) == ("adam", 0.9, 0.999, 1e-8)
    assert (config.rms_decay, config.weight_decay, config.clip_norm) == (0.9, 0.0, 10.0)


@pytest.mark.parametrize("gradient", [1e-3, 1e-6, 1e-8])
def test_eps_is_added_to_the_root(gradient):
    """Under the root, gradients below 1e-4 would hardly move a weight."""
    moved = {
        algorithm: trajectory(OptimizerConfig(1.0, algorithm=algorithm), [{"w": gradient}], {"w": 0.0})[0]["w"]
        for algorithm in ("adam", "rmsprop")
    }
    assert moved["adam"] == pytest.approx(-gradient / (gradient + 1e-8), rel=1e-5)
    root = np.sqrt(0.1) * gradient
    assert moved["rmsprop"] == pytest.approx(-gradient / (root + 1e-8), rel=1e-5)


def test_rmsprops_first_steps_are_of_the_order_of_the_step_size():
    """3.2, 2.3, 1.9, ... times, down to once: not 31 times, as with Adam's b2 for its decay."""
    steps = np.diff(
        [0.0, *(p["w"] for p in trajectory(OptimizerConfig(1.0, "rmsprop"), [{"w": -2.0}] * 50, {"w": 0.0}))]
    )
    np.testing.assert_allclose(steps, 1 / np.sqrt(1 - 0.9 ** np.arange(1, 51)), rtol=1e-4)
    assert steps[0] == pytest.approx(3.1623, abs=1e-3)


RATES = [
    ({}, [2.0] * 9),
    ({"warmup_steps": 4}, [0, 0.5, 1, 1.5, 2, 2, 2, 2, 2]),
    ({"decay_steps": 4}, [2, 1.707107, 1, 0.292893, 0, 0, 0, 0, 0]),
    ({"warmup_steps": 2, "decay_steps": 4}, [0, 1, 2, 1.707107, 1, 0.292893, 0, 0, 0]),
]


@pytest.mark.parametrize(("options", "rates"), RATES)
def test_the_step_size_warms_up_and_decays(options, rates):
    """Also as the updates have it: the first after a warm-up of 2 is the third, and the decay ends at 0."""
    config = OptimizerConfig(2.0, clip_norm=0.0, **options)
    np.testing.assert_allclose([learning_rate(config)(step) for step in range(9)], rates, atol=1e-6)
    start, grads = random_trees()
    expected = by_hand(config, grads[:9], start, rates)
    for got, want in zip(trajectory(config, grads[:9], start), expected, strict=True):
        np.testing.assert_allclose(got["w"], want["w"], rtol=0, atol=1e-3)
