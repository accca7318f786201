"""The mesh and the rules that place parameters on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from vpae_jax.config import MeshConfig
from vpae_jax.models.lora import LoRASpec
from vpae_jax.models.presets import PRESETS
from vpae_jax.models.wan_dit import WanTransformer
from vpae_jax.sharding import AXES, TRANSFORMER_RULES, batch_sharding, make_mesh, param_path, param_shardings
from vpae_jax.types import UserError

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
    with pytest.raises(UserError, match=r"no sharding rule matches parameter a/kernel of shape \(8, 16\)"):
        param_shardings({"a": {"kernel": ARRAY}}, [("bias$", P())], mesh)
    odd = jax.ShapeDtypeStruct((9, 16), jnp.float32)
    with pytest.raises(UserError, match=r"parameter a/kernel: axis of size 9 is not divisible by fsdp=8"):
        param_shardings({"a": {"kernel": odd}}, [("kernel$", P("fsdp", None))], mesh)


@pytest.mark.parametrize("preset", ["tiny", "t2v-1.3b", "i2v-14b"])
def test_the_large_matrices_of_every_preset_are_sharded(preset):
    """What stays replicated is under a hundredth of the weights."""
    config = PRESETS[preset].transformer
    spec = LoRASpec(rank=16, alpha=8.0)
    model = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0), lora=spec))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    mesh = make_mesh(MeshConfig())
    shardings = param_shardings(params, TRANSFORMER_RULES, mesh)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sizes = {param_path(path): leaf.size for path, leaf in leaves}
    whole = {
        param_path(path): sizes[param_path(path)]
        for path, s in jax.tree_util.tree_leaves_with_path(shardings)
        if s.is_fully_replicated
    }
    limit = 0.05 if preset == "tiny" else 0.01
    assert sum(whole.values()) < limit * sum(sizes.values()), sorted(whole, key=whole.get)[-5:]


def test_batches_lie_along_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=2))
    x = jax.device_put(np.zeros((16, 3)), batch_sharding(mesh))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3)}
