"""Distributions of times: each kind's numbers, shift, clip and translation, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpae_jax.flow import draws
from vpae_jax.flow.schedule import shift, translate, unshift
from vpae_jax.flow.times import OWN, VALUES_720P, TimeDistribution
from vpae_jax.types import UserError

KEY = jax.random.key(0)
MANY = (10_000, 1)
KINDS = [
    TimeDistribution(low=0.2, high=0.9),
    TimeDistribution("logit_normal", mean=1.0, std=0.5),
    TimeDistribution("grid", points=10, low=0.2),
    TimeDistribution("list", values=(0.9, 0.5)),
]


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def changed(distribution, **fields):
    return TimeDistribution(**{**vars(distribution), **fields})


def assert_close(a, b, tol=1e-6):
    np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


def shares(t):
    """How often each time occurs."""
    times, counts = np.unique(np.asarray(t), return_counts=True)
    return dict(zip(times.round(5).tolist(), counts / len(t), strict=True))


def test_every_kind_is_tested():
    assert [one.kind for one in KINDS] == list(OWN)


def test_uniform():
    t = TimeDistribution(low=0.9)(KEY, MANY)
    assert t.dtype == jnp.float32 and t.shape == (10_000,)
    assert 0.9 < t.min() < 0.901 and 0.999 < t.max() <= 1
    assert t.mean() == pytest.approx(0.95, abs=1e-3)
    assert_close(t, 1 - 0.1 * draws.uniform(KEY, 10_000), 1e-7)
    assert (TimeDistribution(low=1.0)(KEY, (5, 1)) == 1).all()
    assert TimeDistribution()(KEY, MANY).min() > 0
    moved = TimeDistribution(low=0.9)(KEY, MANY, jnp.float32(0.4))
    assert_close(1 - moved, 6 * (1 - t), 1e-5)


def test_logit_normal():
    t = TimeDistribution("logit_normal", mean=1.0, std=0.5)(KEY, (20_000, 1))
    logit = np.log(t / (1 - t))
    assert logit.mean() == pytest.approx(1.0, abs=0.02) and logit.std() == pytest.approx(0.5, abs=0.02)
    assert_close(t, jax.nn.sigmoid(1 + 0.5 * draws.normal(KEY, (20_000,))), 1e-7)


def test_every_point_of_a_grid_is_equally_likely():
    found = shares(TimeDistribution("grid", points=4)(KEY, MANY))
    assert list(found) == [0.25, 0.5, 0.75, 1.0]
    assert all(share == pytest.approx(0.25, abs=0.02) for share in found.values())


def test_two_parts_of_a_grid_meet_without_sharing_a_point():
    """The detail and the semantic range of DCM's grid: 50 points of shift 17, parted at the 37th."""
    detail, semantic = (
        sorted(shares(TimeDistribution("grid", low=low, high=high, shift=17.0)(KEY, MANY)))
        for low, high in ((0.0, 0.74), (0.74, 1.0))
    )
    assert (len(detail), len(semantic)) == (37, 13)
    assert detail[35] == pytest.approx(0.977636, abs=1e-5) and detail[34] == pytest.approx(0.975410, abs=1e-5)
    assert semantic[-1] == 1 and detail[-1] < semantic[0]
    assert_close(detail + semantic, shift(np.arange(1, 51) / 50, 17.0), 1e-5)


@pytest.mark.parametrize("low", [0.0, 0.5])
def test_a_pair_of_a_grid_is_one_step_apart(low):
    """Also at the lower end of a part, whose step leads out of it; below the whole grid lies 0."""
    distribution = TimeDistribution("grid", points=10, low=low, shift=3.0)
    t, before = distribution.pair(KEY, MANY)
    np.testing.assert_array_equal(t, distribution(KEY, MANY))
    pairs = sorted({(float(a), float(b)) for a, b in zip(t, before, strict=True)})
    numbers = np.arange(1 + round(10 * low), 11)
    assert_close(pairs, np.stack([shift(numbers / 10, 3.0), shift((numbers - 1) / 10, 3.0)], axis=1), 1e-6)


def test_listed_times_come_as_often_as_their_weights_say():
    """LADD: p = [0, 0, .5, .5], then [.7, .1, .1, .1]; a weight of 0 at either end is never drawn."""
    assert shares(TimeDistribution("list")(KEY, MANY)) == pytest.approx(
        dict.fromkeys((0.25, 0.5, 0.75, 1), 0.25), abs=0.02
    )
    drawn = lambda *weights: shares(TimeDistribution("list", weights=weights)(KEY, MANY))  # noqa: E731
    assert drawn(0.0, 0.0, 0.5, 0.5) == pytest.approx({0.25: 0.5, 0.5: 0.5}, abs=0.02)
    assert drawn(7.0, 1.0, 1.0, 1.0) == pytest.approx({1: 0.7, 0.75: 0.1, 0.5: 0.1, 0.25: 0.1}, abs=0.02)
    assert drawn(1.0, 3.0, 0.0, 0.0) == pytest.approx({1: 0.25, 0.75: 0.75}, abs=0.02)


@pytest.mark.parametrize(("u", "weights", "time"), [(0.0, (0, 0, 1, 1), 0.5), (1 - 2**-24, (1, 1, 0, 0), 0.75)])
def test_a_weight_of_0_is_not_drawn_at_the_ends_of_the_generators_range_either(monkeypatch, u, weights, time):
    monkeypatch.setattr(draws, "uniform", lambda key, clips: jnp.full(clips, u, jnp.float32))
    assert (TimeDistribution("list", weights=tuple(map(float, weights)))(KEY, (3, 1)) == time).all()


def test_a_pair_of_a_list_is_a_time_and_the_one_after():
    t, before = TimeDistribution("list", values=(1.0, 0.5, 0.2)).pair(KEY, MANY)
    pairs = {(round(float(a), 5), round(float(b), 5)) for a, b in zip(t, before, strict=True)}
    assert pairs == {(1.0, 0.5), (0.5, 0.2), (0.2, 0.0)}


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_continuous_times_have_no_pairs(kind):
    with pytest.raises(UserError, match=rf"kind is '{kind}', expected 'grid' or 'list'"):
        TimeDistribution(kind).pair(KEY, MANY)


GRID = TimeDistribution("grid", points=100, shift=3.0)


@pytest.mark.parametrize("phases", [1, 2, 3, 4, 7, 100])
def test_phases_of_a_grid(phases):
    """PCM's: phase m holds points floor(m N / M) + 1 to floor((m + 1) N / M), and ends at the point below."""
    found = GRID.phased(KEY, (20_000, 1), phases)
    t, before, end, inside = (np.round(unshift(np.asarray(one), 3.0) * 100, 3) for one in found)
    starts = np.floor(np.linspace(0, 100, phases, endpoint=False))
    own = np.searchsorted(starts, t, side="left") - 1
    np.testing.assert_allclose(t, np.round(t), atol=2e-3)
    assert len(np.unique(t)) == 100
    np.testing.assert_allclose(before, t - 1, atol=2e-3)
    np.testing.assert_allclose(end, starts[own], atol=2e-3)
    tops = np.append(starts, 100)[own + 1]
    assert (inside > end - 0.1).all() and (inside < tops - 0.5).all()
    if phases in (1, 4):  # every point of the lowest phase, its end among them, and each as often
        shares = np.unique(np.round(inside[own == 0]), return_counts=True)
        np.testing.assert_array_equal(shares[0], np.arange(100 // phases))
        assert shares[1].min() > 0.6 * shares[1].mean()


def test_the_two_times_of_a_phase_are_drawn_apart():
    found = GRID.phased(KEY, (20_000, 1))
    assert abs(np.corrcoef(found.t, found.inside)[0, 1]) < 0.03
    np.testing.assert_array_equal(found.t, GRID.phased(draws.clip_keys(KEY, 20_000), (20_000, 1)).t)


def test_parts_of_a_grid_end_where_the_next_begins():
    """DCM's experts: 50 points of shift 17, parted after the 35th."""
    semantic, detail = (
        TimeDistribution("grid", low=low, high=high, shift=17.0) for low, high in ((0.7, 1.0), (0.0, 0.7))
    )
    assert semantic.ends() == pytest.approx((1, 0.975410), abs=1e-6)
    assert detail.ends() == pytest.approx((0.975410, 0), abs=1e-6)
    for part, low, high in ((semantic, 0.977636, 1.0), (detail, 0.257576, 0.975410)):
        found = part.phased(KEY, MANY)
        assert found.t.min() == pytest.approx(low, abs=1e-5) and found.t.max() == pytest.approx(high, abs=1e-5)
        assert_close(found.end, np.full(10_000, part.ends()[-1]))
        assert (found.before >= found.end).all() and (found.inside >= found.end).all()
        assert found.before.min() == found.end[0] == found.inside.min()
        assert found.inside.max() < found.t.max()


def test_where_phases_end():
    assert GRID.ends(4) == pytest.approx((1, 0.9, 0.75, 0.5, 0), abs=1e-9)
    assert changed(GRID, shift=1.0).ends(3) == pytest.approx((1, 0.66, 0.33, 0), abs=1e-9)
    assert changed(GRID, shift=1.0, clip=(0.1, 0.9)).ends(2) == pytest.approx((0.9, 0.5, 0.1), abs=1e-9)


def test_a_clip_keeps_its_phase_in_a_part_of_the_batch():
    keys, distribution = draws.clip_keys(KEY, 8), changed(GRID, stated_for=72)
    whole = distribution.phased(keys, (8, 18), 4)
    parts = [distribution.phased(keys[i : i + 2], (2, 18), 4) for i in (0, 2, 4, 6)]
    for one, *pieces in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(np.concatenate(pieces), one)
    assert_close(whole.end, translate(np.asarray(GRID.phased(keys, (8, 18), 4).end), 72, 18))


@pytest.mark.parametrize(
    ("distribution", "phases", "message"),
    [
        (TimeDistribution("list"), 1, "kind is 'list', expected 'grid', which has phases"),
        (TimeDistribution(), 1, "kind is 'uniform', expected 'grid', which has phases"),
        (GRID, 0, "phases are 0, expected 1 to 100"),
        (changed(GRID, low=0.9), 11, "phases are 11, expected 1 to 10"),
    ],
)
def test_phases_that_no_grid_has_are_refused(distribution, phases, message):
    for call in (lambda: distribution.ends(phases), lambda: distribution.phased(KEY, MANY, phases)):
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.parametrize("plain", KINDS, ids=lambda one: one.kind)
def test_shift_then_clip_then_translation(plain):
    """Raw .9 is sigma .97826 under shift 5; a clip is stated for the clips for which the times are."""
    t = plain(KEY, (1000, 18))
    assert_close(changed(plain, shift=5.0)(KEY, (1000, 18)), shift(t, 5.0))
    clipped = jnp.clip(shift(t, 5.0), 0.7, 0.96)
    assert 0 < (clipped == shift(t, 5.0)).mean() < 1
    assert_close(changed(plain, shift=5.0, clip=(0.7, 0.96))(KEY, (1000, 18)), clipped)
    whole = changed(plain, shift=5.0, clip=(0.7, 0.96), stated_for=72)
    assert_close(whole(KEY, (1000, 18)), clipped / (2 - clipped))  # Eq. 9 with a = sqrt(72 / 18)
    assert_close(whole(KEY, (1000, 2, 3, 3)), clipped / (2 - clipped))


def test_times_follow_the_size_of_the_latents():
    """The paper's [.9, 1] is itself at 720p and [.86, 1] at 480p, whatever the number of clips."""
    lowest = TimeDistribution(low=0.9, high=0.9, stated_for=VALUES_720P)
    assert_close(lowest(KEY, (2, 21, 90, 160, 16)), np.full(2, 0.9))
    assert_close(lowest(KEY, (1, 21, 60, 104, 16)), [0.855586], 1e-5)  # a = sqrt(720 x 1280 / (480 x 832))
    assert_close(lowest(KEY, (3, 3, 6, 6, 16)), np.full(3, translate(0.9, VALUES_720P, 1728)))
    assert (TimeDistribution(low=1.0, stated_for=VALUES_720P)(KEY, (2, 18)) == 1).all()


@pytest.mark.parametrize("distribution", KINDS, ids=lambda one: one.kind)
def test_a_clip_keeps_its_time_in_a_part_of_the_batch(distribution):
    distribution = changed(distribution, stated_for=72)
    keys = draws.clip_keys(KEY, 8)
    whole = distribution(keys, (8, 18))
    assert len(np.unique(whole)) > 1
    np.testing.assert_array_equal(np.concatenate([distribution(keys[i : i + 2], (2, 18)) for i in (0, 2, 4, 6)]), whole)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "beta"}, "kind"),
        ({"low": 0.9, "high": 0.1}, "low and high are 0.9 and 0.1"),
        ({"high": 1.5}, "low and high are 0.0 and 1.5"),
        ({"kind": "logit_normal", "std": -1.0}, "std is -1.0"),
        ({"kind": "grid", "points": 0}, "points is 0"),
        ({"kind": "grid", "points": 10, "low": 0.91, "high": 0.99}, r"no multiple of 1 / 10 is in .* \(0.91, 0.99\]"),
        ({"kind": "list", "values": ()}, r"values are \(\)"),
        ({"kind": "list", "values": (0.5, 0.5)}, r"values are \(0.5, 0.5\), expected falling timesteps"),
        ({"kind": "list", "values": (1.0, 0.0)}, r"values are \(1.0, 0.0\)"),
        ({"kind": "list", "values": (1.5, 0.5)}, r"values are \(1.5, 0.5\)"),
        ({"kind": "list", "weights": (1.0,)}, r"weights are \(1.0,\), expected one for each of values"),
        ({"kind": "list", "weights": (1.0, 1.0, 1.0, -1.0)}, "none negative"),
        ({"kind": "list", "weights": (0.0, 0.0, 0.0, 0.0)}, "not all 0"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"clip": (0.5, 0.1)}, r"clip is \(0.5, 0.1\)"),
        ({"stated_for": 0}, "stated_for is 0"),
        ({"mean": 1.0}, r"mean=1.0 has no effect on kind 'uniform'; set mean=0.0, or another kind"),
        ({"kind": "logit_normal", "low": 0.1, "high": 0.9}, "low=0.1, high=0.9 has no effect on kind 'logit_normal'"),
        ({"kind": "grid", "values": (1.0,)}, r"values=\(1.0,\) has no effect on kind 'grid'"),
        ({"kind": "list", "points": 4}, "points=4 has no effect on kind 'list'; set points=50"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises((UserError, TypeError), match=message):
        TimeDistribution(**fields)
