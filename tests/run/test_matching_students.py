"""Students of distribution matching on the embedded model: a few steps, and how what they leave is sampled."""

import jax
import numpy as np
import pytest
from short_runs import run, small

from vpae_jax import encode
from vpae_jax.configs import dmd2, dmd2v, kd, magic
from vpae_jax.tasks.digits.clips import MovingDigits
from vpae_jax.train.checkpoint import read_state
from vpae_jax.train.metrics import read_metrics
from vpae_jax.types import UserError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def distance(one, other):
    return max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


@pytest.mark.long
def test_dmd2_of_four_steps_with_its_fake_score_aligned(tmp_path):
    """Trained on its own simulated steps, and sampled in the same by the directory that it leaves."""
    metrics, pipe = run(small(dmd2, ida=0.9), tmp_path / "dmd2")
    assert (pipe.scheduler.steps, pipe.scheduler.solver, pipe.scheduler.guidance) == (4, "consistency", 1.0)
    assert {"fake_score+heads/diffusion", "fake_score+heads/logit_gap", "generator/adv_dmd_ratio"} <= metrics.keys()
    state = read_state(tmp_path / "dmd2", items=("params", "opt"))
    assert set(state["params"]) == set(state["opt"]) == {"generator", "fake_score", "heads"}
    assert 0 < distance(state["params"]["generator"], state["params"]["fake_score"]) < 0.1


@pytest.mark.long
def test_magic_of_one_step(tmp_path):
    metrics, pipe = run(small(magic, steps=1), tmp_path / "magic")
    assert (pipe.scheduler.steps, pipe.scheduler.solver, pipe.scheduler.guidance) == (1, "euler", 1.0)
    assert {"generator/truth_grad", "generator/adv_grad", "fake_score+heads/diffusion"} <= metrics.keys()
    adapters = read_state(tmp_path / "magic", items=("params",))["params"]["fake_score"]
    assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(adapters)} == {"lora_a", "lora_b"}


@pytest.mark.long
def test_regression_on_a_teachers_clips_and_then_dmd2v(tmp_path):
    """A teacher that takes one step is where the regression starts: at its goal, if each clip meets its own noise."""
    captions = tmp_path / "captions.txt"
    clips = MovingDigits("train", 12, 0)
    captions.write_text("\n".join(clips[number]["caption"] for number in range(12)))
    given = {"captions": captions, "output": tmp_path / "pairs", "batch": 12, "unit": 12, "dtype": "float32"}
    given |= {"steps": 1, "guidance": 1, "solver": "euler", "seed": 2**32 - 100}
    encode.main([f"--{name}={value}" for name, value in given.items()])

    run(small(kd, records=str(tmp_path / "pairs"), image_dropout=1.0), tmp_path / "kd")
    first = read_metrics(tmp_path / "kd")[0]["generator/loss"]
    assert first < 1e-3, "but for the rounding of bfloat16"

    metrics, pipe = run(small(dmd2v), tmp_path / "dmd2v")
    assert (pipe.scheduler.steps, pipe.scheduler.solver) == (1, "euler")
    assert metrics["fake_score+heads/adversarial"] > 0


def test_the_regression_needs_a_teachers_clips(tmp_path):
    """Neither rendered digits nor videos have noise of their own; said before anything is written."""
    reason = "method kd trains on a teacher's clips with known noise; make some with `python -m vpae_jax.encode"
    for videos in ("", str(tmp_path)):
        config = small(kd)
        config.data.videos = videos
        with pytest.raises(UserError, match=reason):
            run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
