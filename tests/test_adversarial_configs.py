"""The configs of ADD, of APT, of AAD-1's recipe, and of V-PAE's first version."""

import dataclasses
import json

import pytest

from vpae_jax.config import parse
from vpae_jax.configs import aad, add, add_pixels, apt, phase1, phase2, phase2_pixels, pose1, pose2
from vpae_jax.configs.common import PRESETS, TINY_TIMES
from vpae_jax.flow.times import VALUES_720P, TimeDistribution
from vpae_jax.methods import make_method
from vpae_jax.methods.add import RENOISED
from vpae_jax.methods.adversarial import DifferencePenalty, DiscriminatorNoise
from vpae_jax.methods.apt import APT, CLEAN, R1
from vpae_jax.methods.scores import SCORE_TIMES
from vpae_jax.models import presets
from vpae_jax.train.roles import check_roles

MODULES = [add, apt, aad, pose1, pose2]
WAN = [name for name in PRESETS if name != "tiny"]


def opened(module, preset, **changes):
    config = module.get_config(preset)
    for name, value in changes.items():
        config.method[name] = value
    experiment = parse(config)
    return experiment, make_method(experiment.method)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("module", MODULES)
def test_every_preset_fits_its_method_and_is_plain_json(module, preset):
    experiment, method = opened(module, preset)
    check_roles(method, experiment.optimizers)
    assert module.__name__ == f"vpae_jax.configs.{experiment.name}"
    again = json.loads(json.dumps(dataclasses.asdict(experiment)))
    assert make_method(parse(again).method) == method
    width = presets.find(experiment.model.preset).transformer.width
    assert {heads["width"] for heads in experiment.networks.values()} <= {width}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("module", "latent", "kind"), [(phase2_pixels, phase2, "ca"), (add_pixels, add, "conv")])
def test_judges_of_pixels_differ_by_what_they_look_at(module, latent, kind, preset):
    """Heads fit the image encoder, which a text-to-video preset takes from another model."""
    (experiment, method), (plain, judged) = opened(module, preset), opened(latent, preset)
    check_roles(method, experiment.optimizers)
    assert module.__name__ == f"vpae_jax.configs.{experiment.name}" and method.sees_pixels
    clean = dataclasses.replace(judged.noise, kind="clean")
    assert method == dataclasses.replace(judged, backbone="image_encoder", noise=clean)
    sizes = presets.find(experiment.model.preset)
    width, taps = (64, (1, 2, 3)) if preset == "tiny" else (1280, (8, 16, 24, 32))
    heads = experiment.networks["heads"]
    assert (heads["width"], heads["hidden"], heads["taps"], heads["kind"]) == (width, width, taps, kind)
    assert bool(experiment.model.image_encoder) == (sizes.image_encoder is None)
    model = dataclasses.replace(plain.model, image_encoder=experiment.model.image_encoder)
    assert experiment.model == model and experiment.optimizers == plain.optimizers


@pytest.mark.parametrize("preset", WAN)
def test_times_are_stated_for_720p(preset):
    method = opened(add, preset)[1]
    assert (method.noise, method.csds.t) == (RENOISED, SCORE_TIMES)
    assert opened(apt, preset)[1].noise == CLEAN
    assert {t.stated_for for t in (RENOISED.t, SCORE_TIMES, CLEAN.t)} == {VALUES_720P}
    assert opened(pose1, preset)[1].t == TimeDistribution(low=0.9, stated_for=VALUES_720P)


def rates(experiment):
    return {name: o.learning_rate for name, o in experiment.optimizers.items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_heads_of_add_read_every_block(preset):
    experiment, _ = opened(add, preset)
    heads, layers = experiment.networks["heads"], presets.find(experiment.model.preset).transformer.num_layers
    assert (heads["kind"], heads["hidden"]) == ("conv", heads["width"] // 4)
    assert heads["taps"] == tuple(range(1, layers + 1))


def test_add_holds_fastgens_values_and_adds_weight():
    experiment, method = opened(add, "i2v-14b-720p")
    assert rates(experiment) == {"generator": 2e-6, "heads": 4e-6}
    assert {(o.b1, o.b2, o.weight_decay) for o in experiment.optimizers.values()} == {(0.9, 0.999, 0.01)}
    assert (method.steps, method.shift, method.csds.weight, method.csds.time_weight) == (4, 5.0, 2.5, "one_minus_t")
    assert (method.pure_noise, method.early_steps) == (0.7, 500)


def test_both_rows_of_add_and_ladd_are_values():
    for steps, solver in ((4, "consistency"), (1, "euler")):
        sampler = opened(add, "i2v-14b-720p", steps=steps)[1].student.sampler
        assert (sampler.solver, sampler.steps) == (solver, steps)
    config = add.get_config()
    config.method.csds.weight = 0.0
    assert make_method(parse(config).method).csds.weight == 0


def test_the_tiny_add_keeps_what_it_does_not_change():
    """A part of a config that is given in part takes the method's own defaults, not those of its kind."""
    method = opened(add, "tiny")[1]
    assert (method.csds.weight, method.csds.time_weight, method.csds.t) == (2.5, "one_minus_t", TINY_TIMES)
    assert method.noise == RENOISED
    assert opened(apt, "tiny")[1].penalty == dataclasses.replace(R1, weight=5.0)


@pytest.mark.parametrize("preset", WAN)
def test_apt_holds_its_values(preset):
    experiment, method = opened(apt, preset)
    assert method == APT() and rates(experiment) == dict.fromkeys(("generator", "heads", "backbone"), 3e-6)
    found = {(o.algorithm, o.rms_decay, o.clip_norm, o.weight_decay) for o in experiment.optimizers.values()}
    assert found == {("rmsprop", 0.9, 0.0, 0.0)}
    assert (experiment.networks["heads"]["kind"], method.ema, experiment.steps) == ("ca", 0.995, 1000)


@pytest.mark.parametrize("preset", WAN)
def test_aad_differs_from_apt_by_its_values(preset):
    experiment, method = opened(aad, preset)
    assert rates(experiment) == {"generator": 4e-7, "heads": 2e-6, "backbone": 1e-6}
    assert method == APT(
        noise=DiscriminatorNoise("shared", TimeDistribution()),
        penalty=DifferencePenalty(20.0, "both", 0.05, 0.0, norm="fixed"),
        ema=0.98,
    )
    taps = experiment.networks["heads"]["taps"]
    assert taps == ((19, 29, 39) if "14b" in preset else (14, 22, 30))
    assert (experiment.steps, experiment.optimizers["heads"].algorithm) == (200, "rmsprop")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("module", "folder", "first"),
    [(apt, "apt_init", "lcm"), (aad, "aad_init", "dmd2"), (pose2, "pose1", "pose1")],
)
def test_where_each_starts(module, folder, first, preset):
    experiment, method = opened(module, preset)
    assert method.init == "previous" and experiment.previous.workdir == f"{{workdir}}/../{folder}"
    assert f"--config=configs/{first}.py:{preset}" in experiment.previous.command


def test_version_one_differs_from_version_two_by_two_readings():
    for preset in WAN:
        one, two = opened(pose1, preset)[1], opened(pose2, preset)[1]
        assert one == dataclasses.replace(opened(phase1, preset)[1], input="anneal")
        t = TimeDistribution(low=1.0, stated_for=VALUES_720P)
        assert two == dataclasses.replace(opened(phase2, preset)[1], noise=DiscriminatorNoise("clean", t))
    low = [float(opened(pose1, "tiny")[1].t.low), opened(pose1, "tiny")[1].anneal_from]
    assert low == [0.9, 0.1]


def test_version_one_by_the_letter_warns():
    config = pose2.get_config()
    config.method.noise.kind, config.method.noise.real = "shared", "clean"
    with pytest.warns(UserWarning, match=r"PhaseTwo\.noise\.t is always 1"):
        make_method(parse(config).method)
