"""What holds of every registered method that trains on clips: pictures, reported drift, and times that are drawn each
from its own distribution."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import B, evaluate, made, make_batch, record

from vpae_jax.flow.times import TimeDistribution
from vpae_jax.methods import METHODS
from vpae_jax.methods.adversarial import DiscriminatorNoise
from vpae_jax.methods.dcm import DCMDetail, DCMSemantic
from vpae_jax.methods.lcm import LCM
from vpae_jax.methods.pcm import PCM
from vpae_jax.methods.scores import DistributionMatching, ScoreDistillation
from vpae_jax.types import Batch

CLIPS = replace(make_batch((B, 2, 4, 4, 4)), seed=jnp.arange(B, dtype=jnp.uint32))
DATA = np.asarray(CLIPS.latents, np.float64)
CASES = [
    pytest.param(name, number, id=f"{name}, update {number}")
    for name, cls in METHODS.items()
    if cls.batch is Batch and "image_dropout" in cls.__dataclass_fields__  # all but what makes no clips of conditions
    for number in range(len(cls().updates))
]


def fields_of(cls, **fields):
    """Those of the fields that a method has."""
    return {name: value for name, value in fields.items() if name in cls.__dataclass_fields__}


@cache
def recorded(name, number, seed):
    """One evaluation of an update's loss, pictures withheld from every second clip."""
    cls = METHODS[name]
    method = made(cls, **fields_of(cls, image_dropout=0.5, text_dropout=0.0))
    with jax.disable_jit():  # loops then run with numbers that can be written down
        return record(method, method.updates[number].loss, batch=CLIPS, key=jax.random.key(seed))


@pytest.mark.parametrize(("name", "number"), CASES)
def test_pictures_are_withheld_from_all_networks_alike(name, number):
    seen = set()
    for seed in range(3):
        called = [call.picture for call in recorded(name, number, seed).calls if call.kind != "readings"]
        assert called == [called[0]] * len(called)
        seen |= set(called[0])
        if len(seen) == 2:
            return
    raise AssertionError("some clips keep their pictures, others do not")


@pytest.mark.parametrize(("name", "number"), CASES)
def test_drift_is_that_of_the_generators_clips_from_the_data(name, number):
    found = recorded(name, number, 0)
    if "x0_std_ratio" not in found.metrics:
        return
    (*_, last) = (
        call for call in found.calls if call.net == "generator" and call.kind in ("velocity", "recall", "chunks")
    )
    moved = np.abs(last.x0.mean((0, 1, 2, 3)) - DATA.mean((0, 1, 2, 3))).mean()
    assert found.metrics["x0_mean_drift"] == pytest.approx(moved, rel=1e-3)
    assert found.metrics["x0_std_ratio"] == pytest.approx(last.x0.std() / DATA.std(), rel=1e-3)


def only(t):
    return TimeDistribution(low=t, high=t)


# What each network but the generator is told where all distributions differ: of matching (.3), of the fake score (.6),
# of judged clips (.8), of the distance to the teacher (.4).
SCORES, DISTANCE = {("teacher", 0.3), ("fake_score", 0.3)}, {("backbone", 0.8), ("teacher", 0.4)}
TOLD = {
    "vpae_phase1": ({("fake_score", 0.6)}, SCORES),
    "dmd2": ({("fake_score", 0.6)}, SCORES | {("fake_score", 0.6)}),
    "magic": (
        {("fake_score", 0.6), ("backbone", 0.8)},
        {("real_score", 0.3), ("fake_score", 0.3), ("backbone", 0.8)},
    ),
    "add": ({("backbone", 0.8)}, DISTANCE),
    "apt": ({("backbone", 0.8)}, {("backbone", 0.8)}),
    "self_forcing": ({("fake_score", 0.6)}, SCORES),
    "asd": ({("fake_score", 0.6)}, {("fake_score", 0.8)}, SCORES | {("fake_score", 0.8)}),
    "vpae_phase2": ({("backbone", 0.8)}, DISTANCE),
}


def test_every_method_with_times_of_several_kinds_is_among_these():
    kinds = {"matching", "fake_t", "noise", "csds"}
    assert set(TOLD) == {name for name, cls in METHODS.items() if kinds & cls.__dataclass_fields__.keys()}


@pytest.mark.parametrize("name", TOLD)
def test_times_are_drawn_each_from_its_own_distribution(name):
    cls = METHODS[name]
    times = {
        "matching": DistributionMatching(t=only(0.3)),
        "fake_t": only(0.6),
        "noise": DiscriminatorNoise(t=only(0.8)),
        "csds": ScoreDistillation(t=only(0.4)),
    }
    method = made(cls, **fields_of(cls, **times, steps=2 if name == "asd" else 1))
    for update, expected in zip(method.updates, TOLD[name], strict=True):
        with jax.disable_jit():
            calls = record(method, update.loss, batch=CLIPS).calls
        told = {
            (call.net, round(float(t), 6))
            for call in calls
            for t in call.t
            if call.net not in ("generator", "simulator")
        }
        assert told == expected


@pytest.mark.parametrize(
    "method",
    [
        LCM(t=TimeDistribution("grid", points=10)),
        PCM(),
        PCM(adversarial_weight=0.0),
        DCMSemantic(coherence_weight=0.0),
        DCMDetail(),
    ],
    ids=["lcm", "pcm", "pcm alone", "dcm semantic", "dcm detail"],
)
def test_the_huber_distance_has_the_width_that_is_set(method):
    """Far below c it is z^2 / 2c: half as large at twice the c."""

    def distance(huber):
        changed = replace(method, huber=huber)
        (loss,) = (update.loss for update in changed.updates if update.trains == ("generator",))
        values, metrics, _ = evaluate(changed, loss)
        return metrics.get("consistency", values.mean())

    assert distance(20.0) == pytest.approx(0.5 * distance(10.0), rel=0.05)
