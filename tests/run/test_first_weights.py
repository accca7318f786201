"""Where roles start: random weights that belong to the role, whichever others are made beside them."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpae_jax import sharding
from vpae_jax.config import Experiment, MeshConfig
from vpae_jax.methods.base import Adapters, Method, Role, Update
from vpae_jax.models.wan_dit import WanTransformerConfig
from vpae_jax.run.first_weights import make_weights
from vpae_jax.train.blueprint import draw_up
from vpae_jax.types import Batch, UserError

SIZES = WanTransformerConfig(
    num_attention_heads=2, attention_head_dim=8, in_channels=16, text_dim=8, freq_dim=8, ffn_dim=16, num_layers=2
)
EXPERIMENT = Experiment(name="fresh", method={}, optimizers={}, steps=1, batch_size=1, seed=3)


class Pair(Method):
    """Two sets of adapters of one shape on one network."""

    batch: ClassVar[type] = Batch

    @property
    def roles(self) -> Mapping[str, Role]:
        fresh = Role("fresh", True, adapters=Adapters("base", 2, 4.0))
        return {"base": Role("pretrained"), "one": fresh, "other": fresh}

    @property
    def updates(self) -> tuple[Update, ...]:
        return (Update(("one", "other"), lambda nets, batch, context: (jnp.zeros(1), {})),)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """First weights of some roles, by the run's seed."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    blueprint, folder = draw_up(EXPERIMENT, Pair(), mesh, SIZES), tmp_path_factory.mktemp("run")

    def make(*names, seed=EXPERIMENT.seed):
        return make_weights(blueprint, dataclasses.replace(EXPERIMENT, seed=seed), folder, None, names)[0]

    return make


def leaves(tree, name):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [np.asarray(leaf) for path, leaf in found if path[-1].key == name]


def test_every_role_has_random_weights_of_its_own(made):
    both = made("one", "other")
    pairs = list(zip(leaves(both["one"], "lora_a"), leaves(both["other"], "lora_a"), strict=True))
    assert pairs and not any((a == b).any() for a, b in pairs)
    for tree in both.values():
        assert not any(leaf.any() for leaf in leaves(tree, "lora_b")), "which change nothing at first"


def test_a_roles_weights_follow_from_the_seed_alone(made):
    both, alone, others = made("one", "other"), made("other"), made("other", seed=4)
    for a, b, c in zip(*(leaves(found["other"], "lora_a") for found in (both, alone, others)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert not (b == c).any()


def test_a_pretrained_role_needs_a_model_directory(made):
    with pytest.raises(UserError, match=r"role base starts from a model directory; set config\.model\.path"):
        made("base")
