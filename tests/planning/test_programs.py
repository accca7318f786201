"""The abstract programs are those of a real run, in everything but the arrays."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpae_jax import config, sharding
from vpae_jax.configs import common, phase1, phase2, phase2_pixels, vae
from vpae_jax.flow.times import VALUES_720P
from vpae_jax.methods import make_method
from vpae_jax.planning import memory
from vpae_jax.planning.clips import SIZES, size_of
from vpae_jax.planning.programs import abstract_batch, draw_up, setting_of, transformer_of, with_setting
from vpae_jax.run import first_weights
from vpae_jax.train.blueprint import draw_up as blueprint_of
from vpae_jax.train.optim import make_optimizer
from vpae_jax.train.state import create
from vpae_jax.types import UserError
from vpae_jax.weights.find import find_model


def described(tree):
    """Shapes, dtypes and places of every leaf, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): (leaf.shape, str(leaf.dtype), leaf.sharding.shard_shape(leaf.shape))
        for path, leaf in leaves
    }


@pytest.fixture(scope="module")
def tiny():
    experiment = config.parse(phase1.get_config())
    return experiment, draw_up(experiment, size_of("tiny"), jax.devices())


def test_the_state_is_that_of_a_run(tiny, tmp_path):
    experiment, drawn = tiny
    method = make_method(experiment.method)
    mesh = sharding.make_mesh(experiment.mesh)
    source = find_model("tiny")
    blueprint = blueprint_of(experiment, method, mesh, transformer_of(experiment))
    made, _ = first_weights.make_weights(blueprint, experiment, tmp_path, source, method.roles)
    frozen = {name: made.pop(name) for name in blueprint.frozen}
    optimizers = {role: make_optimizer(experiment.optimizers[role]) for role in made}
    state = create(experiment.seed, made, method.roles, optimizers)
    assert described(drawn.frozen) == described(frozen)
    assert described(drawn.state.params) == described(state.params)
    assert described(drawn.state.averages) == described(state.averages)
    moments = {path: shape for path, shape in described(state.opt).items() if len(shape[0])}
    abstract = {path: shape for path, shape in described(drawn.state.opt).items() if len(shape[0])}
    assert abstract == moments


def test_memory_by_kind_is_what_lies_on_a_device(tiny):
    _, drawn = tiny
    kept = memory.persistent(drawn)
    assert set(kept) == set(memory.KINDS[:6])
    # Two moments of every trained weight, and a few counters.
    assert 0 <= kept["optimizer"] - 2 * kept["parameters"] < 100
    generator = memory.tree_bytes(drawn.state.params["generator"])
    assert kept["averages"] == generator
    arrays = jax.tree.map(
        lambda s: jax.device_put(jnp.zeros(s.shape, s.dtype), s.sharding), drawn.state.params["generator"]
    )
    first = jax.devices()[0]
    held = sum(
        shard.data.nbytes for a in jax.tree.leaves(arrays) for shard in a.addressable_shards if shard.device == first
    )
    assert held == generator


def test_batches_are_those_of_the_data():
    experiment = config.parse(phase2.get_config("i2v-14b-720p"))
    mesh = sharding.make_mesh(experiment.mesh)
    batch = abstract_batch(experiment, size_of("i2v-14b-720p"), mesh)
    assert batch.latents.shape == (32, 21, 90, 160, 16) and batch.latents.dtype == jnp.bfloat16
    assert batch.condition.text.shape == (32, 512, 4096) and batch.condition.text_mask.dtype == jnp.bool_
    assert batch.condition.image is not None and batch.condition.image.shape == (32, 257, 1280)
    assert batch.condition.frames is not None and batch.condition.frames.shape == (32, 21, 90, 160, 20)
    assert batch.latents.sharding.shard_shape(batch.latents.shape)[0] == 32  # all eight devices share each clip
    assert batch.seed is None
    pairs = abstract_batch(experiment, size_of("i2v-14b-720p"), mesh, seeds=True)
    assert pairs.seed is not None and (pairs.seed.shape, pairs.seed.dtype) == ((32,), jnp.uint32)
    text_only = abstract_batch(config.parse(phase2.get_config("t2v-1.3b-480p")), size_of("t2v-1.3b-480p"), mesh)
    assert text_only.condition.image is None and text_only.condition.frames is None


def test_clips_are_those_of_the_configs():
    assert tuple(SIZES) == common.PRESETS
    assert math.prod(size_of("i2v-14b-720p").latents) == VALUES_720P
    assert size_of("i2v-14b-720p").tokens == 75_600
    assert [size_of("i2v-14b-720p", n).latents[0] for n in (33, 81, 161, 241)] == [9, 21, 41, 61]
    with pytest.raises(UserError, match="--frames is 82, expected one more than a multiple of 4"):
        size_of("i2v-14b-720p", 82)
    with pytest.raises(UserError, match="preset 'i2v-14b-721p' does not exist; did you mean 'i2v-14b-720p'"):
        size_of("i2v-14b-721p")


@pytest.mark.parametrize("preset", common.PRESETS)
@pytest.mark.parametrize("phase", [phase1, phase2])
def test_every_preset_is_drawn_up(phase, preset):
    drawn = draw_up(config.parse(phase.get_config(preset)), size_of(preset), jax.devices())
    assert [u.name for u in drawn.updates] == (
        ["fake_score", "generator"] if phase is phase1 else ["heads", "generator"]
    )
    sizes = {
        role: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(t)) for role, t in drawn.state.params.items()
    }
    expected = {"tiny": 3.8e6, "t2v-1.3b": 1.42e9, "t2v-14b": 14.3e9, "i2v-14b": 16.4e9}
    assert sizes["generator"] == pytest.approx(expected[preset.removesuffix("-480p").removesuffix("-720p")], rel=0.02)


@pytest.mark.parametrize("preset", ["tiny", "t2v-1.3b-480p", "i2v-14b-720p"])
def test_what_a_judge_of_pixels_holds(preset):
    """Decoder and image encoder, frozen, whole on every device; a text-to-video model's encoder is another model's."""
    experiment = config.parse(phase2_pixels.get_config(preset))
    drawn = draw_up(experiment, size_of(preset), jax.devices())
    assert set(drawn.frozen) == {"teacher", "vae", "image_encoder"}
    for role, wanted in {"vae": 127e6, "image_encoder": 632e6}.items():
        leaves = jax.tree.leaves(drawn.frozen[role])
        assert {str(leaf.dtype) for leaf in leaves} == {experiment.model.frozen_dtype}
        assert all(leaf.sharding.is_fully_replicated for leaf in leaves)
        if preset != "tiny":
            assert sum(leaf.size for leaf in leaves) == pytest.approx(wanted, rel=0.01)


def test_settings_change_the_mesh_and_the_recomputation(tiny):
    experiment, drawn = tiny
    asked = setting_of(experiment, drawn.mesh)
    assert (asked.data, asked.fsdp, asked.context, asked.tensor, asked.accumulation) == (1, 8, 1, 1, 1)
    changed = with_setting(experiment, dataclasses.replace(asked, data=2, fsdp=4, remat="full"))
    assert (changed.mesh.data, changed.mesh.fsdp, changed.model.remat) == (2, 4, "full")
    assert "--config.mesh.fsdp=8" in asked.flags and "--config.model.remat=dots" in asked.flags


def test_phases_that_do_not_train_on_clips_are_refused():
    with pytest.raises(UserError, match="vae does not train on encoded clips; plan phase1, phase2 or teacher"):
        draw_up(config.parse(vae.get_config()), size_of("tiny"), jax.devices())
