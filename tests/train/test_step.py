"""Steps, the loop and its checkpoints on a toy method whose every number is known."""

import dataclasses
import json
import time
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from vpae_jax.config import Experiment, OptimizerConfig
from vpae_jax.data.loader import Batches
from vpae_jax.data.order import ClipStream, Order
from vpae_jax.flow import draws
from vpae_jax.methods.base import Role, Update
from vpae_jax.train import ema
from vpae_jax.train.checkpoint import Checkpoints, guard_config, read_state
from vpae_jax.train.loop import Clock, Hook, train
from vpae_jax.train.metrics import read_metrics
from vpae_jax.train.optim import make_optimizer
from vpae_jax.train.roles import RoleModels, merge_trees, split
from vpae_jax.train.state import create
from vpae_jax.train.step import due, make_update
from vpae_jax.types import UserError


class Line(nnx.Module):
    """y = a x."""

    def __init__(self, slope: float):
        self.slope = nnx.Param(jnp.float32(slope))

    def __call__(self, x):
        return self.slope[...] * x


@dataclasses.dataclass(frozen=True)
class Follow:
    """The follower's slope is drawn to the leader's, which is drawn to the frozen target's; noise makes keys matter."""

    batch: ClassVar[type] = np.ndarray

    noise: float = 0.0
    updates: tuple = dataclasses.field(init=False, default=())

    def __post_init__(self):
        object.__setattr__(
            self,
            "updates",
            (Update("follower", self.follow, repeats=2), Update("leader", self.lead, every=2, starts=1)),
        )

    @property
    def roles(self) -> Mapping[str, Role]:
        return {
            "leader": Role("fresh", "all", model="vae", ema=0.9),
            "follower": Role("fresh", "all", model="vae"),
            "target": Role("fresh", model="vae"),
        }

    def follow(self, trainable, others, batch, key):
        noise = self.noise * draws.normal(key, batch.shape)
        return (trainable(batch) - others["leader"](batch) + noise) ** 2, {"seen": batch}

    def lead(self, trainable, others, batch, key):
        return (trainable(batch) - others["target"](batch)) ** 2, {"step": others["step"]}


RATE = 0.1
EXPERIMENT = Experiment(
    name="toy",
    method={},
    optimizers={name: OptimizerConfig(RATE, b1=0.0, clip_norm=0.0) for name in ("leader", "follower")},
    steps=8,
    batch_size=2,
    log_every=1,
    checkpoint_every=3,
)


def parts(noise: float = 0.0, slopes=(1.0, 2.0, 3.0)):
    method = Follow(noise)
    graphs, params = {}, {}
    for name, slope in zip(("leader", "follower", "target"), slopes, strict=True):
        graphs[name], params[name] = split(Line(slope))
    frozen = {"target": params.pop("target")}
    optimizers = {role: make_optimizer(options) for role, options in EXPERIMENT.optimizers.items()}
    state = create(0, params, method.roles, optimizers)
    return method, RoleModels(method.roles, graphs), optimizers, state, frozen


def batches(scale: float = 1.0):
    numbers = np.arange(1, 101, dtype=np.float32) * scale
    order = Order([[ClipStream(0, np.arange(100), 1.0)]], 2, seed=0)
    return Batches(order, lambda _, clip: {"number": numbers[clip]}, lambda batch: batch["number"], range(2))


def run(workdir, steps=8, noise=0.5, hooks=(), scale=1.0, checkpoint_every=3, given=None):
    workdir.mkdir(parents=True, exist_ok=True)
    experiment = dataclasses.replace(EXPERIMENT, steps=steps, checkpoint_every=checkpoint_every)
    method, models, optimizers, state, frozen = parts(noise)
    given = batches(scale) if given is None else given
    return train(experiment, method, models, optimizers, state, frozen, given, lambda x: x, workdir, hooks)


def slopes(state):
    return {name: float(tree["slope"]) for name, tree in state.params.items()}


def test_one_update_moves_one_role_along_its_own_gradient():
    method, models, _, state, frozen = parts()
    update = make_update(method.updates[0], 0, models, optax.sgd(RATE))
    state = dataclasses.replace(state, opt={**state.opt, "follower": optax.sgd(RATE).init(state.params["follower"])})
    key = np.array(jax.random.key_data(state.key))
    x = jnp.array([1.0, 2.0])
    state, metrics = update(state, frozen, x, jnp.int32(0))
    # d/da mean((a x - l x)^2) = 2 (a - l) mean(x^2) = 2 * 1 * 2.5
    assert slopes(state) == {"leader": 1.0, "follower": pytest.approx(2.0 - RATE * 5.0)}
    assert float(state.ema["leader"]["slope"]) == 1.0
    np.testing.assert_array_equal(jax.random.key_data(state.key), key)
    assert float(metrics["follower/loss"]) == pytest.approx(2.5)
    assert float(metrics["follower/grad_norm"]) == pytest.approx(5.0)
    assert float(metrics["follower/update_norm"]) == pytest.approx(RATE * 5.0)
    assert float(metrics["follower/seen"]) == pytest.approx(1.5)


def test_averages_follow_their_own_role_only():
    method, models, optimizers, state, frozen = parts()
    state, _ = make_update(method.updates[1], 1, models, optimizers["leader"])(state, frozen, jnp.ones(2), jnp.int32(0))
    moved = slopes(state)["leader"]
    assert moved == pytest.approx(1.0 + RATE, abs=1e-6)  # Adam's first step has the size of its rate
    assert float(state.ema["leader"]["slope"]) == pytest.approx(0.9 * 1.0 + 0.1 * moved, abs=1e-7)
    assert set(state.ema) == {"leader"}


def test_no_draw_is_made_twice():
    method, models, optimizers, _, frozen = parts(noise=1.0)
    update = make_update(method.updates[0], 0, models, optimizers["follower"])
    other = make_update(method.updates[0], 1, models, optimizers["follower"])
    seen = set()
    for step, repeat, fn in [(0, 0, update), (0, 1, update), (1, 0, update), (0, 0, other)]:
        state = dataclasses.replace(parts(noise=1.0)[3], step=jnp.int32(step))
        seen.add(float(fn(state, frozen, jnp.ones(2), jnp.int32(repeat))[1]["follower/loss"]))
    assert len(seen) == 4


@pytest.mark.parametrize("accumulation", [2, 4])
def test_parts_of_a_batch_add_up_to_the_whole(accumulation):
    """Noise belongs to clips, so that the parts draw what the whole draws."""
    method, models, _, _, frozen = parts(noise=1.0)
    results = []
    for count in (1, accumulation):
        state = parts(noise=1.0)[3]
        state = dataclasses.replace(
            state, opt={**state.opt, "follower": optax.sgd(RATE).init(state.params["follower"])}
        )
        update = make_update(method.updates[0], 0, models, optax.sgd(RATE), count)
        state, metrics = update(state, frozen, jnp.arange(1.0, 9.0), jnp.int32(0))
        results.append((slopes(state)["follower"], {name: float(value) for name, value in metrics.items()}))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-5)


def test_due_follows_every_and_starts():
    updates = Follow().updates
    assert [[u.trains for _, u in due(updates, step)] for step in range(4)] == [
        ["follower"],
        ["follower", "leader"],
        ["follower"],
        ["follower", "leader"],
    ]


def test_ema_numbers():
    one, zero = {"w": jnp.ones(())}, {"w": jnp.zeros(())}
    average = ema.start(one)
    first = ema.update(average, zero, 0.995)
    assert float(first["w"]) == pytest.approx(0.995)
    values = []
    for _ in range(1000):
        average = ema.update(average, zero, 0.995)
        values.append(float(average["w"]))
    assert values[-1] == pytest.approx(0.006654, rel=1e-3)
    assert values[137] > 0.5 > values[138]  # the half-life is log(1/2) / log(0.995) = 138.3 updates
    # bfloat16 weights: the average is float32 and keeps updates that bfloat16 would round away.
    half = ema.update(
        ema.start({"w": jnp.ones((), jnp.bfloat16)}), {"w": jnp.ones((), jnp.bfloat16) * 1.0078125}, 0.995
    )
    assert half["w"].dtype == jnp.float32 and float(half["w"]) > 1.0


@pytest.mark.parametrize("gradient", [3.0, 1e-6, 1e-8, 0.0])
def test_rmsprop_is_adam_without_first_moment_and_bias_correction(gradient):
    """eps = 1e-8 is added to the root, as in Adam; under it, gradients below 1e-4 would hardly move a weight."""
    rms = make_optimizer(OptimizerConfig(1e-2, algorithm="rmsprop", b2=0.9, clip_norm=0.0))
    params, grads = {"w": jnp.float32(0.0)}, {"w": jnp.float32(gradient)}
    state, value, v = rms.init(params), 0.0, 0.0
    for _ in range(3):
        steps, state = rms.update(grads, state, params)
        v = 0.9 * v + 0.1 * gradient**2
        value = value - 1e-2 * gradient / (np.sqrt(v) + 1e-8)
        params = optax.apply_updates(params, steps)
    assert float(params["w"]) == pytest.approx(value, rel=1e-5)


def test_clipping_warmup_and_decay():
    schedule = OptimizerConfig(1.0, warmup_steps=2, decay_steps=4, clip_norm=1.0, b1=0.0)
    optimizer = make_optimizer(schedule)
    params = {"w": jnp.float32(0.0)}
    state, moved = optimizer.init(params), []
    for _ in range(7):
        steps, state = optimizer.update({"w": jnp.float32(5.0)}, state, params)
        moved.append(-float(steps["w"]))
    np.testing.assert_allclose(moved, [0, 0.5, 1, 0.853553, 0.5, 0.146447, 0], atol=1e-5)


def test_loop_reaches_the_target_and_records_every_step(tmp_path):
    state = run(tmp_path, steps=80, noise=0.0, checkpoint_every=30)
    assert slopes(state)["leader"] == pytest.approx(3.0, abs=0.3)
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == list(range(1, 81))
    assert int(state.step) == 80 and records[-1]["leader/step"] == 79


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, stop):
    whole = run(tmp_path / "whole")

    class Killed(RuntimeError):
        pass

    def kill(step, state):
        if step == stop:
            raise Killed
        return {}

    with pytest.raises(Killed):
        run(tmp_path / "cut", hooks=(Hook(1, kill),))
    resumed = run(tmp_path / "cut")
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(resumed.params), strict=True):
        assert a.tobytes() == b.tobytes()
    for a, b in zip(jax.tree.leaves(whole.ema), jax.tree.leaves(resumed.ema), strict=True):
        assert a.tobytes() == b.tobytes()

    def losses(folder):
        timing = ("seconds_per_step", "data_wait", "bad_records")
        return [{k: v for k, v in r.items() if k not in timing} for r in read_metrics(folder)]

    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


class Slow:
    """Batches that take a while."""

    bad = 3

    def __init__(self, seconds):
        self.batches, self.seconds = batches(), seconds

    def __next__(self):
        time.sleep(self.seconds)
        return next(self.batches)

    def __iter__(self):
        return self

    def get_state(self):
        return self.batches.get_state()

    def set_state(self, state):
        self.batches.set_state(state)


def test_the_share_of_time_spent_waiting_for_data_is_recorded(tmp_path):
    shares = {}
    for name, waits, between in (("starved", 0.02, 0.0), ("fed", 0.0, 0.04)):
        pause = Hook(1, lambda step, state: time.sleep(between) or {})  # noqa: B023
        run(tmp_path / name, hooks=(pause,), given=Slow(waits), checkpoint_every=100)
        shares[name] = [record["data_wait"] for record in read_metrics(tmp_path / name)]
        assert len(shares[name]) == 8
        assert {record["bad_records"] for record in read_metrics(tmp_path / name)} == {3}
    # The first steps compile; the last one is read together with the one before.
    assert np.median(shares["starved"][3:-1]) > 0.5 and max(shares["starved"]) <= 1
    assert np.median(shares["fed"][3:-1]) < 0.2


def test_a_wait_beside_work_of_the_devices_is_not_counted():
    work = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda _, x: x @ x / 500.0, x))
    matrix = jnp.ones((500, 500))
    jax.block_until_ready(work(matrix))
    clock = Clock()
    running = {"loss": work(matrix)}
    with clock.waiting(running):
        time.sleep(0.01)
    assert not running["loss"].is_ready() and clock.waited == 0
    jax.block_until_ready(running)
    with clock.waiting(running):
        time.sleep(0.01)
    assert clock.waited >= 0.01


def test_a_finished_run_does_nothing_more(tmp_path):
    first, again = run(tmp_path), run(tmp_path)
    assert slopes(first) == slopes(again)
    state = read_state(tmp_path)
    assert int(state["step"]) == 8 and float(state["params"]["leader"]["slope"]) == slopes(first)["leader"]


def test_frozen_weights_are_in_no_checkpoint(tmp_path):
    run(tmp_path)
    state = read_state(tmp_path, items=("params", "opt", "ema"))
    assert set(state["params"]) == set(state["opt"]) == {"leader", "follower"}
    assert set(state["ema"]) == {"leader"}


def test_not_finite_stops_with_the_culprit_and_keeps_the_last_checkpoint(tmp_path):
    run(tmp_path, steps=3)
    with pytest.raises(UserError, match=r"is not finite; the last good checkpoint is kept"):
        run(tmp_path, steps=6, scale=1e30)
    assert Checkpoints(tmp_path).latest() == 3


def test_missing_checkpoint_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint in"):
        read_state(tmp_path / "nothing")


def test_a_workdir_belongs_to_one_config(tmp_path):
    guard_config(tmp_path, {"steps": 1, "method": {"rate": 1.0}}, ("steps",))
    guard_config(tmp_path, {"steps": 2, "method": {"rate": 1.0}}, ("steps",))
    with pytest.raises(UserError, match=r"belongs to another config: method.rate is 1.0 there, 2.0 here"):
        guard_config(tmp_path, {"steps": 2, "method": {"rate": 2.0}}, ("steps",))
    assert json.loads((tmp_path / "config.json").read_text())["method"]["rate"] == 1.0


def test_single_keys_may_be_free_within_a_part(tmp_path):
    free = ("steps", "data.workers")
    for workers in (2, 0):
        guard_config(tmp_path, {"data": {"seed": 0, "workers": workers}}, free)
    with pytest.raises(UserError, match=r"data.seed is 0 there, 1 here"):
        guard_config(tmp_path, {"data": {"seed": 1, "workers": 0}}, free)


def test_merged_trees_do_not_overlap():
    assert merge_trees({"a": {"x": 1}}, {"a": {"y": 2}}) == {"a": {"x": 1, "y": 2}}
    with pytest.raises(ValueError, match="both trees hold 'x'"):
        merge_trees({"a": {"x": 1}}, {"a": {"x": 2}})
