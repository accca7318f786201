"""Runs of PCM and of both of DCM's experts, from config to the same clip in Diffusers; a role that stays as it was."""

import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from test_students import assert_same_clip, loaded, run

from vpae_jax import convert
from vpae_jax.config import parse
from vpae_jax.configs import dcm_detail, dcm_semantic, pcm
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.run import experiment
from vpae_jax.train.checkpoint import read_state
from vpae_jax.train.newest import Moment, newest_whole
from vpae_jax.types import UserError
from vpae_jax.weights.find import find_model
from vpae_jax.weights.loading import read_part

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def bound(folder):
    """What Diffusers loads, with the times that the model card binds to its scheduler, if it does."""
    pipe, times = loaded(folder), load_pipeline(folder).scheduler.bound_times
    if times:
        pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, sigmas=np.array(times))
        assert f"times = numpy.array([{', '.join(f'{t:.9g}' for t in times)}])" in (folder / "README.md").read_text()
    return pipe


@pytest.mark.parametrize(
    ("phases", "times"),
    [
        pytest.param(1, (1, 0), id="1", marks=pytest.mark.long),
        pytest.param(3, (1, 0.66, 0.33, 0), id="3", marks=pytest.mark.long),
        pytest.param(4, (1, 0.75, 0.5, 0.25, 0), id="4", marks=pytest.mark.long),
    ],
)
def test_pcm_is_sampled_where_its_phases_end_in_diffusers_too(tmp_path, monkeypatch, phases, times):
    folder = run(pcm, tmp_path / "pcm", phases=phases)
    scheduler = load_pipeline(folder).scheduler
    assert (scheduler.solver, scheduler.guidance, scheduler.steps) == ("euler", 1.0, phases)
    np.testing.assert_allclose(load_pipeline(folder).sampler().times, times, atol=1e-6)
    assert_same_clip(folder, monkeypatch, bound(folder))
    state = read_state(tmp_path / "pcm", items=("params", "averages"))
    assert set(state["params"]) == {"generator", "heads"} and set(state["averages"]) == {"generator_ema"}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Both trainings of DCM, of two steps each, and then one step more of the first."""
    folder = tmp_path_factory.mktemp("dcm")
    run(dcm_semantic, folder / "dcm_semantic")
    run(dcm_detail, folder / "dcm_detail", generator_rank=4)
    train(dcm_semantic, folder / "dcm_semantic", 3)
    return folder


def train(module, folder, steps, **method):
    """The run of `test_students.run`, continued to so many steps."""
    config = module.get_config()
    config.steps, config.checkpoint_every, config.log_every, config.sample_every = steps, 1, 1, 0
    config.batch_size, config.data.clips, config.score_clips, config.score_every = 8, 16, 8, 0
    for name, value in method.items():
        config.method[name] = value
    experiment.run(parse(config), folder, jax.devices()[:1])


def flat(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def experts(folder):
    return [flat(read_part(folder, name)[1]) for name in ("transformer", "transformer_2")]


def semantic_at(workdir, step):
    return flat(read_state(workdir / "dcm_semantic", Moment(step))["averages"]["generator_ema"])


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[name])


@pytest.mark.long
def test_the_semantic_expert_is_trained_alone_and_sampled_alone(workdir):
    state = read_state(workdir / "dcm_semantic", Moment(2), items=("params", "averages"))
    assert set(state["params"]) == {"generator"}
    model = find_model(workdir / "dcm_semantic" / "model")
    assert model.boundary is None and load_pipeline(model).scheduler.steps == 4
    assert not (workdir / "dcm_semantic" / "start.json").exists()


@pytest.mark.long
def test_a_frozen_role_of_the_phase_before_is_in_no_checkpoint(workdir):
    state = read_state(workdir / "dcm_detail", items=("params", "opt", "averages"))
    assert set(state["params"]) == set(state["opt"]) == {"generator", "heads"}
    assert set(state["averages"]) == {"generator_ema"}
    names = {path.rpartition("[")[2] for path in flat(state["params"]["generator"])}
    assert names == {"'lora_a']", "'lora_b']"}
    assert json.loads((workdir / "dcm_detail" / "start.json").read_text()) == {"previous_step": 2}


@pytest.mark.long
def test_the_guard_judges_both_experts_against_the_semantic_one(workdir):
    found = json.loads((workdir / "dcm_detail" / "guard.json").read_text())
    assert set(found["scores"]) == {"0", "2"} and found["reason"]


@pytest.mark.long
def test_the_model_directory_holds_both_experts(workdir):
    """The frozen one as it was at the step that the run started from, the other one with its adapters merged."""
    folder = workdir / "dcm_detail" / "model"
    high, low = experts(folder)
    assert_equal(high, semantic_at(workdir, 2))
    changed = {name for name in high if (high[name] != low[name]).any()}
    kept = json.loads((workdir / "dcm_detail" / "guard.json").read_text())["kept"]
    assert any("attn1" in name for name in changed) == any("['proj_out']['k" in name for name in changed) == kept
    assert not any("ffn" in name or "bias" in name for name in changed)
    assert find_model(folder).boundary == pytest.approx(0.72)
    pipeline = load_pipeline(folder)
    np.testing.assert_allclose(pipeline.sampler().times, (1, 0.85, 0.7, 0.35, 0), atol=1e-6)
    assert "transformer from t = 0.72 on, transformer_2 below" in (folder / "README.md").read_text()


@pytest.mark.long
def test_both_experts_make_the_same_clip_in_diffusers(workdir, monkeypatch):
    folder = workdir / "dcm_detail" / "model"
    assert_same_clip(folder, monkeypatch, bound(folder))


@pytest.mark.long
def test_a_run_of_two_experts_is_converted_as_it_was_written(workdir, tmp_path):
    """The frozen expert is read from where the run took it: neither the model's transformer nor a later step's."""
    convert.main([str(workdir / "dcm_detail"), str(tmp_path / "out"), "--format=diffusers", "--refused"])
    high, low = experts(tmp_path / "out")
    assert_equal(high, semantic_at(workdir, 2))
    average = read_state(workdir / "dcm_detail")["averages"]["generator_ema"]["blocks"]["attn1"]["to_q"]
    kernel = "['blocks']['attn1']['to_q']['kernel']"
    expected = high[kernel] + 2.0 * np.asarray(average["lora_a"]) @ np.asarray(average["lora_b"])
    np.testing.assert_allclose(low[kernel], expected, atol=1e-6)
    assert np.abs(low[kernel] - high[kernel]).max() > 0
    assert find_model(tmp_path / "out").boundary == pytest.approx(0.72)
    convert.main(
        [str(workdir / "dcm_detail"), str(tmp_path / "raw"), "--format=diffusers", "--refused", "--weights=generator"]
    )
    assert_equal(experts(tmp_path / "raw")[0], high)
    assert (experts(tmp_path / "raw")[1][kernel] != low[kernel]).any()


@pytest.mark.long
def test_a_run_continues_from_the_step_that_it_started_from(workdir, tmp_path):
    """Although the phase before has been trained on since; and says so in one line when that step is gone."""
    for name in ("dcm_semantic", "dcm_detail"):
        shutil.copytree(workdir / name, tmp_path / name)
    train(dcm_detail, tmp_path / "dcm_detail", 3, generator_rank=4)
    high, _ = experts(tmp_path / "dcm_detail" / "model")
    assert_equal(high, semantic_at(workdir, 2))
    assert any((high[name] != leaf).any() for name, leaf in semantic_at(workdir, 3).items())
    shutil.rmtree(tmp_path / "dcm_semantic" / "checkpoints" / "2")
    with pytest.raises(UserError, match=r"no checkpoint of step 2 in .*dcm_semantic, the newest is of step 3"):
        train(dcm_detail, tmp_path / "dcm_detail", 4, generator_rank=4)


@pytest.mark.long
@pytest.mark.parametrize("damage", [b"", b'{"previous_st', b'{"previous_step": "two"}', b"\0" * 30])
def test_a_run_goes_on_whose_start_is_not_known_any_more(workdir, tmp_path, capsys, damage):
    """It says so, takes the phase before as it is now, and stays with that."""
    for name in ("dcm_semantic", "dcm_detail"):
        shutil.copytree(workdir / name, tmp_path / name)
    file = tmp_path / "dcm_detail" / "start.json"
    file.write_bytes(damage)
    train(dcm_detail, tmp_path / "dcm_detail", 2, generator_rank=4)
    newest = newest_whole(tmp_path / "dcm_semantic" / "checkpoints")[0].step
    said = [line for line in capsys.readouterr().out.splitlines() if "start.json" in line]
    assert len(said) == 1 and said[0].startswith(f"{file} cannot be read and was renamed to damaged-start.json; ")
    assert json.loads(file.read_text()) == {"previous_step": newest}
    assert (file.parent / "damaged-start.json").read_bytes() == damage
    assert_equal(experts(file.parent / "model")[0], semantic_at(tmp_path, newest))


def test_the_phase_before_is_asked_for_by_its_command(tmp_path):
    with pytest.raises(UserError, match=r"dcm_detail starts from .* run: python -m .*configs/dcm_semantic\.py:tiny "):
        train(dcm_detail, tmp_path / "dcm_detail", 2)
