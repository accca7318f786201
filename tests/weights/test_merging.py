"""Changes added to weights: in float32, rounded once, and only to the weights that they are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lora_models import velocities

from vpae_jax.models.lora import LoRASpec
from vpae_jax.models.wan_dit import WanTransformer
from vpae_jax.train.roles import merge_trees
from vpae_jax.types import UserError
from vpae_jax.weights.loading import build, load_part
from vpae_jax.weights.lora import Adapter, Lora, Merged, from_adapters
from vpae_jax.weights.writing import from_tree, write_part

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers", "ignore::DeprecationWarning:diffusers")


def test_merging_adds_in_float32_and_keeps_dtypes(t2v):
    half = from_tree("transformer", t2v.config, jax.tree.map(lambda x: x.astype(jnp.bfloat16), t2v.params))
    merged = Merged(half, t2v.lora, 0.7)
    path, adapter = "blocks/attn2/to_out/kernel", t2v.lora.adapters["blocks/attn2/to_out", 1]
    expected = half.read(path, 1).astype(np.float32) + np.float32(0.7) * (adapter.a @ adapter.b)
    assert merged.dtype(path, 1) == jnp.bfloat16 and merged.read(path, 1).dtype == np.float32
    np.testing.assert_array_equal(merged.read(path, 1), expected)
    np.testing.assert_array_equal(merged.read("blocks/norm2/bias", 0), half.read("blocks/norm2/bias", 0))
    assert merged.config == t2v.config
    assert merged.shapes() == half.shapes()
    assert list(merged.extras("wan")) == []


def test_merging_refuses_another_model(t2v, i2v):
    with pytest.raises(UserError, match=r"changes \S*add_k_proj/kernel of layer 0, .* has no such parameter"):
        Merged(t2v.teacher, i2v.lora)
    wide = Lora({("proj_out", 0): Adapter(np.zeros((25, 2), np.float32), np.zeros((2, 64), np.float32))})
    with pytest.raises(UserError, match=r"with shape \[25, 64\], but this model has shape \[24, 64\] there"):
        Merged(t2v.teacher, wide)
    with pytest.raises(UserError, match=r"of layer 2, .* has no such parameter"):
        Merged(t2v.teacher, Lora({("blocks/ffn/proj_in", 2): t2v.lora.adapters["blocks/ffn/proj_in", 0]}))


def test_adapters_of_training_merge(made, tmp_path):
    spec = LoRASpec(rank=3, alpha=6.0, targets=r"^(?!patch)")
    shapes = nnx.eval_shape(lambda: WanTransformer(made.config, rngs=nnx.Rngs(0), lora=spec))
    graph, adapters, _ = nnx.split(shapes, nnx.LoRAParam, nnx.Param)
    draw = np.random.default_rng(2).standard_normal
    adapters = jax.tree.map(lambda x: jnp.asarray(0.3 * draw(x.shape), jnp.float32), nnx.to_pure_dict(adapters))
    lora = from_adapters(adapters, spec.alpha, spec.rank)
    assert lora.adapters.keys() == made.lora.adapters.keys()
    write_part(tmp_path, "transformer", Merged(made.teacher, lora))
    trained = nnx.merge(graph, merge_trees(made.params, adapters))
    base = build("transformer", made.config, made.params)
    found, expected, without = velocities(made.config, [], [load_part(tmp_path, "transformer"), trained, base])
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert np.abs(without - expected).max() > 0.1


def test_adapters_of_training_refuse():
    half = {"proj_out": {"lora_a": np.zeros((24, 3), np.float32)}}
    with pytest.raises(UserError, match="proj_out: has lora_a only; the checkpoint is damaged"):
        from_adapters(half, 1.0, 3)
    with pytest.raises(UserError, match="no lora_a or lora_b among the weights"):
        from_adapters({"proj_out": {"kernel": np.zeros((24, 3), np.float32)}}, 1.0, 3)
    whole = {"proj_out": {"lora_a": np.zeros((24, 3), np.float32), "lora_b": np.zeros((3, 64), np.float32)}}
    with pytest.raises(UserError, match="proj_out: adapters of rank 3, expected 4"):
        from_adapters(whole, 1.0, 4)
