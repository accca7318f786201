"""A step of the causal methods is the same in one piece and in parts, and on meshes whose devices share a chunk."""

import pytest
import test_meshes
from test_meshes import METHODS as KNOWN
from test_meshes import ONE, SCORES, assert_same, step
from test_parts import in_float64  # noqa: F401  a fixture

from vpae_jax.config import MeshConfig
from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.times import TimeDistribution
from vpae_jax.methods.adversarial import DiscriminatorNoise
from vpae_jax.methods.asd import ASD
from vpae_jax.methods.causal_init import CausalInit, CausalODE
from vpae_jax.methods.scores import DistributionMatching

FRAMEWISE = {"chunks": Chunks(1), "image_dropout": 0.5}
METHODS = {
    "causal_init": CausalInit(**FRAMEWISE, t=TimeDistribution()),
    "causal_ode": CausalODE(**FRAMEWISE, steps=2, ode_steps=2, shift=1.0),
    "asd": ASD(
        **FRAMEWISE,
        matching=DistributionMatching(t=SCORES),
        noise=DiscriminatorNoise("independent", TimeDistribution()),
        fake_t=SCORES,
        fake_updates=1,
        alpha=1.0,
        steps=2,
        shift=1.0,
    ),
}
MESHES = {
    "fsdp 8": MeshConfig(fsdp=8),
    "fsdp 2 x context 4": MeshConfig(fsdp=2, context=4),
    "fsdp 2 x context 2 x tensor 2": MeshConfig(fsdp=2, context=2, tensor=2),
}


@pytest.fixture
def known(monkeypatch):
    """Methods that `step` finds by name, and clips of which eight devices can share a frame's tokens."""
    monkeypatch.setattr(test_meshes, "GRID", (3, 4, 8))
    for name, method in METHODS.items():
        monkeypatch.setitem(KNOWN, name, method)


@pytest.mark.long
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_the_same_on_every_mesh(name, mesh, known, in_float64):  # noqa: F811
    assert_same(step(name, MESHES[mesh]), step(name, ONE), 1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_a_step_in_parts_is_the_same(name, known):
    assert_same(step(name, ONE, accumulation=4), step(name, ONE))
