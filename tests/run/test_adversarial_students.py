"""Students of ADD, APT, AAD-1's recipe and V-PAE's first version on the embedded model, each from the phase before."""

import pytest
from short_runs import run, small

from vpae_jax.configs import aad, add, apt, dmd2, lcm, pose1, pose2
from vpae_jax.train.checkpoint import read_state
from vpae_jax.types import UserError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.long
def test_add_of_four_steps(tmp_path):
    metrics, pipe = run(small(add, disc_warmup=0), tmp_path / "add")
    assert (pipe.scheduler.steps, pipe.scheduler.solver, pipe.scheduler.guidance) == (4, "consistency", 1.0)
    assert {"heads/logit_gap", "heads/penalty", "generator/csds", "generator/adv_csds_ratio"} <= metrics.keys()
    state = read_state(tmp_path / "add", items=("params", "opt"))
    assert set(state["params"]) == set(state["opt"]) == {"generator", "heads"}


@pytest.mark.long
def test_apt_after_a_consistency_distillation(tmp_path):
    """The discriminator, backbone and all, is trained by optimizers of its own, and no part of what is left behind."""
    with pytest.raises(UserError, match=r"run: python -m vpae_jax\.main --config=configs/lcm\.py:tiny .*=squared"):
        run(small(apt, disc_warmup=0), tmp_path / "apt")
    run(small(lcm, distance="squared"), tmp_path / "apt_init")
    metrics, pipe = run(small(apt, disc_warmup=0, disc_updates=1), tmp_path / "apt")
    assert (pipe.scheduler.steps, pipe.scheduler.solver, pipe.scheduler.guidance) == (1, "euler", 1.0)
    assert {"heads+backbone/penalty", "backbone/update_norm", "heads/update_norm", "generator/adv_grad"} <= set(metrics)
    state = read_state(tmp_path / "apt", items=("params", "averages", "opt"))
    assert set(state["params"]) == set(state["opt"]) == {"generator", "heads", "backbone"}
    assert set(state["averages"]) == {"generator_ema"}


@pytest.mark.long
def test_aad_after_distribution_matching(tmp_path):
    first = small(dmd2, steps=1, adversarial_weight=0.0, disc_weight=0.0, fake_updates=1)
    run(first, tmp_path / "aad_init")
    metrics, pipe = run(small(aad, disc_warmup=0, disc_updates=1), tmp_path / "aad")
    assert (pipe.scheduler.steps, pipe.scheduler.solver) == (1, "euler")
    assert {"heads+backbone/penalty", "generator/adv_grad"} <= metrics.keys()


@pytest.mark.long
def test_both_phases_of_version_one(tmp_path):
    run(small(pose1, fake_updates=1), tmp_path / "pose1")
    metrics, pipe = run(small(pose2, disc_warmup=0, disc_updates=1), tmp_path / "pose2")
    assert (pipe.scheduler.steps, pipe.scheduler.solver) == (1, "euler")
    assert metrics["generator/adv_grad"] > 0 and metrics["generator/csds_grad"] > 0
