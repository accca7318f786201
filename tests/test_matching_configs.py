"""The configs of DMD2, its video form, the regression before it, and MagicDistillation."""

import pytest

from vpae_jax.config import parse
from vpae_jax.configs import dmd2, dmd2v, kd, magic
from vpae_jax.configs.common import PRESETS
from vpae_jax.flow.times import VALUES_720P
from vpae_jax.methods import make_method
from vpae_jax.methods.scores import SCORE_TIMES
from vpae_jax.models import presets
from vpae_jax.train.roles import check_roles

MODULES = [dmd2, dmd2v, kd, magic]


def opened(module, preset, **changes):
    config = module.get_config(preset)
    for name, value in changes.items():
        config.method[name] = value
    experiment = parse(config)
    return experiment, make_method(experiment.method)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("module", MODULES)
def test_heads_are_as_wide_as_the_transformer(module, preset):
    experiment, _ = opened(module, preset)
    width = presets.find(experiment.model.preset).transformer.width
    assert {heads["width"] for heads in experiment.networks.values()} <= {width}


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "tiny"])
@pytest.mark.parametrize("module", MODULES)
def test_ranges_of_t_are_stated_for_720p(module, preset):
    _, method = opened(module, preset)
    if module is not kd:
        assert method.matching.t == method.fake_t == SCORE_TIMES and SCORE_TIMES.stated_for == VALUES_720P


def test_dmd2_holds_the_values_of_wans_ports():
    experiment, method = opened(dmd2, "i2v-14b-720p")
    rates = {name: (o.learning_rate, o.b1, o.b2, o.weight_decay) for name, o in experiment.optimizers.items()}
    assert rates == {
        "generator": (2e-6, 0.0, 0.999, 0.01),
        "fake_score": (4e-7, 0.0, 0.999, 0.01),
        "heads": (1e-5, 0.0, 0.999, 0.01),
    }
    assert {o.clip_norm for o in experiment.optimizers.values()} == {10.0}
    assert (method.steps, method.shift, method.fake_updates, method.ema) == (4, 5.0, 5, 0.99)
    assert (method.adversarial_weight, method.disc_weight, method.matching.guidance) == (0.03, 0.03, 5.0)
    assert experiment.networks["heads"]["kind"] == "ca"


def test_both_rows_of_the_table_and_no_discriminator_are_values():
    for steps, solver in ((4, "consistency"), (1, "euler")):
        sampler = opened(dmd2, "i2v-14b-720p", steps=steps)[1].student.sampler
        assert (sampler.solver, sampler.steps) == (solver, steps)
    experiment, method = opened(dmd2, "tiny", adversarial_weight=0.0, disc_weight=0.0)
    check_roles(method, experiment.optimizers)
    assert "heads" not in method.roles


@pytest.mark.parametrize("preset", PRESETS)
def test_the_video_form_has_its_heads_start_and_shifts(preset):
    experiment, method = opened(dmd2v, preset)
    heads = experiment.networks["heads"]
    assert (heads["kind"], heads["hidden"]) == ("conv3d", heads["width"] // 4)
    assert (method.init, method.steps) == ("previous", 1)
    assert experiment.previous.workdir == "{workdir}/../kd" and f"kd.py:{preset} " in experiment.previous.command
    assert method.shift == (1.0 if preset == "tiny" else 10.0)
    if preset != "tiny":
        assert method.matching.t.shift == method.fake_t.shift == 5.0


def test_the_discriminator_of_magic_reads_one_block_at_a_third_of_the_depth():
    taps = {preset: opened(magic, preset)[0].networks["heads"]["taps"] for preset in PRESETS}
    assert taps == {
        "tiny": (2,),
        "t2v-1.3b-480p": (10,),
        **dict.fromkeys(("t2v-14b-480p", "t2v-14b-720p", "i2v-14b-480p", "i2v-14b-720p"), (14,)),
    }
