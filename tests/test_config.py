"""Configs: strict parsing, defaults that can be overridden, and one clear line for what is wrong."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import encoders, phase1, phase2, teacher, vae
from configs.common import PRESETS
from vpae_jax.config import build, complete, parse, plain
from vpae_jax.flow.schedule import VALUES_720P, LogitNormal, Uniform, translate
from vpae_jax.methods import make_method
from vpae_jax.methods.adversarial import DISC_TIMES, DiscriminatorNoise
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
    maybe: int | None = None


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
    given = {"inner": {"rate": 2}, "either": Other(5)}
    full = ConfigDict(complete(Outer, given))
    assert full.to_dict() == {
        "inner": {"rate": 2.0, "kind_of": "a"},
        "many": (),
        "either": {"kind": "Other", "size": 5, "rate": None, "kind_of": "a"},
        "flag": False,
        "maybe": None,
    }
    values = plain(full)
    assert values == {**full.to_dict(), "either": {"kind": "Other", "size": 5}}
    assert build(Outer, values, "config") == build(Outer, given, "config")


def overridden(config, *arguments):
    """The config as the training program gets it, with `--config.KEY=VALUE` applied."""
    argv = ["main", *(f"--config.{argument}" for argument in arguments)]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    values(argv)
    return holder.value


def outer(*arguments):
    return build(Outer, plain(overridden(ConfigDict(complete(Outer, {"inner": {"rate": 1}})), *arguments)), "config")


def test_what_is_none_can_be_set_and_unset():
    assert outer().maybe is None and outer("maybe=3").maybe == 3
    assert build(Outer, plain(overridden(ConfigDict(complete(Outer, PLAIN)), "maybe=None")), "config").maybe is None
    with pytest.raises(UserError, match=r"config\.maybe: expected .*, found 'many'"):
        outer("maybe=many")


PLAIN = {"inner": {"rate": 1}, "maybe": 4, "either": {"kind": "Other", "size": 5}}


def test_a_setting_of_several_kinds_can_be_switched():
    assert outer().either is None
    assert outer("either.kind=Other", "either.size=4").either == Other(4)
    assert outer("either.kind=Inner", "either.rate=4").either == Inner(4.0)
    assert outer("inner.rate=.5").inner == Inner(0.5)
    switched = lambda *a: build(Outer, plain(overridden(ConfigDict(complete(Outer, PLAIN)), *a)), "config").either  # noqa: E731
    assert switched() == Other(5) and switched("either.kind=None") is None
    assert switched("either.kind=Inner", "either.rate=2.5") == Inner(2.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["either.size=4"], r"config\.either\.size: not a key of kind None; set config\.either\.kind=Other"),
        (["either.kind=Inner", "either.rate=1", "either.size=4"], r"config\.either\.size: not a key of kind Inner"),
        (["either.kind=Inner"], r"config\.either\.rate: expected float, found None"),
        (["either.kind=Third"], r"config\.either\.kind: 'Third' is not one of Inner, Other"),
    ],
)
def test_a_key_of_another_kind_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        outer(*arguments)


def method_of(module, preset, *arguments):
    return make_method(parse(overridden(module.get_config(preset), *arguments)).method)


@pytest.mark.filterwarnings("ignore:PhaseTwo.noise.kind is 'fig_literal'")
@pytest.mark.parametrize("kind", DISC_TIMES)
@pytest.mark.parametrize(("preset", "values"), [("i2v-14b-720p", None), ("t2v-1.3b-480p", 21 * 60 * 104 * 16)])
def test_each_kind_of_noise_draws_its_own_times_in_every_preset(preset, values, kind):
    noise = method_of(phase2, preset, f"method.noise.kind={kind}").noise
    clips, key = jnp.zeros((64, 1, 1, 1, 1)), jax.random.key(0)
    expected = DiscriminatorNoise(kind, translate_to=values)(clips, clips, key)
    np.testing.assert_array_equal(noise(clips, clips, key).fake_t, expected.fake_t)
    low, high = (translate(end, VALUES_720P, values or VALUES_720P) for end in ENDS[kind])
    assert low - 1e-6 <= expected.fake_t.min() and expected.fake_t.max() <= high + 1e-6
    assert expected.fake_t.max() >= low + 0.8 * (high - low)


ENDS = {"shared": (0.9, 0.999), "fig_literal": (0.9, 1.0), "v1": (1.0, 1.0), "full": (0.0, 1.0), "clean": (0.0, 1.0)}


def test_settings_that_are_none_or_of_several_kinds_are_reached_from_the_command_line():
    preset, values = "i2v-14b-480p", 21 * 60 * 104 * 16
    method = method_of(phase1, preset, "method.t.kind=LogitNormal", "method.t.mean=1", "method.fake_t.clip=None")
    assert method.t == LogitNormal(1.0, translate_to=values)
    assert method.fake_t == Uniform(0.02, 0.98, axis="raw", shift=5.0, translate_to=values)
    assert method_of(phase1, "tiny", "method.t.clip=(.1,.9)", "method.t.translate_to=9").t.clip == (0.1, 0.9)
    assert method_of(phase2, preset, "method.csds.t.kind=None").csds.t is None
    noise = method_of(phase2, preset, "method.noise.t.kind=Uniform", "method.noise.t.low=.5").noise
    assert noise == DiscriminatorNoise(t=Uniform(0.5, 1.0), translate_to=values)
    assert method_of(phase2, preset, "method.noise.translate_to=None").noise == DiscriminatorNoise()
    assert method_of(vae, "tiny", "method.ema=.9").ema == 0.9
    assert method_of(teacher, "tiny", "method.ema=None", "method.t.kind=Uniform").t == Uniform()
    assert parse(overridden(phase2.get_config(), "heads.hidden=96")).heads["hidden"] == 96
    with pytest.raises(UserError, match=r"config\.method\.noise\.t\.low: not a key of kind None; set .*kind=Uniform"):
        method_of(phase2, "tiny", "method.noise.t.low=.5")
    with pytest.raises(UserError, match=r"config\.method\.t\.mean: not a key of kind Uniform"):
        method_of(phase1, "tiny", "method.t.mean=.5")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("module", [phase1, phase2])
def test_a_parsed_config_is_plain_json(module, preset):
    values = dataclasses.asdict(parse(module.get_config(preset)))
    again = json.loads(json.dumps(values))
    assert parse(again) == parse(json.loads(json.dumps(dataclasses.asdict(parse(again)))))
    assert make_method(again["method"]) == make_method(values["method"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("steps=0", r"config: steps is 0, expected at least 1"),
        ("batch_size=0", r"config: batch_size is 0, expected at least 1"),
        ("log_every=0", r"config: log_every is 0, expected at least 1"),
        ("checkpoint_every=0", r"config: checkpoint_every is 0, expected at least 1"),
        ("keep=0", r"config: keep is 0, expected at least 1"),
        ("generator_nfe=0", r"config: generator_nfe is 0, expected at least 1"),
        ("sample_every=-1", r"config: sample_every is -1, expected at least 0"),
        ("sample_shift=0", r"config: sample_shift is 0.0, expected a positive number"),
        ("data.clips=0", r"config\.data: clips is 0, expected at least 1"),
        ("data.workers=-1", r"config\.data: workers is -1, expected at least 0"),
        ("guard.clips=0", r"config\.guard: clips is 0, expected at least 1"),
        ("guard.every=-5", r"config\.guard: every is -5, expected at least 0"),
        ("optimizers.generator.b1=1", r"config\.optimizers\.generator: b1 is 1.0, expected less than 1"),
        ("optimizers.heads.learning_rate=-1", r"config\.optimizers\.heads: learning_rate is -1.0, expected at least 0"),
    ],
)
def test_values_out_of_range_are_named(argument, message):
    with pytest.raises(UserError, match=message):
        parse(overridden(phase2.get_config(), argument))


def test_a_method_names_the_key_of_a_bad_value():
    with pytest.raises(UserError, match=r"config\.method\.csds\.t: Uniform\.low and high are 0\.95 and 0\.9"):
        method_of(phase2, "tiny", "method.csds.t.low=.95")


@pytest.mark.parametrize("module", [vae, encoders, teacher, phase1, phase2])
def test_the_preset_is_no_key(module):
    assert "preset" not in module.get_config()
    with pytest.raises(UserError, match=r"config\.preset: unknown key"):
        parse({**plain(module.get_config()), "preset": "tiny"})


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
    assert large.noise.translate_to is None and large.csds.t.translate_to is None
    assert small.noise.translate_to == small.csds.t.translate_to == 21 * 60 * 104 * 16
    lowest = Uniform(0.9, 0.9, translate_to=small.noise.translate_to)(jax.random.key(0), 1)
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
    lazy = SimpleNamespace(batch=method.batch, roles=method.roles, updates=method.updates[:1])
    with pytest.raises(UserError, match=r"trains \['fake_score', 'generator'\], but has updates for \['fake_score'\]"):
        check_roles(lazy, experiment.optimizers)


def test_a_trained_backbone_has_its_optimizer():
    config = phase2.get_config()
    config.method.backbone = "full_copy"
    experiment = parse(config)
    check_roles(make_method(experiment.method), experiment.optimizers)
