"""Checkpoints for Self-Forcing and CausVid: a module like theirs loads them strictly, and we read them back."""

import dataclasses
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import original_wan
import pytest
import random_model
import torch
from folders import bits, same, tensors, values

from vpae_jax import cli
from vpae_jax.convert import main
from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.sampler import Sampler
from vpae_jax.train import checksums
from vpae_jax.weights.find import find_model
from vpae_jax.weights.loading import read_part
from vpae_jax.weights.self_forcing import config_of
from vpae_jax.weights.settings import Scheduler, read_scheduler

CONFIG = Path(__file__).parents[2] / "configs" / "self_forcing.py"


class DiffusionWrapper(torch.nn.Module):
    """How their programs hold a generator: the transformer as `model`, with Wan's own names, and nothing else."""

    def __init__(self, transformer):
        super().__init__()
        self.model = original_wan.Transformer(**transformer.sizes)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A text-to-video model in the original layout, and its transformer in PyTorch."""
    folder = tmp_path_factory.mktemp("original")
    return folder, original_wan.save_folder(folder, image=False).transformer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    random_model.pipeline(folder, image=False)
    return folder


def run_of(folder, base, averaged):
    """What a run of Self-Forcing leaves whose generator, and its average, differ from the base in one bias."""
    folder.mkdir()
    method = {"name": "self_forcing", **({} if averaged else {"ema": 0.0})}
    run = {"name": "sf", "model": {"path": str(base)}, "method": method, "sample_shift": 5.0}
    (folder / "config.json").write_text(json.dumps(run))
    params = read_part(base, "transformer")[1]

    def moved(number):
        return {**params, "proj_out": {**params["proj_out"], "bias": params["proj_out"]["bias"] + number}}

    averages = {"generator_ema": moved(2)} if averaged else {"none": jnp.zeros(1)}
    state = {"step": jnp.int32(3), "params": {"generator": moved(1)}, "averages": averages}
    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        manager.save(3, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
    written = folder / "checkpoints" / "3"
    checksums.write(written, [checksums.of_process(written, 0)])
    return folder


@pytest.fixture(scope="module")
def averaged(base, tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("runs") / "averaged", base, True)


def run(*arguments):
    main([str(argument) for argument in arguments])


def fails(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.run(main, [str(argument) for argument in arguments])
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1, line
    return line


def offset(file, base, weights):
    """What a set's bias differs by from the base's; all else is the base's, to the bit."""
    found = values(find_model(file, find_model(base), weights), "transformer")
    expected = values(base, "transformer")
    (moved,) = {*np.unique(np.round(found.pop("proj_out/bias[0]") - expected.pop("proj_out/bias[0]"), 3))}
    assert same(found, expected)
    return moved


def test_a_module_like_theirs_loads_a_models_transformer(original, tmp_path, capsys):
    folder, transformer = original
    file = tmp_path / "out" / "student.pt"
    run(folder, file, "--format=self_forcing", "--verify")
    assert "generator: 69 tensors read back, bit for bit" in capsys.readouterr().out
    found = torch.load(file, weights_only=True)
    assert list(found) == ["generator"] and [path.name for path in file.parent.iterdir()] == ["student.pt"]
    wrapper = DiffusionWrapper(transformer)
    wrapper.load_state_dict(found["generator"], strict=True)
    assert bits(wrapper.model.state_dict()) == bits(transformer.state_dict())
    assert same(values(find_model(file, find_model(folder)), "transformer"), values(folder, "transformer"))


def test_an_image_to_video_models_too(wan_folder, tmp_path):
    run(wan_folder, tmp_path / "x.pt", "--format=self_forcing", "--dtype=bfloat16")
    found = torch.load(tmp_path / "x.pt", weights_only=True)["generator"]
    expected = {f"model.{name}": value.bfloat16() for name, value in tensors(wan_folder, "transformer").items()}
    assert bits(found) == bits(expected)


@pytest.mark.parametrize(
    ("weights", "offsets"),
    [(None, {"generator_ema": 2, "generator": 1}), ("ema", {"generator_ema": 2}), ("generator", {"generator": 1})],
)
def test_a_runs_average_and_the_generator_itself(averaged, base, tmp_path, capsys, weights, offsets):
    chosen = [] if weights is None else [f"--weights={weights}"]
    run(averaged, tmp_path / "x.pt", "--format=self_forcing", "--verify", *chosen)
    out = capsys.readouterr().out
    assert all(f"{name}: 69 tensors read back" in out for name in offsets)
    assert (
        "for Self-Forcing's config: num_frame_per_block: 3, denoising_step_list: [1000, 750, 500, 250], "
        "warp_denoising_step: true, model_kwargs.timestep_shift: 5.0" in out
    )
    assert list(torch.load(tmp_path / "x.pt", weights_only=True)) == list(offsets)
    assert {name: offset(tmp_path / "x.pt", base, name) for name in offsets} == offsets


def test_a_run_without_an_average_has_the_generator_alone(base, tmp_path):
    folder = run_of(tmp_path / "run", base, False)
    run(folder, tmp_path / "x.pt", "--format=self_forcing")
    assert list(torch.load(tmp_path / "x.pt", weights_only=True)) == ["generator"]
    assert offset(tmp_path / "x.pt", base, "generator") == 1


def test_a_causal_run_is_written_for_no_one_else(averaged, tmp_path, capsys):
    line = fails([averaged, tmp_path / "out", "--format=diffusers"], capsys)
    assert f"{averaged} is a causal model" in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (
            Sampler.even(3, 5.0, 1.0, "consistency"),
            {"denoising_step_list": [1000, 667, 333], "warp_denoising_step": True},
        ),
        (
            Sampler("consistency", (1.0, 0.757, 0.522, 0.2, 0.0)),
            {"denoising_step_list": [1000, 757, 522, 200], "warp_denoising_step": False},
        ),
        (Sampler.even(20, 5.0, 3.0), None),
    ],
)
def test_what_their_config_has_to_say(sampler, expected):
    causal = dataclasses.replace(sampler, chunks=Chunks(4, first=1))
    blocks = {"num_frame_per_block": 4, "independent_first_frame": True}
    times = {} if expected is None else expected | {"model_kwargs.timestep_shift": 5.0}
    assert config_of(Scheduler.of(causal, 5.0)) == blocks | times
    assert config_of(Scheduler.of(sampler, 5.0)) == {}


def test_a_checkpoint_is_the_student_of_a_config(averaged, base, tmp_path, capsys):
    """As their users have it: the file, and a text-to-video model's other parts."""
    run(averaged, tmp_path / "x.pt", "--format=self_forcing")
    given = [tmp_path / "x.pt", tmp_path / "model", f"--base={base}", "--weights=generator_ema"]
    run(*given, "--format=orbax", f"--student={CONFIG}:t2v-1.3b-480p")
    found = read_scheduler(find_model(tmp_path / "model").folder).sampler()
    assert (found.chunks, found.steps, found.solver) == (Chunks(3), 4, "consistency")
    assert offset(tmp_path / "x.pt", base, "generator_ema") == 2
    given[1] = tmp_path / "other"
    line = fails([*given, "--format=diffusers", f"--student={CONFIG}"], capsys)
    assert f"{tmp_path / 'x.pt'} is a causal model" in line
    assert "no such file" in fails([*given, "--format=orbax", "--student=sf.py:tiny"], capsys)
    line = fails([averaged, tmp_path / "other", "--format=orbax", f"--student={CONFIG}"], capsys)
    assert "is a training run, which says how" in line and not (tmp_path / "other").exists()


def test_bad_input_is_one_line_and_writes_nothing(base, tmp_path, capsys, monkeypatch):
    given = [base, tmp_path / "x", "--format=self_forcing"]
    assert "name ends in .pt" in fails(given, capsys)
    given[1] = tmp_path / "x.pt"
    assert "a LoRA file is written for diffusers or wan" in fails([*given, "--as-lora", "--rank=4"], capsys)
    assert "no transformer" in fails([base / "vae", *given[1:]], capsys)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "a PyTorch checkpoint needs PyTorch: pip install torch" in fails(given, capsys)
    assert not list(tmp_path.iterdir())
