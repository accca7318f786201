"""Configs: strict parsing, defaults that can be overridden, and one clear line for what is wrong."""

import dataclasses
from types import SimpleNamespace
from typing import Literal

import jax
import numpy as np
import pytest

from configs import encoders, phase1, phase2, teacher, vae
from configs.common import PRESETS
from vpae_jax.config import build, complete, parse
from vpae_jax.flow.schedule import Uniform
from vpae_jax.methods import make_method
from vpae_jax.train.roles import check_roles
from vpae_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float
    kind_of: Literal["a", "b"] = "a"


@dataclasses.dataclass(frozen=True)
class Other:
    size: int = 3


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    many: tuple[int, ...] = ()
    either: Inner | Other | None = None
    flag: bool = False


def test_builds_nested_dataclasses():
    outer = build(Outer, {"inner": {"rate": 1}, "many": [1, 2], "either": {"kind": "Other", "size": 4}}, "config")
    assert outer == Outer(Inner(1.0), (1, 2), Other(4))
    assert isinstance(outer.inner.rate, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inner": {"rat": 1}}, r"config\.inner\.rat: unknown key; did you mean 'rate'"),
        ({}, r"config\.inner: missing"),
        ({"inner": {"rate": "fast"}}, r"config\.inner\.rate: expected float, found 'fast'"),
        ({"inner": {"rate": True}}, r"config\.inner\.rate: expected float, found True"),
        ({"inner": {"rate": float("nan")}}, r"config\.inner\.rate: expected float, found nan"),
        ({"inner": {"rate": 1, "kind_of": "c"}}, r"config\.inner\.kind_of: 'c' is not one of 'a', 'b'"),
        ({"inner": {"rate": 1}, "flag": 1}, r"config\.flag: expected bool, found 1"),
        ({"inner": {"rate": 1}, "either": {"kind": "Third"}}, r"config\.either\.kind: 'Third' is not one of"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(UserError, match=message):
        build(Outer, values, "config")


def test_complete_makes_every_key_known_and_changes_nothing():
    given = {"inner": {"rate": 2.0}, "either": Other(5)}
    full = complete(Outer, given)
    assert full == {
        "inner": {"rate": 2.0, "kind_of": "a"},
        "many": (),
        "either": {"kind": "Other", "size": 5},
        "flag": False,
    }
    assert build(Outer, full, "config") == build(Outer, given, "config")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("module", [phase1, phase2])
def test_every_preset_of_both_phases_parses(module, preset):
    experiment = parse(module.get_config(preset))
    check_roles(make_method(experiment.method), experiment.optimizers)


@pytest.mark.parametrize("module", [vae, encoders, teacher])
def test_the_tiny_models_own_trainings_parse(module):
    experiment = parse(module.get_config())
    check_roles(make_method(experiment.method), experiment.optimizers)


def test_the_presets_of_14b_hold_the_papers_values():
    one, two = parse(phase1.get_config("i2v-14b-720p")), parse(phase2.get_config("i2v-14b-720p"))
    assert (one.steps, one.batch_size, one.optimizers["generator"].learning_rate) == (500, 32, 1e-6)
    assert (one.optimizers["generator"].b1, one.optimizers["generator"].b2) == (0.9, 0.999)
    assert (two.steps, two.batch_size, two.optimizers["generator"].learning_rate) == (1000, 32, 2e-6)
    assert (two.optimizers["heads"].b1, two.optimizers["heads"].b2) == (0.5, 0.999)
    method = make_method(two.method)
    assert (method.ema, method.csds.weight, method.penalty.sigma_s, method.penalty.sigma_t) == (0.995, 10, 0.01, 0.1)


def test_ranges_of_t_are_carried_over_from_720p():
    large, small = (make_method(parse(phase2.get_config(f"i2v-14b-{size}p")).method) for size in (720, 480))
    assert large.noise.t.translate_to is None and large.csds.t.translate_to is None
    assert small.noise.t.translate_to == small.csds.t.translate_to == 21 * 60 * 104 * 16
    lowest = Uniform(0.9, 0.9, translate_to=small.noise.t.translate_to)(jax.random.key(0), 1)
    np.testing.assert_allclose(lowest, 0.855586, atol=1e-5)  # .9 / (a - .9 (a - 1)), a = sqrt(720 x 1280 / 480 x 832)


def test_heads_are_those_of_the_preset_and_every_key_can_be_changed():
    config = phase2.get_config("t2v-1.3b-480p")
    assert (config.heads.width, config.heads.num_heads, config.heads.taps) == (1536, 12, (14, 22, 30))
    config.heads.kind = "conv"
    config.heads.taps = (10, 20)
    assert parse(config).heads["kind"] == "conv"


def test_unknown_preset_and_method_name_the_known_ones():
    with pytest.raises(UserError, match=r"preset 'tinny' does not exist; did you mean 'tiny'"):
        phase1.get_config("tinny")
    with pytest.raises(UserError, match=r"config.method.name: 'vpae_phase3' does not exist; did you mean"):
        make_method({"name": "vpae_phase3"})
    with pytest.raises(UserError, match=r"config.method.fake_rnk: unknown key; did you mean 'fake_rank'"):
        make_method({"name": "vpae_phase1", "fake_rnk": 3})


def test_every_trained_role_needs_an_optimizer():
    experiment = parse(phase1.get_config())
    method = make_method(experiment.method)
    with pytest.raises(UserError, match=r"config.optimizers.fake_score: missing"):
        check_roles(method, {"generator": experiment.optimizers["generator"]})


def test_updates_are_for_the_trained_roles_and_no_others():
    experiment = parse(phase1.get_config())
    method = make_method(experiment.method)
    lazy = SimpleNamespace(roles=method.roles, updates=method.updates[:1])
    with pytest.raises(UserError, match=r"trains \['fake_score', 'generator'\], but has updates for \['fake_score'\]"):
        check_roles(lazy, experiment.optimizers)


def test_a_trained_backbone_has_its_optimizer():
    config = phase2.get_config()
    config.method.backbone = "full_copy"
    experiment = parse(config)
    check_roles(make_method(experiment.method), experiment.optimizers)
