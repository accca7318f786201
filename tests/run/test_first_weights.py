"""Where roles start: random weights that belong to the role, whichever others are made beside them."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_model
from test_students import TINY

from vpae_jax import convert, sharding
from vpae_jax.config import Experiment, MeshConfig, ModelConfig, PreviousConfig
from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.sampler import Sampler
from vpae_jax.methods import make_method
from vpae_jax.methods.base import Adapters, Method, Role, Update
from vpae_jax.models.wan_dit import WanTransformerConfig
from vpae_jax.run.first_weights import find_start, make_weights
from vpae_jax.train.blueprint import draw_up
from vpae_jax.types import Batch, UserError
from vpae_jax.weights.filenames import INDEX
from vpae_jax.weights.find import find_model
from vpae_jax.weights.layout import Contents, write_model
from vpae_jax.weights.loading import read_part
from vpae_jax.weights.settings import Scheduler
from vpae_jax.weights.writing import from_tree

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


def test_a_model_of_two_experts_is_refused_and_one_of_them_is_not(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    convert.main([str(TINY), str(two), "--format=diffusers"])
    shutil.copytree(two / "transformer", two / "transformer_2")
    index = json.loads((two / INDEX).read_text())
    index |= {"transformer_2": index["transformer"], "boundary_ratio": 0.9}
    (two / INDEX).write_text(json.dumps(index))
    start = partial(find_start, workdir=tmp_path)
    experiment = dataclasses.replace(EXPERIMENT, model=ModelConfig(path=str(two)))
    with pytest.raises(UserError, match=f"config.model.path: {two} has two experts, .*convert {two}/transformer DST"):
        start(experiment, make_method({"name": "lcm"}))
    assert (
        start(experiment, make_method({"name": "autoencoder"})).boundary == 0.9
    )  # nothing of it starts from a transformer
    convert.main([str(two / "transformer"), str(one), "--format=diffusers", f"--base={TINY}"])
    experiment = dataclasses.replace(EXPERIMENT, model=ModelConfig(path=str(one)))
    assert start(experiment, make_method({"name": "lcm"})).boundary is None


@pytest.mark.parametrize("name", ("lcm", "flow_matching", "self_forcing"))
def test_a_causal_model_is_no_teacher(name, tmp_path):
    folder = tmp_path / "model"
    causal = dataclasses.replace(Sampler.even(4), chunks=Chunks(1))
    write_model(folder, Contents(find_model(TINY), scheduler=Scheduler.of(causal)))
    experiment = dataclasses.replace(EXPERIMENT, model=ModelConfig(path=str(folder)))
    with pytest.raises(
        UserError, match=f"config.model.path: {folder} is a causal model, but fresh applies it to whole clips"
    ):
        find_start(experiment, make_method({"name": name, "init": "pretrained"}), tmp_path)
    more = find_start(experiment, make_method({"name": "causal_init"}), tmp_path)
    assert more.path == folder


class Later(Method):
    """Trains on what the phase before left."""

    batch: ClassVar[type] = Batch

    def __init__(self, *, adapters: bool = False) -> None:
        self.adapters = adapters

    @property
    def roles(self) -> Mapping[str, Role]:
        roles = {"teacher": Role("pretrained"), "generator": Role("previous", True)}
        own = {"low": Role("previous", True, adapters=Adapters("teacher", 2, 4.0))}
        return roles | (own if self.adapters else {})

    @property
    def updates(self) -> tuple[Update, ...]:
        return (Update(tuple(name for name in self.roles if name != "teacher"), lambda *given: (jnp.zeros(1), {})),)


def started(model, previous, folder, adapters=False):
    """First weights, from a teacher, and another model directory in the place of the phase before."""
    source = find_model(model)
    experiment = dataclasses.replace(EXPERIMENT, previous=PreviousConfig(workdir=str(previous)))
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    blueprint = draw_up(experiment, Later(adapters=adapters), mesh, source.part("transformer").config)
    return make_weights(blueprint, experiment, folder, source, blueprint.models.roles)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two of one size, whose weights differ, and one of another."""
    folders = tmp_path_factory.mktemp("models")
    random_model.pipeline(folders / "teacher", image=False)
    random_model.pipeline(folders / "wider", image=True)
    teacher = find_model(folders / "teacher")
    config, params = read_part(teacher, "transformer")
    moved = from_tree("transformer", config, jax.tree.map(lambda x: x + 1, params))
    write_model(folders / "student", Contents(teacher, {"transformer": moved}))
    return folders


def test_a_model_directory_stands_for_the_phase_before(models, tmp_path):
    found, step = started(models / "teacher", models / "student", tmp_path)
    assert step is None
    for role, folder in (("teacher", "teacher"), ("generator", "student")):
        expected = read_part(models / folder, "transformer")[1]
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found[role], expected)), role


@pytest.mark.parametrize(
    ("previous", "adapters", "message"),
    [
        ("student", True, "is a model directory, but role low is of kind adapters; give the workdir that trained it"),
        ("wider", False, "is a model directory of another size than config.model.path"),
        ("none", False, "there is no checkpoint in .*none"),
    ],
)
def test_what_no_phase_starts_from(models, tmp_path, previous, adapters, message):
    with pytest.raises(UserError, match=message) as error:
        started(models / "teacher", models / previous, tmp_path, adapters)
    assert "\n" not in str(error.value)
