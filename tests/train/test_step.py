"""Steps, the loop and its checkpoints on a toy method whose every number is known."""

import dataclasses
import errno
import re
import sys
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
from vpae_jax.methods.base import Average, Method, Role, Update, View, all_views
from vpae_jax.methods.common import Ratio, drift
from vpae_jax.train import checksums
from vpae_jax.train.checkpoint import read_state
from vpae_jax.train.loop import Clock, Hook, train
from vpae_jax.train.metrics import read_metrics
from vpae_jax.train.newest import FOLDER, latest_step
from vpae_jax.train.optim import make_optimizer
from vpae_jax.train.roles import RoleModels, merge_trees, split
from vpae_jax.train.state import create, places_of
from vpae_jax.train.step import due, make_update
from vpae_jax.types import UserError


class Line(nnx.Module):
    """y = a x."""

    def __init__(self, slope: float):
        self.slope = nnx.Param(jnp.float32(slope))

    def __call__(self, x):
        return self.slope[...] * x


@dataclasses.dataclass(frozen=True)
class Follow(Method):
    """The follower's slope is drawn to the leader's, which is drawn to the frozen target's; noise makes keys matter."""

    batch: ClassVar[type] = np.ndarray

    noise: float = 0.0
    updates: tuple = dataclasses.field(init=False, default=())

    def __post_init__(self):
        object.__setattr__(
            self,
            "updates",
            (Update(("follower",), self.follow, repeats=2), Update(("leader",), self.lead, every=2, starts=1)),
        )

    @property
    def roles(self) -> Mapping[str, Role]:
        return {
            "leader": Role("fresh", True, part="vae", averages={"ema": Average(0.9), "late": Average(0.5, start=3)}),
            "follower": Role("fresh", True, part="vae"),
            "target": Role("fresh", part="vae"),
        }

    def follow(self, nets, batch, context):
        noise = self.noise * draws.normal(context.clips, batch.shape)
        return (nets["follower"](batch) - nets["leader"](batch) + noise) ** 2, {"seen": batch}

    def lead(self, nets, batch, context):
        return (nets["leader"](batch) - nets["target"](batch)) ** 2, {"step": context.step}

    def meet(self, nets, batch, context):
        """Each of two roles is drawn to the other."""
        return (nets["leader"](batch) - nets["follower"](batch)) ** 2, {}


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
    return method, RoleModels(method.roles, all_views(method), graphs), optimizers, state, frozen


def batches(scale: float = 1.0):
    numbers = np.arange(1, 101, dtype=np.float32) * scale
    order = Order([[ClipStream(0, np.arange(100), 1.0)]], 2, seed=0)
    return Batches(order, lambda _, clip: {"number": numbers[clip]}, lambda batch: batch["number"], range(2))


def run(workdir, steps=8, noise=0.5, hooks=(), scale=1.0, checkpoint_every=3, given=None, put=lambda x: x):
    workdir.mkdir(parents=True, exist_ok=True)
    experiment = dataclasses.replace(EXPERIMENT, steps=steps, checkpoint_every=checkpoint_every)
    method, models, optimizers, state, frozen = parts(noise)
    given = batches(scale) if given is None else given
    return train(experiment, method, models, optimizers, state, frozen, given, put, workdir, hooks)


def slopes(state):
    return {name: float(tree["slope"]) for name, tree in state.params.items()}


def test_one_update_moves_one_role_along_its_own_gradient():
    method, models, _, state, frozen = parts()
    update = make_update(method.updates[0], 0, models, {"follower": optax.sgd(RATE)})
    state = dataclasses.replace(state, opt={**state.opt, "follower": optax.sgd(RATE).init(state.params["follower"])})
    key = np.array(jax.random.key_data(state.key))
    x = jnp.array([1.0, 2.0])
    state, metrics = update(state, frozen, x, jnp.int32(0))
    # d/da mean((a x - l x)^2) = 2 (a - l) mean(x^2) = 2 * 1 * 2.5
    assert slopes(state) == {"leader": 1.0, "follower": pytest.approx(2.0 - RATE * 5.0)}
    assert float(state.averages["leader_ema"]["slope"]) == 1.0
    np.testing.assert_array_equal(jax.random.key_data(state.key), key)
    assert float(metrics["follower/loss"]) == pytest.approx(2.5)
    assert float(metrics["follower/grad_norm"]) == pytest.approx(5.0)
    assert float(metrics["follower/update_norm"]) == pytest.approx(RATE * 5.0)
    assert float(metrics["follower/seen"]) == pytest.approx(1.5)


def test_averages_follow_their_own_role_only():
    method, models, optimizers, state, frozen = parts()
    update = make_update(method.updates[1], 1, models, optimizers)
    average = 1.0
    for updates in range(1, 4):
        state, _ = update(state, frozen, jnp.ones(2), jnp.int32(0))
        moved = slopes(state)["leader"]
        if updates == 1:
            assert moved == pytest.approx(1.0 + RATE, abs=1e-6)  # Adam's first step has the size of its rate
        average = 0.9 * average + 0.1 * moved
        assert float(state.averages["leader_ema"]["slope"]) == pytest.approx(average, abs=1e-6)
    assert set(state.averages) == {"leader_ema", "leader_late"}


def test_an_average_may_start_later():
    """Before its first step it equals the weights."""
    method, models, optimizers, state, frozen = parts()
    update, expected = make_update(method.updates[1], 1, models, optimizers), None
    for step in range(6):
        state, _ = update(dataclasses.replace(state, step=jnp.int32(step)), frozen, jnp.ones(2), jnp.int32(0))
        weight = slopes(state)["leader"]
        expected = weight if step < 3 else 0.5 * expected + 0.5 * weight
        assert float(state.averages["leader_late"]["slope"]) == pytest.approx(expected, rel=1e-6)


def test_one_update_trains_several_roles_by_one_loss():
    """Each by its own gradient and optimizer; d/da (a - b)^2 = 2 (a - b), and the opposite for b."""
    method, models, _, state, frozen = parts()
    update = Update(("leader", "follower"), method.meet)
    optimizers = {"leader": optax.sgd(0.1), "follower": optax.sgd(0.2)}
    opt = {role: optimizers[role].init(state.params[role]) for role in optimizers}
    state, metrics = make_update(update, 0, models, optimizers)(
        dataclasses.replace(state, opt=opt), frozen, jnp.ones(2), jnp.int32(0)
    )
    assert slopes(state) == {"leader": pytest.approx(1.0 + 0.1 * 2.0), "follower": pytest.approx(2.0 - 0.2 * 2.0)}
    assert float(metrics["leader+follower/loss"]) == pytest.approx(1.0)
    assert float(metrics["leader/update_norm"]) == pytest.approx(0.2)
    assert float(metrics["follower/update_norm"]) == pytest.approx(0.4)
    assert float(state.averages["leader_ema"]["slope"]) == pytest.approx(0.9 + 0.1 * 1.2)


def test_each_role_has_moments_of_its_own():
    """Heavy-ball momentum of two sizes, on gradients that differ in sign: m <- d m + g, a <- a - r m."""
    method, models, _, state, frozen = parts()
    rates, decays = {"leader": 0.1, "follower": 0.2}, {"leader": 0.9, "follower": 0.5}
    optimizers = {role: optax.sgd(rate, momentum=decays[role]) for role, rate in rates.items()}
    state = dataclasses.replace(state, opt={role: optimizers[role].init(state.params[role]) for role in rates})
    run = make_update(Update(("leader", "follower"), method.meet), 0, models, optimizers)
    expected, moments = slopes(state), dict.fromkeys(rates, 0.0)
    for _ in range(3):
        state, _ = run(state, frozen, jnp.ones(2), jnp.int32(0))
        gap = 2 * (expected["leader"] - expected["follower"])
        for role, gradient in (("leader", gap), ("follower", -gap)):
            moments[role] = decays[role] * moments[role] + gradient
            expected[role] -= rates[role] * moments[role]
        assert slopes(state) == {role: pytest.approx(slope, rel=1e-5) for role, slope in expected.items()}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_constant_view_of_what_is_trained_is_not_differentiated(accumulation):
    """d/da (a - sg(3 a))^2 = 2 (a - 3 a) = -4 a; with the view differentiated it would be 8 a."""

    @dataclasses.dataclass(frozen=True)
    class Still(Follow):
        @property
        def views(self):
            return {"still": View("follower", constant=True)}

    def loss(nets, batch, context):
        return (nets["follower"](batch) - 3 * nets["still"](batch)) ** 2, {}

    _, models, _, state, frozen = parts()
    models = dataclasses.replace(models, views=all_views(Still()))
    sgd = optax.sgd(RATE)
    state = dataclasses.replace(state, opt={**state.opt, "follower": sgd.init(state.params["follower"])})
    update = make_update(Update(("follower",), loss), 0, models, {"follower": sgd}, accumulation)
    state, _ = update(state, frozen, jnp.ones(2), jnp.int32(0))
    assert slopes(state)["follower"] == pytest.approx(2.0 + RATE * 4 * 2.0)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_records_are_computed_with_in_float32(accumulation):
    """Whatever they are stored in; whole numbers stay what they are."""
    _, models, optimizers, state, frozen = parts()
    seen = []

    def loss(nets, batch, context):
        seen.append({name: array.dtype for name, array in batch.items()})
        return nets["follower"](batch["clips"]) ** 2, {}

    update = make_update(Update(("follower",), loss), 0, models, optimizers, accumulation)
    batch = {"clips": jnp.ones(4, jnp.bfloat16), "seeds": jnp.ones(4, jnp.uint32), "mask": jnp.ones(4, bool)}
    update(state, frozen, batch, jnp.int32(0))
    assert seen and all(found == {"clips": jnp.float32, "seeds": jnp.uint32, "mask": bool} for found in seen)


def test_a_role_may_follow_the_one_that_is_trained():
    """SenseFlow's alignment: after each update of the leader, .97 of the follower's own weights and .03 of the leader's
    new ones; nothing else of the follower changes."""
    method, models, _, state, frozen = parts()
    update = dataclasses.replace(method.updates[1], followers={"follower": 0.97})
    sgd = optax.sgd(RATE)
    state = dataclasses.replace(state, opt={**state.opt, "leader": sgd.init(state.params["leader"])})
    moments = jax.tree.map(np.asarray, state.opt["follower"])
    run = make_update(update, 1, models, {"leader": sgd})
    # d/da (a - 3)^2 = 2 (a - 3), at a rate of .1: the leader goes from 1 to 1.4, 1.72 and 1.976.
    for leader, follower in ((1.4, 1.982), (1.72, 1.97414), (1.976, 1.9741958)):
        state, metrics = run(state, frozen, jnp.ones(2), jnp.int32(0))
        assert slopes(state) == {
            "leader": pytest.approx(leader, rel=1e-6),
            "follower": pytest.approx(follower, rel=1e-6),
        }
    for before, after in zip(jax.tree.leaves(moments), jax.tree.leaves(state.opt["follower"]), strict=True):
        np.testing.assert_array_equal(before, after)
    assert not any(name.startswith("follower/") for name in metrics)


def test_a_followers_weights_go_where_they_lay():
    """Also in parts, and on places that are given."""
    method, models, optimizers, _, frozen = parts()
    update = dataclasses.replace(method.updates[1], followers={"follower": 0.5})
    found = []
    for count in (1, 4):
        state = parts()[3]
        run = make_update(update, 1, models, optimizers, count, places_of(state))
        state, _ = run(state, frozen, jnp.arange(1.0, 9.0), jnp.int32(0))
        found.append(slopes(state))
    assert found[0] == found[1] == {"leader": pytest.approx(1.1), "follower": pytest.approx(1.55)}


def test_the_batch_has_a_key_of_its_own():
    """One key for what clips share: the same in every part of a batch, another one each step, and no clip's own."""
    _, models, optimizers, _, frozen = parts()
    seen = {}

    def loss(nets, batch, context):
        key = jax.random.key_data(context.batch).astype(jnp.float32)
        clips = jax.random.key_data(context.clips).astype(jnp.float32)
        same = (clips == key).all(-1).any().astype(jnp.float32)
        return nets["follower"](batch) * 0, {"low": key[0], "high": key[1], "taken": same}

    for name, step, parts_ in (("whole", 0, 1), ("in parts", 0, 4), ("next", 1, 1)):
        update = make_update(Update(("follower",), loss), 0, models, optimizers, parts_)
        state = dataclasses.replace(parts()[3], step=jnp.int32(step))
        metrics = update(state, frozen, jnp.arange(1.0, 9.0), jnp.int32(0))[1]
        seen[name] = float(metrics["follower/low"]), float(metrics["follower/high"])
        assert metrics["follower/taken"] == 0
    assert seen["whole"] == seen["in parts"] != seen["next"]


def test_statistics_of_a_batch_do_not_depend_on_its_parts():
    """Drift and the ratio of gradients are numbers of the whole batch, not means over its parts."""
    _, models, optimizers, _, frozen = parts()
    rng = np.random.default_rng(0)
    batch = jnp.asarray(rng.normal(size=(8, 2, 2, 2, 3)) + rng.normal(size=(8, 1, 1, 1, 1)), jnp.float32)

    def loss(nets, batch, context):
        x0 = 1.5 * batch[..., ::-1] + 0.3
        numbers = jnp.abs(batch).sum((1, 2, 3, 4))
        reported = {**drift(x0, batch), "ratio": Ratio(numbers.sum(), (numbers**2).sum())}
        return nets["follower"](numbers) * 0, reported

    found = {}
    for count in (1, 2, 8):
        update = make_update(Update(("follower",), loss), 0, models, optimizers, count)
        metrics = update(parts()[3], frozen, batch, jnp.int32(0))[1]
        found[count] = [float(metrics[f"follower/{name}"]) for name in ("x0_mean_drift", "x0_std_ratio", "ratio")]
        np.testing.assert_allclose(found[count], found[1], rtol=1e-5)
    x0, numbers = 1.5 * np.asarray(batch)[..., ::-1] + 0.3, np.abs(batch).sum((1, 2, 3, 4))
    means = np.abs(x0.mean((0, 1, 2, 3)) - np.asarray(batch).mean((0, 1, 2, 3))).mean()
    np.testing.assert_allclose(found[1], [means, 1.5, numbers.sum() / (numbers**2).sum()], rtol=1e-5)


def test_no_draw_is_made_twice():
    method, models, optimizers, _, frozen = parts(noise=1.0)
    update = make_update(method.updates[0], 0, models, optimizers)
    other = make_update(method.updates[0], 1, models, optimizers)
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
        update = make_update(method.updates[0], 0, models, {"follower": optax.sgd(RATE)}, count)
        state, metrics = update(state, frozen, jnp.arange(1.0, 9.0), jnp.int32(0))
        results.append((slopes(state)["follower"], {name: float(value) for name, value in metrics.items()}))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-5)


def test_due_follows_every_and_starts():
    updates = Follow().updates
    assert [[u.trains for _, u in due(updates, step)] for step in range(4)] == [
        [("follower",)],
        [("follower",), ("leader",)],
        [("follower",)],
        [("follower",), ("leader",)],
    ]


def test_loop_reaches_the_target_and_records_every_step(tmp_path):
    state = run(tmp_path, steps=80, noise=0.0, checkpoint_every=30)
    assert slopes(state)["leader"] == pytest.approx(3.0, abs=0.3)
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == list(range(1, 81))
    assert int(state.step) == 80 and records[-1]["leader/step"] == 79


def test_each_repeat_has_a_batch_and_draws_of_its_own(tmp_path):
    shown = []
    found = run(tmp_path, steps=1, put=lambda batch: shown.append(batch) or batch)
    assert len({tuple(batch) for batch in shown}) == len(shown) == 2
    method, models, optimizers, state, frozen = parts(noise=0.5)
    update = make_update(method.updates[0], 0, models, optimizers)
    for repeat, batch in enumerate(shown):
        state, _ = update(state, frozen, batch, jnp.int32(repeat))
    assert slopes(found) == slopes(state)


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
        run(tmp_path / "cut", hooks=(Hook(1, kill, "killing"),))
    resumed = run(tmp_path / "cut")
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(resumed.params), strict=True):
        assert a.tobytes() == b.tobytes()
    for a, b in zip(jax.tree.leaves(whole.averages), jax.tree.leaves(resumed.averages), strict=True):
        assert a.tobytes() == b.tobytes()

    def losses(folder):
        timing = ("seconds_per_step", "data_wait", "bad_records")
        return [{k: v for k, v in r.items() if k not in timing} for r in read_metrics(folder)]

    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


class Damaged:
    """Batches of which three records were bad."""

    bad = 3

    def __init__(self):
        self.batches = batches()

    def __next__(self):
        return next(self.batches)

    def get_state(self):
        return self.batches.get_state()

    def set_state(self, state):
        self.batches.set_state(state)


def test_what_slows_a_run_is_recorded(tmp_path):
    run(tmp_path, given=Damaged(), checkpoint_every=100)
    records = read_metrics(tmp_path)
    assert len(records) == 8 and {record["bad_records"] for record in records} == {3}
    assert all(0 <= record["data_wait"] <= 1 for record in records)


@dataclasses.dataclass
class Value:
    """What a device computes: there, or not yet."""

    ready: bool

    def is_ready(self):
        return self.ready


def test_waits_are_counted_while_the_devices_are_idle():
    """A clock that is wound by hand: 3 s for idle devices count, 5 s beside their work do not."""
    now = [100.0]
    clock = Clock(lambda: now[0])
    assert clock.read(0) == {"seconds_per_step": 0.0, "data_wait": 0.0}
    with clock.waiting({"loss": Value(True), "norm": Value(True)}):
        now[0] += 3.0
    with clock.waiting({"loss": Value(True), "norm": Value(False)}):
        now[0] += 5.0
    now[0] += 2.0
    assert clock.read(4) == {"seconds_per_step": 2.5, "data_wait": pytest.approx(0.3)}
    now[0] += 1.0
    assert clock.read(5) == {"seconds_per_step": 1.0, "data_wait": 0.0}


def test_a_finished_run_does_nothing_more(tmp_path):
    first, again = run(tmp_path), run(tmp_path)
    assert slopes(first) == slopes(again)
    state = read_state(tmp_path)
    assert int(state["step"]) == 8 and float(state["params"]["leader"]["slope"]) == slopes(first)["leader"]


def test_frozen_weights_are_in_no_checkpoint(tmp_path):
    run(tmp_path)
    state = read_state(tmp_path, items=("params", "opt", "averages"))
    assert set(state["params"]) == set(state["opt"]) == {"leader", "follower"}
    assert set(state["averages"]) == {"leader_ema", "leader_late"}


def test_a_run_whose_newest_checkpoint_is_damaged_ends_with_the_same_bits(tmp_path, capsys):
    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", steps=7)
    (tmp_path / "cut" / FOLDER / "7" / "data" / "metadata").write_bytes(b"")
    last = run(tmp_path / "cut")
    assert slopes(whole) == slopes(last)
    out = capsys.readouterr().out
    assert "7 is damaged (data/metadata has 0 bytes" in out and "continuing from step 6 of" in out
    for name in ("whole", "cut"):
        records = read_metrics(tmp_path / name)
        assert [record["step"] for record in records] == [*range(1, 9)]
    seen = [[record["follower/seen"] for record in read_metrics(tmp_path / name)] for name in ("whole", "cut")]
    assert seen[0] == seen[1], "the same batches"


def test_a_checkpoint_that_cannot_be_written_ends_the_run_before_the_next_one(tmp_path, monkeypatch):
    write = checksums.write

    def refused(folder, told):
        if folder.name != "3":
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        write(folder, told)

    monkeypatch.setattr(checksums, "write", refused)
    wait = Hook(1, lambda step, state: time.sleep(0.2 if step > 6 else 0) or {}, "waiting")
    with pytest.raises(UserError, match=r"checkpoints: cannot be written: No space left on device"):
        run(tmp_path, steps=100, hooks=(wait,), checkpoint_every=3)
    assert 6 <= read_metrics(tmp_path)[-1]["step"] <= 8 and latest_step(tmp_path) == 3
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["3"]


def test_not_finite_stops_with_the_culprit_and_keeps_the_last_checkpoint(tmp_path):
    run(tmp_path, steps=3)
    with pytest.raises(UserError, match=r"is not finite; the checkpoint of step 3 is kept; lower that role's"):
        run(tmp_path, steps=6, scale=1e30)
    assert latest_step(tmp_path) == 3


def test_every_step_is_checked_not_only_the_logged_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "EXPERIMENT", dataclasses.replace(EXPERIMENT, log_every=100))
    with pytest.raises(UserError, match=r"^step [12]: .* is not finite; there is no checkpoint yet; lower"):
        run(tmp_path, steps=6, scale=1e30)


def test_a_run_shorter_than_the_interval_of_its_log_leaves_its_last_step(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "EXPERIMENT", dataclasses.replace(EXPERIMENT, log_every=100))
    run(tmp_path, steps=3)
    (record,) = read_metrics(tmp_path)
    assert record["step"] == 3 and any(name.endswith("/loss") for name in record)


def test_what_is_compiled_is_said_once_and_how_long_it_took(tmp_path, capsys):
    run(tmp_path, steps=4, hooks=(Hook(1, lambda step, state: {"score": 1.0}, "scoring"),))
    lines = capsys.readouterr().out.splitlines()
    for what in ("compiling the leader's update", "compiling the follower's update", "scoring"):
        begun, ended = (line for line in lines if line.startswith(what))
        assert begun == f"{what} ..." and re.fullmatch(rf"{what}: [\d.]+ s", ended)
    logged = [line for line in lines if line.startswith("step ")]
    assert len(logged) == 4 and not any("0 s/step" in line for line in logged)


def test_missing_checkpoint_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint in"):
        read_state(tmp_path / "nothing")


def test_merged_trees_do_not_overlap():
    assert merge_trees({"a": {"x": 1}}, {"a": {"y": 2}}) == {"a": {"x": 1, "y": 2}}
    with pytest.raises(ValueError, match="both trees hold 'x'"):
        merge_trees({"a": {"x": 1}}, {"a": {"x": 2}})
