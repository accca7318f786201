"""A run of Self-Forcing on the embedded model: what it previews is what its model directory makes."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from short_runs import run, small

from vpae_jax import tasks
from vpae_jax.config import DataConfig
from vpae_jax.configs import self_forcing
from vpae_jax.convert import main as convert
from vpae_jax.media import read_image, write_contact_sheet
from vpae_jax.run.generation import Generation
from vpae_jax.run.previews import CLIPS
from vpae_jax.train.checkpoint import read_state
from vpae_jax.weights.find import find_model
from vpae_jax.weights.loading import read_part


@pytest.mark.long
def test_a_causal_run_is_previewed_exported_and_sampled_alike(tmp_path):
    config = small(self_forcing, init="pretrained", steps=2, fake_updates=1)
    config.sample_every, config.sample_steps = 2, 1
    _, pipe = run(config, tmp_path / "run")
    model, sampler = tmp_path / "run" / "model", pipe.sampler()
    assert json.loads((model / "model_index.json").read_text())["_class_name"] == "CausalWanPipeline"
    assert (sampler.chunks.size, sampler.steps, sampler.solver, sampler.guidance) == (1, 2, "consistency", 1.0)

    # The last row of the run's pictures is its average's, which the directory holds.
    task = tasks.open_task(DataConfig(clips=16), tmp_path / "run", "tiny", {})
    made = Generation(pipe, task.held_out(pipe, "preview", CLIPS))

    def row(sampler):
        clips = made(pipe.denoiser, sampler)[:, [0, 4, 8]]
        write_contact_sheet(tmp_path / "row.png", clips.reshape(-1, *clips.shape[2:]), columns=3 * len(clips))
        return read_image(tmp_path / "row.png").astype(int)

    shown = read_image(tmp_path / "run" / "previews" / "step_000002.png").astype(int)[-48:]
    assert np.abs(row(sampler) - shown).max() <= 1
    assert np.abs(row(replace(sampler, chunks=None)) - shown).max() > 8

    convert([str(tmp_path / "run"), str(tmp_path / "x.pt"), "--format=self_forcing", "--verify"])
    state = read_state(tmp_path / "run", items=("params", "averages"))
    expected = {"generator": state["params"]["generator"], "generator_ema": state["averages"]["generator_ema"]}
    for name, tree in expected.items():
        found = read_part(find_model(tmp_path / "x.pt", find_model(model), name), "transformer", None)[1]
        jax.tree.map(np.testing.assert_array_equal, found, tree)
