"""Configs: strict parsing, defaults that can be overridden, and one clear line for what is wrong."""

import dataclasses
import json
from typing import Literal

import pytest
from absl import flags
from config_files import CONFIGS, OPENINGS
from ml_collections import ConfigDict, config_flags

from vpae_jax.config import build, complete, parse, parse_sources
from vpae_jax.configs import phase1, phase2, teacher, vae
from vpae_jax.configs.common import PRESETS
from vpae_jax.flow.sampler import Sampler
from vpae_jax.flow.times import VALUES_720P, TimeDistribution
from vpae_jax.methods import METHODS, make_method
from vpae_jax.methods.adversarial import DISC_TIMES
from vpae_jax.methods.base import Adapters, Role
from vpae_jax.methods.scores import SCORE_TIMES
from vpae_jax.train.roles import check_roles
from vpae_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float
    kind_of: Literal["a", "b"] = "a"


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    many: tuple[int, ...] = ()
    other: Inner = Inner(5.0)
    flag: bool = False
    maybe: int | None = None


def test_builds_nested_dataclasses():
    outer = build(Outer, {"inner": {"rate": 1}, "many": [1, 2], "other": Inner(4.0)}, "config")
    assert outer == Outer(Inner(1.0), (1, 2), Inner(4.0))
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
        ({"inner": {"rate": 1}, "maybe": "many"}, r"config\.maybe: expected int, found 'many'"),
        ({"inner": {"rate": 1}, "many": 3}, r"config\.many: expected tuple.*, found 3"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(UserError, match=message):
        build(Outer, values, "config")


@pytest.mark.parametrize("other", [Inner(6.0, "b"), {"rate": 6, "kind_of": "b"}])
def test_complete_makes_every_key_known_and_changes_nothing(other):
    given = {"inner": {"rate": 2}, "other": other}
    full = ConfigDict(complete(Outer, given))
    assert full.to_dict() == {
        "inner": {"rate": 2.0, "kind_of": "a"},
        "many": (),
        "other": {"rate": 6.0, "kind_of": "b"},
        "flag": False,
        "maybe": None,
    }
    assert build(Outer, full.to_dict(), "config") == build(Outer, given, "config")


def overridden(config, *arguments):
    """The config as the training program gets it, with `--config.KEY=VALUE` applied."""
    argv = ["main", *(f"--config.{argument}" for argument in arguments)]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    values(argv)
    return holder.value


def outer(*arguments, **values):
    config = ConfigDict(complete(Outer, {"inner": {"rate": 1}, **values}))
    return build(Outer, overridden(config, *arguments).to_dict(), "config")


def test_what_is_none_can_be_set_and_unset():
    assert outer().maybe is None and outer("maybe=3").maybe == 3
    assert outer(maybe=4).maybe == 4 and outer("maybe=None", maybe=4).maybe is None
    with pytest.raises(UserError, match=r"config\.maybe: expected int, found 'many'"):
        outer("maybe=many")


def test_keys_that_are_left_at_their_defaults_can_be_overridden():
    changed = outer("other.rate=.5", "other.kind_of=b", "many=(1,2)", "flag=true")
    assert changed == Outer(Inner(1.0), (1, 2), Inner(0.5, "b"), True)


def method_of(module, preset, *arguments):
    return make_method(parse(overridden(module.get_config(preset), *arguments)).method)


def test_distributions_of_times_are_reached_from_the_command_line():
    t = lambda *arguments: method_of(phase1, "i2v-14b-480p", *(f"method.{a}" for a in arguments))  # noqa: E731
    assert t("t.low=.5", "t.stated_for=None").t == TimeDistribution(low=0.5)
    normal = t("t.kind=logit_normal", "t.mean=1", "t.low=0").t
    assert normal == TimeDistribution("logit_normal", mean=1.0, stated_for=VALUES_720P)
    grid = t("fake_t.kind=grid", "fake_t.points=9", "fake_t.clip=(0.,1.)").fake_t
    assert grid == TimeDistribution("grid", 0.02, 0.98, points=9, shift=5.0, stated_for=VALUES_720P)
    listed = method_of(teacher, "tiny", "method.t.kind=list", "method.t.values=(1.,.5)", "method.t.weights=(3.,1.)").t
    assert listed == TimeDistribution("list", values=(1.0, 0.5), weights=(3.0, 1.0))
    noise = method_of(phase2, "tiny", "method.noise.t.low=.8", "method.csds.times=discriminator")
    assert noise.noise.t == TimeDistribution(low=0.8) and noise.csds.times == "discriminator"


def test_a_key_of_times_without_effect_is_refused():
    with pytest.raises(UserError, match=r"config\.method\.t: mean=0\.5 has no effect on kind 'uniform'; set mean=0\.0"):
        method_of(phase1, "tiny", "method.t.mean=.5")
    with pytest.raises(UserError, match=r"config\.method\.t: low=0\.9 has no effect on kind 'list'; set low=0\.0"):
        method_of(phase1, "tiny", "method.t.kind=list")


def test_other_defaults_are_reached_from_the_command_line():
    assert method_of(vae, "tiny", "method.ema=.9").ema == 0.9
    assert method_of(teacher, "tiny", "method.ema=0").ema == 0
    assert parse(overridden(phase2.get_config(), "networks.heads.hidden=96")).networks["heads"]["hidden"] == 96


@pytest.mark.parametrize(("name", "preset"), OPENINGS)
def test_a_parsed_config_is_plain_json(name, preset):
    values = dataclasses.asdict(parse(CONFIGS[name].get_config(preset)))
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
        ("keep=0", r"config: keep is 0, expected at least 1"),
        ("sample_every=-1", r"config: sample_every is -1, expected at least 0"),
        ("sample_shift=0", r"config: sample_shift is 0.0, expected a positive number"),
        ("data.clips=0", r"config\.data: clips is 0, expected at least 1"),
        ("data.workers=-1", r"config\.data: workers is -1, expected at least 0"),
        ("score_every=-5", r"config: score_every is -5, expected at least 0"),
        ("score_clips=0", r"config: score_clips is 0, expected at least 1"),
        ("optimizers.generator.b1=1", r"config\.optimizers\.generator: b1 is 1.0, expected less than 1"),
        ("optimizers.heads.learning_rate=-1", r"config\.optimizers\.heads: learning_rate is -1.0, expected at least 0"),
    ],
)
def test_values_out_of_range_are_named(argument, message):
    with pytest.raises(UserError, match=message):
        parse(overridden(phase2.get_config(), argument))


def test_a_method_names_the_key_of_a_bad_value():
    with pytest.raises(UserError, match=r"config\.method\.csds\.t: low and high are 0\.95 and 0\.9"):
        method_of(phase2, "tiny", "method.csds.t.low=.95")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_preset_is_no_key(name):
    module = CONFIGS[name]
    assert "preset" not in module.get_config()
    with pytest.raises(UserError, match=r"config\.preset: unknown key"):
        parse({**module.get_config().to_dict(), "preset": "tiny"})


@pytest.mark.parametrize(("name", "preset"), OPENINGS)
def test_every_preset_fits_its_method(name, preset):
    experiment = parse(CONFIGS[name].get_config(preset))
    check_roles(make_method(experiment.method), experiment.optimizers)
    assert experiment.name == name


def test_every_method_has_a_config():
    assert {module.get_config().method.name for module in CONFIGS.values()} == set(METHODS)


@pytest.mark.parametrize("preset", PRESETS[1:])
def test_presets_of_wan_train_a_lora_of_the_teacher(preset):
    experiment = parse(teacher.get_config(preset))
    method = make_method(experiment.method)
    check_roles(method, experiment.optimizers)
    assert (
        method.roles["generator"].adapters == Adapters("teacher", 32, 32.0) and not method.roles["generator"].averages
    )
    assert method.student.sampler == Sampler.even(50, experiment.sample_shift, 5.0) and method.image_dropout == 0
    whole = method_of(teacher, preset, "method.generator=full")
    assert whole.roles == {"generator": Role("pretrained", True)}


def test_a_lora_of_the_tiny_model_is_two_keys_away():
    method = method_of(teacher, "tiny", "method.init=pretrained", "method.generator=lora", "method.generator_rank=8")
    assert method.roles["generator"].adapters == Adapters("teacher", 8, 4.0)
    with pytest.raises(UserError, match=r"config.method: FlowMatching.generator is 'lora', but init is 'fresh'"):
        method_of(teacher, "tiny", "method.generator=lora")


def test_the_presets_of_14b_hold_the_papers_values():
    one, two = parse(phase1.get_config("i2v-14b-720p")), parse(phase2.get_config("i2v-14b-720p"))
    assert (one.steps, one.batch_size, one.optimizers["generator"].learning_rate) == (500, 32, 1e-6)
    assert (one.optimizers["generator"].b1, one.optimizers["generator"].b2) == (0.9, 0.999)
    assert (two.steps, two.batch_size, two.optimizers["generator"].learning_rate) == (1000, 32, 2e-6)
    assert (two.optimizers["heads"].b1, two.optimizers["heads"].b2) == (0.5, 0.999)
    method = make_method(two.method)
    assert (method.ema, method.csds.weight, method.penalty.sigma_s, method.penalty.sigma_t) == (0.995, 10, 0.01, 0.1)
    assert (two.previous.weights, parse(phase2.get_config()).previous.weights) == ("online", "ema")


@pytest.mark.parametrize("preset", PRESETS)
def test_ranges_of_t_are_stated_for_720p_but_in_the_tiny_preset(preset):
    """So they follow the size of the batch's clips; the tiny preset states its own."""
    one, two = (make_method(parse(phase.get_config(preset)).method) for phase in (phase1, phase2))
    drawn = (one.matching.t, one.fake_t, two.noise.t, two.csds.t)
    if preset == "tiny":
        low = TimeDistribution(low=0.02, high=0.98)
        assert one.input == "pure_noise"  # draws no time
        assert drawn == (low, low, TimeDistribution(), TimeDistribution(low=0.3, high=0.9))
    else:
        assert one.t == TimeDistribution(low=0.9, stated_for=VALUES_720P)
        assert drawn == (SCORE_TIMES, SCORE_TIMES, DISC_TIMES, SCORE_TIMES)


def test_heads_are_those_of_the_preset_and_every_key_can_be_changed():
    config = phase2.get_config("t2v-1.3b-480p")
    assert (config.networks.heads.width, config.networks.heads.num_heads, config.networks.heads.taps) == (
        1536,
        12,
        (14, 22, 30),
    )
    config.networks.heads.kind = "conv"
    config.networks.heads.taps = (10, 20)
    assert parse(config).networks["heads"]["kind"] == "conv"


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

    class Lazy(type(method)):
        @property
        def updates(self):
            return method.updates[:1]

    with pytest.raises(UserError, match=r"trains \['fake_score', 'generator'\], but has updates for \['fake_score'\]"):
        check_roles(Lazy(), experiment.optimizers)


def test_a_trained_backbone_has_its_optimizer():
    config = phase2.get_config()
    config.method.backbone = "full_copy"
    experiment = parse(config)
    check_roles(make_method(experiment.method), experiment.optimizers)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", [("a", None)]),
        ("a=0.5, b = 2", [("a", 0.5), ("b", 2.0)]),
        ("/data/lr=x", [("/data/lr=x", None)]),
        ("/data/lr=x=3", [("/data/lr=x", 3.0)]),
        ("/data/size=48/", [("/data/size=48/", None)]),
        ("/data/size=48=3,b=1", [("/data/size=48", 3.0), ("b", 1.0)]),
        ("gs://bucket/a=b/c", [("gs://bucket/a=b/c", None)]),
    ],
)
def test_a_folder_of_records_may_hold_an_equals_sign(text, expected):
    assert list(parse_sources(text)) == expected


@pytest.mark.parametrize("text", ["a=", "=1", "=", "a=0", "a=-1", "a=inf", "a=nan", "a,,b", "a,"])
def test_weights_that_are_none(text):
    with pytest.raises(UserError, match="is not a folder, or a folder and its weight"):
        parse_sources(text)
