"""A teacher's own LoRA: trained here, merged into what a distillation starts from, and told of in what that leaves."""

import json
import shutil
from types import SimpleNamespace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from test_students import TINY, assert_same_clip, loaded

from vpae_jax import cli, convert, sharding
from vpae_jax.config import MeshConfig, parse
from vpae_jax.configs import encoders, lcm, phase1, teacher
from vpae_jax.methods import make_method
from vpae_jax.methods.base import Adapters, Role
from vpae_jax.run import experiment
from vpae_jax.run.first_weights import make_weights
from vpae_jax.run.loras import compare_loras
from vpae_jax.train.blueprint import draw_up
from vpae_jax.train.checkpoint import read_state
from vpae_jax.types import Note, UserError
from vpae_jax.weights.find import find_model
from vpae_jax.weights.layout import LORA_FILE
from vpae_jax.weights.loading import read_part
from vpae_jax.weights.lora_reading import read_lora
from vpae_jax.weights.merging import LoraFile, merged
from vpae_jax.weights.parts import flat
from vpae_jax.weights.writing import from_tree

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
STYLE = "{workdir}/../style/model/" + LORA_FILE
LOW_RANK = {"generator": "lora", "generator_rank": 4, "generator_scale": 1.0, "init": "pretrained", "ema": 0.0}
CONFIG = find_model(TINY).part("transformer").config


def small(module, lora="", **method):
    """A config of two steps on few clips, each of which changes its adapters much."""
    config = module.get_config()
    config.steps, config.checkpoint_every, config.log_every, config.sample_every = 2, 2, 1, 0
    config.batch_size, config.data.clips = 8, 16
    config.model.path, config.model.lora = "tiny", lora
    config.optimizers.generator.learning_rate, config.optimizers.generator.warmup_steps = 0.02, 0
    for name, value in method.items():
        config.method[name] = value
    return config


def train(config, folder):
    experiment.run(parse(config), folder, jax.devices()[:1])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A LoRA of the tiny teacher, and a student of one step that is a LoRA of the two together."""
    folder = tmp_path_factory.mktemp("runs")
    train(small(teacher, steps=2, **LOW_RANK), folder / "style")
    train(small(lcm, f"{STYLE}:0.8", steps=1, **LOW_RANK), folder / "student")
    return folder


def plain():
    return from_tree("transformer", *read_part(TINY, "transformer"))


def with_style(workdir):
    return merged(plain(), [LoraFile(workdir / "style" / "model" / LORA_FILE, 0.8)])


def of_file(folder):
    return from_tree("transformer", *read_part(folder, "transformer"))


def assert_same(found, expected, atol=2e-6):
    for path, shape in expected.shapes().items():
        for layer in range(shape[0] if path.startswith("blocks/") else 1):
            one, other = found.read(path, layer), expected.read(path, layer)
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=atol, err_msg=path)


def test_adapters_are_all_that_a_teachers_lora_trains(workdir):
    state = read_state(workdir / "style", items=("params", "opt", "averages"))
    assert set(state["params"]) == {"generator"} and not state["averages"]
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state["params"]["generator"])}
    assert names == {"lora_a", "lora_b"}
    lora = read_lora(workdir / "style" / "model" / LORA_FILE, CONFIG)
    assert max(np.abs(adapter.product()).max() for adapter in lora.adapters.values()) > 1e-3
    assert_same(of_file(workdir / "style" / "model"), merged(plain(), [LoraFile(workdir / "style/model" / LORA_FILE)]))


def test_a_student_comes_on_top_of_its_teachers_lora(workdir):
    folder = workdir / "student" / "model"
    lora = read_lora(folder / LORA_FILE, CONFIG)
    expected = merged(with_style(workdir), [LoraFile(folder / LORA_FILE)])
    assert_same(of_file(folder), expected)
    key = next(iter(lora.adapters))
    assert np.abs(lora.adapters[key].product()).max() > 1e-3


def test_what_it_leaves_says_so(workdir):
    folder, style = workdir / "student" / "model", workdir / "style" / "model" / LORA_FILE
    card = (folder / "README.md").read_text()
    assert f"| LoRA merged before training | {style.resolve()}:0.8 |" in card
    assert "on the model that this one started from, beside what was merged into that before." in card
    with safe_open(folder / LORA_FILE, "np") as file:
        assert file.metadata()["base_lora"] == f"{style.resolve()}:0.8" and file.metadata()["base"] == str(TINY)
    plain_card = (workdir / "style" / "model" / "README.md").read_text()
    assert "LoRA merged before" not in plain_card and "set_adapters" not in plain_card
    with safe_open(workdir / "style" / "model" / LORA_FILE, "np") as file:
        assert "base_lora" not in file.metadata()


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # which is what is meant
def test_diffusers_stacks_both_as_the_card_says(workdir, monkeypatch):
    folder = workdir / "student" / "model"
    merged_clip = assert_same_clip(folder, monkeypatch)
    code = (folder / "README.md").read_text().split("```python\n")[-1].split("```")[0]
    assert "load_lora_weights" in code and "set_adapters(['teacher_0', 'student'], [0.8, 1.0])" in code
    monkeypatch.chdir(folder)
    # In float32, in which we compute.
    made = {"DiffusionPipeline": SimpleNamespace(from_pretrained=loaded)}
    exec(code, made)
    pipe = made["pipe"]
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    assert (assert_same_clip(folder, monkeypatch, pipe) == merged_clip).all()
    pipe.set_adapters(["student"], [1.0])
    with pytest.raises(AssertionError):  # without the teacher's it is another model
        assert_same_clip(folder, monkeypatch, pipe)


def test_convert_makes_of_the_run_what_the_run_left(workdir, tmp_path):
    cli.run(convert.main, [str(workdir / "student"), str(tmp_path / "out"), "--format=diffusers"])
    assert_same(of_file(tmp_path / "out"), of_file(workdir / "student" / "model"))
    style = (workdir / "style" / "model" / LORA_FILE).resolve()
    assert f"| LoRA merged before training | {style}:0.8 |" in (tmp_path / "out" / "README.md").read_text()


def test_convert_writes_the_students_own_change_or_both(workdir, tmp_path):
    """Of a run from what that started from, its LoRA merged; from another base, all that differs."""
    own, both = tmp_path / "own.safetensors", tmp_path / "both.safetensors"
    common = [str(workdir / "student"), "--format=diffusers", "--as-lora"]
    cli.run(convert.main, [*common, str(own), "--rank=4"])
    cli.run(convert.main, [*common, str(both), "--rank=8", "--base=tiny"])
    trained = read_lora(workdir / "student" / "model" / LORA_FILE, CONFIG)
    style = read_lora(workdir / "style" / "model" / LORA_FILE, CONFIG)
    of_own, of_both = read_lora(own, CONFIG), read_lora(both, CONFIG)
    for path, layer in list(trained.adapters)[::7]:
        kernel = f"{path}/kernel"
        change = trained.change(kernel, layer)
        np.testing.assert_allclose(of_own.change(kernel, layer), change, atol=1e-5)
        whole = change + np.float32(0.8) * style.change(kernel, layer)
        np.testing.assert_allclose(of_both.change(kernel, layer), whole, atol=1e-5)
    for file, told in ((own, True), (both, False)):
        with safe_open(file, "np") as opened:
            assert ("base_lora" in opened.metadata()) == told


def test_a_workdir_keeps_its_lora(workdir):
    for lora, shown in (("", "''"), (f"{STYLE}:0.7", "0.7'")):
        config = small(lcm, lora, steps=1, **LOW_RANK)
        config.steps = 4
        with pytest.raises(UserError, match=r"belongs to another config: model.lora is .* there, .* here") as caught:
            train(config, workdir / "student")
        assert shown in str(caught.value)


@pytest.mark.parametrize("generator", ["full", "lora"])
def test_every_role_of_the_model_directory_has_it(workdir, tmp_path, generator):
    """Each in its own precision, on a mesh; adapters are as they were."""
    config = small(phase1, f"{STYLE}:0.8", generator=generator)
    config.model.frozen_dtype = "bfloat16"
    given = parse(config)
    method, mesh = make_method(given.method), sharding.make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])
    blueprint = draw_up(given, method, mesh, CONFIG)
    weights, _ = make_weights(blueprint, given, workdir / "student", find_model(TINY), blueprint.held)
    expected = with_style(workdir)
    found = {name: flat(weights[name]) for name in ("teacher", "generator")}
    for path in ("blocks/attn1/to_q/kernel", "blocks/norm2/bias"):
        whole = np.stack([expected.read(path, layer) for layer in range(CONFIG.num_layers)])
        value = found["teacher"][path]
        assert value.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(value, np.float32), whole, rtol=2**-8, atol=1e-6)
        if generator == "full":
            np.testing.assert_allclose(found["generator"][path], whole, rtol=1e-5, atol=1e-6)
    assert not any(np.asarray(leaf).any() for path, leaf in flat(weights["fake_score"]).items() if "lora_b" in path)


# What is refused


def test_a_file_that_is_no_lora_of_the_model_is_one_line(workdir, tmp_path):
    style = workdir / "style" / "model"
    save_file(
        {"transformer.blocks.9.attn1.to_q.lora_A.weight": np.ones((4, 192), np.float32)}, tmp_path / "deep.safetensors"
    )
    whole = style / "transformer" / "diffusion_pytorch_model.safetensors"
    for lora, message in {
        f"{tmp_path}/none.safetensors:0.5": "config.model.lora: .*/none.safetensors: no such file; expected LoRA files",
        f"{style / LORA_FILE},": r"config.model.lora: \.: no such file",
        f"{style}": "config.model.lora: .*/model: no such file",
        f"{style / LORA_FILE}:much": "config.model.lora=.*: the strength is 'much', expected a number, such as ",
        f"{whole}": "config.model.lora: .* tensors is part of a LoRA; is it a whole model?",
        f"{tmp_path}/deep.safetensors": "config.model.lora: .* for block 9, but the last of this model is 5",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            train(small(lcm, lora), tmp_path / "run")
        assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_lora_that_no_role_would_have_is_refused(workdir, tmp_path):
    config = encoders.get_config()
    config.model.path, config.model.lora = "tiny", str(workdir / "style" / "model" / LORA_FILE)
    with pytest.raises(UserError, match=r"config.model.lora is .*, but no role starts from the model directory; leave"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_phase_after_one_of_another_lora(tmp_path):
    """Adapters would sit on another teacher; a whole student has another teacher, which is said."""
    before = tmp_path / "before"
    before.mkdir()

    def compare(theirs, ours, roles):
        (before / "config.json").write_text(json.dumps({"model": {} if theirs is None else {"lora": theirs}}))
        config = small(lcm, ours)
        config.previous.workdir = str(before)
        compare_loras(parse(config), tmp_path / "now", roles)

    adapters = {
        "generator": Role("previous", True, adapters=Adapters("teacher", 4, 4.0)),
        "teacher": Role("pretrained"),
    }
    whole = {"generator": Role("previous", True), "teacher": Role("pretrained")}
    style = str(tmp_path / "a.safetensors")
    with pytest.raises(
        UserError, match=r"a.safetensors:1, but empty in the previous phase, .*before, on whose teacher the gen"
    ):
        compare(None, style, adapters)
    with pytest.raises(UserError, match=r"config.model.lora is empty, but \S+a.safetensors:0.5 in the previous phase"):
        compare(f"{style}:0.5", "", adapters)
    with pytest.warns(Note, match=r"is empty, but .*; this run has another teacher than the previous phase"):
        compare(style, "", whole)
    compare(style, f"{style}:1.0", adapters)
    compare("{workdir}/../a.safetensors", style, adapters)
    compare("", "", adapters)
    shutil.rmtree(before)
    config = small(lcm, style)
    config.previous.workdir = str(before)
    compare_loras(parse(config), tmp_path / "now", adapters)
