"""A step of consistency distillation is the same in one piece and in parts, and on a mesh."""

from copy import copy

import jax
import jax.numpy as jnp
import pytest
import test_meshes
from test_meshes import MESHES, ONE, assert_same, step
from test_meshes import METHODS as KNOWN

from vpae_jax.flow.times import TimeDistribution
from vpae_jax.methods.dcm import DCMDetail, DCMSemantic
from vpae_jax.methods.pcm import PCM

DCM = {"points": 10, "shift": 3.0, "split": 6, "image_dropout": 0.5}
METHODS = {
    "pcm": PCM(t=TimeDistribution("grid", points=12, shift=3.0), generator_rank=4, image_dropout=0.5, ema=0.9),
    "dcm_semantic": DCMSemantic(**DCM, coherence_frames=1),
    "dcm_detail": DCMDetail(**DCM, generator_rank=4),
}


@pytest.fixture
def in_float64(monkeypatch):
    """Whatever asks for float32 gets float64, but for a few rows of the heads.

    The gradients of the time embedder are sums over all tokens whose parts cancel. In float32 two orders of summing
    differ by 2e-5 of their largest entry.
    """
    ordinary = test_meshes.experiment_of

    def precise(*args):
        experiment = ordinary(*args)
        model = copy(experiment.model)  # the default is shared by all experiments
        for name in ("dtype", "frozen_dtype"):  # for which a config offers no float64
            object.__setattr__(model, name, "float64")
        object.__setattr__(experiment, "model", model)
        return experiment

    monkeypatch.setattr(jnp, "float32", jnp.float64)
    monkeypatch.setattr(test_meshes, "experiment_of", precise)
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=METHODS)
def method(request, monkeypatch):
    """A method's name, by which `step` finds it."""
    monkeypatch.setitem(KNOWN, request.param, METHODS[request.param])
    return request.param


@pytest.mark.long
def test_a_step_in_parts_is_the_same(method):
    assert_same(step(method, ONE, accumulation=4), step(method, ONE))


@pytest.mark.long
@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_is_the_same_on_every_mesh(method, mesh, in_float64):
    assert_same(step(method, MESHES[mesh]), step(method, ONE), 1e-6)
