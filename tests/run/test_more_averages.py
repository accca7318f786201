"""Several averages of a generator are kept, and one is chosen after training."""

import jax
import numpy as np
import pytest

from vpae_jax import convert
from vpae_jax.config import parse
from vpae_jax.configs import teacher
from vpae_jax.methods import make_method
from vpae_jax.run import experiment
from vpae_jax.train.checkpoint import read_state
from vpae_jax.types import UserError
from vpae_jax.weights.find import find_model
from vpae_jax.weights.loading import load_part


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = teacher.get_config()
    config.steps, config.checkpoint_every, config.sample_every, config.batch_size = 3, 3, 0, 4
    config.data.clips, config.guard.enabled = 16, False
    config.method.more_emas, config.method.init, config.model.path = (0.5, 0.25), "pretrained", "tiny"
    experiment.run(parse(config), folder, jax.devices()[:1])
    return folder


def kernel(tree):
    return np.asarray(tree["blocks"]["ffn"]["proj_in"]["kernel"])


@pytest.mark.parametrize("weights", ["generator", "ema", "ema_0.5", "ema_0.25"])
def test_each_is_converted_by_its_name(workdir, tmp_path, weights):
    given = [str(workdir), str(tmp_path / "model"), "--format=orbax", f"--weights={weights}"]
    convert.main(given)
    state = read_state(workdir)
    expected = state["params"]["generator"] if weights == "generator" else state["averages"][f"generator_{weights}"]
    found = load_part(find_model(tmp_path / "model"), "transformer", np.float32)
    np.testing.assert_array_equal(np.asarray(found.blocks.ffn.proj_in.kernel[...]), kernel(expected))
    kept = [state["params"]["generator"], *state["averages"].values()]
    assert len({kernel(tree).tobytes() for tree in kept}) == len(kept) == 4


def test_one_that_was_not_kept_is_one_line(workdir, tmp_path):
    with pytest.raises(UserError, match=r"has no such average; it has: ema, ema_0\.25, ema_0\.5"):
        convert.main([str(workdir), str(tmp_path / "model"), "--format=orbax", "--weights=ema_0.9"])
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("decays", [(0.5, 0.5), (0.995,), (1.0,), (0.0,)])
def test_decays_are_checked(decays):
    with pytest.raises(UserError, match=r"more_emas is .*expected different decays"):
        make_method({"name": "vpae_phase1", "ema": 0.995, "more_emas": decays})
