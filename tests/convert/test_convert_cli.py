"""`python -m vpae_jax.convert`: model directories and training runs to model directories."""

import json

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import random_model
from safetensors.numpy import load_file

from vpae_jax import cli
from vpae_jax.convert.__main__ import SourceParts, main
from vpae_jax.convert.diffusers import read_part
from vpae_jax.convert.settings import Scheduler, read_scheduler

PARTS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    random_model.pipeline(folder, image=False)
    return folder


@pytest.fixture(scope="module")
def workdir(source, tmp_path_factory):
    """What a run that trained the generator and kept its average leaves behind."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text(json.dumps({"model": {"path": str(source)}, "sample_shift": 2.0}))
    _, params = read_part(source, "transformer")
    trained = {"bias": params["proj_out"]["bias"]}
    state = {"step": jnp.int32(3), "params": {}, "ema": {}}
    for number, kind in enumerate(("params", "ema"), 1):
        state[kind]["generator"] = {**params, "proj_out": {**params["proj_out"], "bias": trained["bias"] + number}}
    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        manager.save(3, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
    return folder


def fails(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(main, [str(argument) for argument in arguments])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_a_model_directory_is_written_anew(source, tmp_path, capsys):
    main([str(source), str(tmp_path / "out"), "--format=diffusers", "--verify"])
    assert "transformer: " in capsys.readouterr().out
    for part, stem in PARTS.items():
        theirs, ours = (load_file(folder / part / f"{stem}.safetensors") for folder in (source, tmp_path / "out"))
        assert theirs.keys() == ours.keys()
        assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)


def test_in_another_precision(source, tmp_path):
    main([str(source), str(tmp_path / "out"), "--format=diffusers", "--dtype=bfloat16", "--verify"])
    tensors = load_file(tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype.name for value in tensors.values()} == {"bfloat16"}


@pytest.mark.parametrize("weights, added", [("generator", 1), ("ema", 2), (None, 2)])
def test_a_run_becomes_a_model_directory(source, workdir, tmp_path, weights, added):
    chosen = [] if weights is None else [f"--weights={weights}"]
    main([str(workdir), str(tmp_path / "out"), "--format=diffusers", "--verify", *chosen])
    _, params = read_part(tmp_path / "out", "transformer")
    _, base = read_part(source, "transformer")
    np.testing.assert_array_equal(params["proj_out"]["bias"], base["proj_out"]["bias"] + added)
    np.testing.assert_array_equal(
        params["blocks"]["attn1"]["to_q"]["kernel"], base["blocks"]["attn1"]["to_q"]["kernel"]
    )
    assert read_scheduler(tmp_path / "out") == Scheduler("euler", 2.0)


def test_asking_for_a_part_does_not_read_it(source, monkeypatch):
    monkeypatch.setattr("vpae_jax.convert.__main__.read_part", None)
    parts = SourceParts(source)
    assert "vae" in parts and "image_encoder" not in parts and set(parts) == set(PARTS)


def test_bad_input_is_one_line_and_writes_nothing(source, workdir, tmp_path, capsys):
    out = tmp_path / "out"
    assert "invalid choice: 'wan'" in fails([source, out, "--format=wan"], capsys)
    assert "--format" in fails([source, out], capsys)
    assert "invalid choice: 'best'" in fails([workdir, out, "--format=diffusers", "--weights=best"], capsys)
    assert "not a training run's workdir" in fails([source, out, "--format=diffusers", "--weights=ema"], capsys)
    assert "no such folder" in fails([tmp_path / "none", out, "--format=diffusers"], capsys)
    assert "already exists" in fails([source, source, "--format=diffusers"], capsys)
    assert "unrecognized arguments: --verfy" in fails([source, out, "--format=diffusers", "--verfy"], capsys)
    assert not list(tmp_path.iterdir())


def test_a_run_that_trained_no_generator(workdir, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text((workdir / "config.json").read_text())
    with ocp.CheckpointManager((tmp_path / "run" / "checkpoints").absolute()) as manager:
        state = {"step": jnp.int32(1), "params": {"vae": {"a": jnp.ones(2)}}, "ema": {"vae": {"a": jnp.ones(2)}}}
        manager.save(1, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
    message = fails([tmp_path / "run", tmp_path / "out", "--format=diffusers"], capsys)
    assert "the checkpoint has no generator" in message and not (tmp_path / "out").exists()
