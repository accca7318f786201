"""Steps of a toy method whose every number is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_training import RATE, Follow, parts, slopes

from vpae_jax.flow import draws
from vpae_jax.flow.draws import following_key
from vpae_jax.methods.base import SharedClips, Update, View, all_views
from vpae_jax.methods.common import Ratio, drift
from vpae_jax.train.state import places_of
from vpae_jax.train.step import due, make_update


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


@pytest.mark.parametrize("accumulation", [1, 2])
def test_updates_that_follow_learn_from_the_same_clips(accumulation):
    """The leader makes clips y = a x and is drawn to 3 x; then the follower, twice, to these clips, which are constants
    made before the leader moved."""
    _, models, _, state, frozen = parts()
    root = jax.random.clone(state.key)

    def make(nets, batch, context):
        return SharedClips(nets["leader"](batch), context.clips)

    def lead(nets, batch, context):
        return ((context.made.x0 - 3 * batch) ** 2).mean((1, 2, 3, 4)), {}

    def follow(nets, batch, context):
        drawn = draws.uniform(context.clips, len(batch))
        return ((nets["follower"](batch) - context.made.x0) ** 2).mean((1, 2, 3, 4)), {"drawn": drawn}

    sgd = optax.sgd(RATE)
    state = dataclasses.replace(state, opt={role: sgd.init(state.params[role]) for role in ("leader", "follower")})
    update = Update(("leader",), lead, makes=make, then=(Update(("follower",), follow, repeats=2),))
    run = make_update(update, 0, models, {"leader": sgd, "follower": sgd}, accumulation)
    clips = jnp.asarray([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1, 1, 1)
    state, metrics = run(state, frozen, clips, jnp.int32(0))
    square = 7.5  # mean of x^2
    leader = 1.0 - RATE * 2 * (1.0 - 3.0) * square
    follower = 2.0
    for _ in range(2):
        last, follower = follower, follower - RATE * 2 * (follower - 1.0) * square
    assert slopes(state) == {"leader": pytest.approx(leader), "follower": pytest.approx(follower)}
    assert float(metrics["leader/loss"]) == pytest.approx(4 * square)
    assert float(metrics["follower/loss"]) == pytest.approx((last - 1.0) ** 2 * square, rel=1e-5)
    # Of the last repeat: the numbers that its key gives each clip, whatever parts they are in.
    key = following_key(jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(root, 0), 0), 0), 0, 1)
    assert float(metrics["follower/drawn"]) == pytest.approx(float(draws.uniform(key, 4).mean()))


def test_due_follows_every_and_starts():
    updates = Follow().updates
    follower = [(0, 0), (0, 1)]
    assert [due(updates, step) for step in range(4)] == [follower, [*follower, (1, 0)]] * 2
    warming = (dataclasses.replace(updates[0], ends=2), updates[1])
    assert [due(warming, step) for step in range(1, 3)] == [[*follower, (1, 0)], []]
