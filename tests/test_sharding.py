"""The mesh and the rules that place parameters on it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from vpae_jax.config import MeshConfig
from vpae_jax.models.heads import DiscriminatorHeads
from vpae_jax.models.lora import LoRASpec
from vpae_jax.models.presets import PRESETS
from vpae_jax.models.wan_dit import WanTransformer
from vpae_jax.sharding import (
    AXES,
    HEADS_RULES,
    SPLIT,
    TRANSFORMER_RULES,
    make_mesh,
    param_path,
    param_shardings,
    put_batch,
)
from vpae_jax.types import Batch, Condition, UserError

ARRAY = jax.ShapeDtypeStruct((8, 16), jnp.float32)


def test_mesh_fills_the_open_axis():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}
    assert make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2)).shape["fsdp"] == 2
    assert make_mesh(MeshConfig()).axis_names == AXES


@pytest.mark.parametrize("sizes", [{"fsdp": 3}, {"data": -1}, {"fsdp": 4}, {"data": 16, "fsdp": 1}])
def test_a_mesh_that_does_not_fit_is_named(sizes):
    with pytest.raises(UserError, match=r"config.mesh: .* does not fit 8 devices"):
        make_mesh(MeshConfig(**sizes))


def test_an_unmatched_or_indivisible_parameter_is_named():
    mesh = make_mesh(MeshConfig())
    with pytest.raises(UserError, match=r"no sharding rule matches parameter a/kernel"):
        param_shardings({"a": {"kernel": ARRAY}}, [("bias$", P())], mesh)
    odd = jax.ShapeDtypeStruct((9, 16), jnp.float32)
    with pytest.raises(UserError, match=r"parameter a/kernel: axis of size 9 is not divisible by fsdp=8"):
        param_shardings({"a": {"kernel": odd}}, [("kernel$", P("fsdp", None))], mesh)


def test_a_parameter_that_two_rules_match_is_named():
    with pytest.raises(UserError, match=r"parameter a/kernel is matched by 2 sharding rules: kernel\$, \^a/"):
        param_shardings({"a": {"kernel": ARRAY}}, [("kernel$", P()), ("^a/", P())], make_mesh(MeshConfig()))


@pytest.mark.parametrize("kind", ["ca_mm", "ca", "conv", "conv3d"])
@pytest.mark.parametrize("name", ["tiny", "i2v-14b"])
def test_every_parameter_of_the_heads_has_a_rule_and_the_large_ones_are_sharded(name, kind):
    config = dataclasses.replace(PRESETS[name].heads, kind=kind)
    model = nnx.eval_shape(lambda: DiscriminatorHeads(config, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    shardings = param_shardings(params, HEADS_RULES, make_mesh(MeshConfig(fsdp=4, context=2)))
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True)
    whole = [leaf.size for leaf, place in leaves if place.is_fully_replicated]
    assert sum(whole) < 0.05 * sum(leaf.size for leaf in jax.tree.leaves(params))


def transformers():
    """Every preset's transformer; the tiny one also for text-to-video alone, and one with image positions."""
    tiny = PRESETS["tiny"].transformer
    text = dataclasses.replace(tiny, in_channels=16, image_dim=None, added_kv_proj_dim=None)
    positions = dataclasses.replace(tiny, pos_embed_seq_len=34)
    return {**{name: p.transformer for name, p in PRESETS.items()}, "tiny t2v": text, "tiny flf2v": positions}


def placed(config, **targets):
    """Shapes and specs of the transformer's parameters, with adapters, by path, on a mesh of 4 x 2."""
    spec = LoRASpec(rank=16, alpha=8.0, **targets)
    model = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0), lora=spec))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    shardings = param_shardings(params, TRANSFORMER_RULES, make_mesh(MeshConfig(fsdp=4, tensor=2)))
    shapes = {param_path(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    specs = {param_path(path): s.spec for path, s in jax.tree_util.tree_leaves_with_path(shardings)}
    return shapes, specs


@pytest.mark.parametrize("name", transformers())
def test_every_parameter_has_a_rule_and_the_large_ones_are_sharded(name):
    """Kernels of the blocks lie along all axes of weights, and along SPLIT by their rows, so that a TPU scatters their
    gradients; under a hundredth of all weights is replicated."""
    shapes, specs = placed(transformers()[name])
    kernels = [path for path in shapes if path.startswith("blocks/") and path.endswith("/kernel")]
    assert len(kernels) >= 10 and all(len(shapes[path]) == 3 for path in kernels)
    assert {specs[path] for path in kernels} == {P(None, SPLIT, "tensor"), P(None, ("tensor", *SPLIT), None)}
    assert all(SPLIT in spec for path, spec in specs.items() if "/lora_" in path)
    sizes = {path: int(np.prod(shape)) for path, shape in shapes.items()}
    whole = {path: sizes[path] for path, spec in specs.items() if spec == P()}
    limit = 0.05 if name.startswith("tiny") else 0.01
    assert sum(whole.values()) < limit * sum(sizes.values()), sorted(whole, key=whole.get)[-5:]


def test_adapters_of_any_linear_layer_have_a_rule():
    shapes, specs = placed(PRESETS["tiny"].transformer, targets="")
    assert "condition_embedder/time_proj/lora_a" in shapes and "proj_out/lora_b" in shapes
    assert all(len(spec) <= len(shapes[path]) for path, spec in specs.items())


@pytest.mark.parametrize(
    "path",
    [
        "blocks/attn1/to_qq/kernel",
        "blocks/attn1/to_qq/lora_a",
        "blocks/attn3/to_q/kernel",
        "blocks/ffn/gate/kernel",
        "blocks/norm4/scale",
        "condition_embedder/audio_embedder/kernel",
        "head/kernel",
    ],
)
def test_a_parameter_that_the_transformer_does_not_have_is_named(path):
    with pytest.raises(UserError, match=f"no sharding rule matches parameter {path}"):
        param_shardings({path: ARRAY}, TRANSFORMER_RULES, make_mesh(MeshConfig()))


def test_batches_lie_along_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=2))
    x = put_batch(np.zeros((16, 3)), mesh)
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3)}


def test_the_negative_prompt_is_on_every_device():
    """Its 16 tokens are not clips: three devices share twelve clips, each has the whole prompt."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:3])
    condition = Condition(jnp.zeros((12, 16, 4)), jnp.ones((12, 16), bool), None, None)
    batch = Batch(jnp.zeros((12, 1, 2, 2, 3)), condition, jnp.zeros((16, 4)), jnp.ones(16, bool))
    placed_ = put_batch(batch, mesh)
    assert {s.data.shape for s in placed_.latents.addressable_shards} == {(4, 1, 2, 2, 3)}
    assert {s.data.shape for s in placed_.condition.text.addressable_shards} == {(4, 16, 4)}
    assert {s.data.shape for s in placed_.null_text.addressable_shards} == {(16, 4)}
    assert placed_.null_mask.sharding.is_fully_replicated
