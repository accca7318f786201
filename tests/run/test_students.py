"""Runs whose student is not one full network under one Euler step, from config to the same clip in Diffusers."""

import json
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import torch
from PIL import Image

from vpae_jax.config import parse
from vpae_jax.configs import lcm, phase1, phase2
from vpae_jax.flow.draws import noise_of_seed
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.run import experiment
from vpae_jax.train.checkpoint import read_state
from vpae_jax.types import UserError
from vpae_jax.weights.find import find_model
from vpae_jax.weights.layout import LORA_FILE

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
PROMPT, SEED, LIMIT = "a three moves up", 5, 1 / 255
PICTURE = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
TINY = Path(str(find_model("tiny").path))


def run(module, folder, **method):
    """Two steps on few clips."""
    config = module.get_config()
    config.steps, config.checkpoint_every, config.log_every, config.sample_every = 2, 1, 1, 0
    config.batch_size, config.data.clips, config.score_clips, config.score_every = 8, 16, 8, 0
    for name, value in method.items():
        config.method[name] = value
    experiment.run(parse(config), folder, jax.devices()[:1])
    return folder / "model"


def loaded(folder):
    # The embedded model's encoders are stored in bfloat16, and Transformers would run them in it.
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_same_clip(folder, monkeypatch, pipe=None):
    """Ours and Diffusers', each called without a word on how to sample; `pipe` in place of what the folder holds."""
    ours = load_pipeline(folder)
    noise, key = noise_of_seed(SEED, ours.latent_shape(1))
    steps, guidance = ours.scheduler.steps, ours.scheduler.guidance
    keys = iter(jax.random.split(key, steps))

    def drawn(*args, **kwargs):
        return torch.tensor(np.asarray(jax.random.normal(next(keys), noise.shape))).permute(0, 4, 1, 2, 3)

    monkeypatch.setattr("diffusers.schedulers.scheduling_flow_match_lcm.randn_tensor", drawn)
    expected = (loaded(folder) if pipe is None else pipe)(
        image=Image.fromarray(PICTURE),
        prompt=PROMPT,
        num_frames=9,
        height=48,
        width=48,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=torch.tensor(np.asarray(noise)).permute(0, 4, 1, 2, 3),
        output_type="np",
    ).frames[0]
    found = ours(PROMPT, image=PICTURE, seed=SEED)
    assert np.abs(found / 255 - expected).max() <= LIMIT
    return found


@pytest.mark.long
@pytest.mark.parametrize("steps, solver", [(4, "consistency"), (1, "euler")])
def test_lcm_is_sampled_alike_in_diffusers(tmp_path, monkeypatch, steps, solver):
    """In its own number of steps and without the teacher's guidance, in both."""
    folder = run(lcm, tmp_path / "lcm", steps=steps)
    scheduler = load_pipeline(folder).scheduler
    assert (scheduler.steps, scheduler.solver, scheduler.guidance) == (steps, solver, 1.0)
    assert_same_clip(folder, monkeypatch)


@pytest.mark.long
def test_low_rank_phases_share_one_teacher(tmp_path, monkeypatch):
    """Phase one and phase two of adapters: trained, judged, and written merged and as a LoRA for the teacher."""
    small = {"generator": "lora", "generator_rank": 4, "generator_scale": 2.0}
    folder = run(phase1, tmp_path / "phase1", **small)
    state = read_state(tmp_path / "phase1", items=("params", "opt", "averages"))
    assert set(state["params"]) == {"generator", "fake_score"}
    for tree in (state["params"]["generator"], state["averages"]["generator_ema"]):
        names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
        assert names == {"lora_a", "lora_b"}
    merged = assert_same_clip(folder, monkeypatch)
    teacher = loaded(TINY)
    teacher.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    teacher.load_lora_weights(folder)
    assert (assert_same_clip(folder, monkeypatch, teacher) == merged).all()

    folder = run(phase2, tmp_path / "phase2", disc_warmup=0, **small)
    guard = json.loads((tmp_path / "phase2" / "guard.json").read_text())
    assert set(guard["scores"]) == {"0", "2"} and guard["reason"]
    assert (folder / LORA_FILE).is_file()
    before = state["averages"]["generator_ema"]
    after = read_state(tmp_path / "phase2", items=("params",))["params"]["generator"]
    moved = max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))
    assert 0 < moved <= 2.1 * phase2.get_config().optimizers.generator.learning_rate

    # All of a network does not start from adapters.
    reason = r"generator_ema parameter .* has shape None, .*sizes that it was trained with.*config.method.generator"
    with pytest.raises(UserError, match=reason):
        run(phase2, tmp_path / "full", disc_warmup=0)
