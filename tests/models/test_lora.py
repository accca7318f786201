"""Low-rank adapters: no effect when fresh, separable, at the layers that were named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vpae_jax.models.lora import Linear, LoRASpec, attach_lora
from vpae_jax.models.wan_dit import WanTransformer, WanTransformerConfig
from vpae_jax.types import Condition, UserError

CONFIG = WanTransformerConfig(
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=36,
    text_dim=12,
    freq_dim=16,
    ffn_dim=24,
    num_layers=3,
    image_dim=10,
    added_kv_proj_dim=16,
)
SPEC = LoRASpec(rank=4, alpha=2.0)


def inputs():
    keys = jax.random.split(jax.random.key(0), 5)
    condition = Condition(
        text=jax.random.normal(keys[0], (2, 6, 12)),
        text_mask=jnp.ones((2, 6), bool),
        image=jax.random.normal(keys[1], (2, 3, 10)),
        frames=jax.random.normal(keys[2], (2, 1, 4, 4, 20)),
    )
    return jax.random.normal(keys[3], (2, 1, 4, 4, 16)), jnp.array([0.2, 0.9]), condition


@pytest.fixture(scope="module")
def base() -> WanTransformer:
    return make(None)


@pytest.fixture(scope="module")
def adapted() -> WanTransformer:
    return make(SPEC)


def make(lora: LoRASpec | None) -> WanTransformer:
    model = WanTransformer(CONFIG, rngs=nnx.Rngs(0), lora=lora)
    model.proj_out.kernel[...] = jax.random.normal(jax.random.key(9), model.proj_out.kernel.shape)
    return model


def compiled(graph):
    """The model of this graph as a function of its weights, on the same inputs each time."""
    run = jax.jit(lambda states, given: nnx.merge(graph, *states)(*given))
    return lambda *states: run(states, inputs())


def paths(state) -> set[str]:
    return {"/".join(str(part) for part in path) for path, _ in nnx.to_flat_state(state)}


def test_fresh_adapters_change_no_base_path_and_no_base_weight(base, adapted):
    _, lora, rest = nnx.split(adapted, nnx.LoRAParam, nnx.Param)
    assert paths(rest) == paths(nnx.state(base, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(rest), nnx.to_pure_dict(nnx.state(base, nnx.Param)))
    linears = [f"attn{n}/to_{x}" for n in (1, 2) for x in ("q", "k", "v", "out")]
    linears += ["attn2/add_k_proj", "attn2/add_v_proj", "ffn/proj_in", "ffn/proj_out"]
    assert paths(lora) == {f"blocks/{linear}/lora_{x}" for linear in linears for x in "ab"}


def test_fresh_adapters_change_no_output_and_off_is_the_base_model_on_the_same_weights(base, adapted):
    graph, lora, rest = nnx.split(adapted, nnx.LoRAParam, nnx.Param)
    off, adapted_output = compiled(nnx.graphdef(base))(rest), compiled(graph)
    np.testing.assert_allclose(adapted_output(lora, rest), off, rtol=1e-6, atol=1e-6)
    on = adapted_output(jax.tree.map(lambda x: x + 0.1, lora), rest)
    assert float(jnp.abs(on - off).max()) > 1e-3


def test_adapters_add_their_product():
    linear = Linear(5, 7, rngs=nnx.Rngs(0))
    linear.bias[...] = jnp.arange(7.0)
    attach_lora(linear, LoRASpec(rank=3, alpha=6.0, targets=""), rngs=nnx.Rngs(1))
    linear.lora_b[...] = jax.random.normal(jax.random.key(2), (3, 7))
    x = jax.random.normal(jax.random.key(3), (2, 4, 5))
    merged = linear.kernel[...] + 2.0 * linear.lora_a[...] @ linear.lora_b[...]
    np.testing.assert_allclose(linear(x), x @ merged + linear.bias[...], rtol=1e-5, atol=1e-5)


def test_first_values():
    adapted = WanTransformer(CONFIG, rngs=nnx.Rngs(0), lora=LoRASpec(rank=64, alpha=32.0), param_dtype=jnp.bfloat16)
    to_q = adapted.blocks.attn1.to_q
    a, b = to_q.lora_a[...], to_q.lora_b[...]
    assert a.shape == (3, 16, 64) and b.shape == (3, 64, 16)
    assert a.dtype == b.dtype == jnp.float32 and to_q.kernel.dtype == jnp.bfloat16
    assert float(jnp.abs(a).max()) <= 16**-0.5
    assert abs(float(a.std()) - 16**-0.5 / 3**0.5) < 0.01
    assert not b.any() and float(jnp.abs(a[0] - a[1]).max()) > 0.01


def test_b_moves_first(adapted):
    graph, lora, rest = nnx.split(adapted, nnx.LoRAParam, nnx.Param)
    grads = jax.jit(jax.grad(lambda lora, rest, given: jnp.sum(nnx.merge(graph, lora, rest)(*given) ** 2)))(
        lora, rest, inputs()
    )
    for path, grad in nnx.to_flat_state(grads):
        assert bool((grad[...] != 0).any()) == (path[-1] == "lora_b"), path  # while B = 0, A has no effect


def test_adapters_exist_abstractly():
    model = nnx.eval_shape(lambda: WanTransformer(CONFIG, rngs=nnx.Rngs(0), lora=SPEC))
    assert model.blocks.ffn.proj_in.lora_b.shape == (3, 4, 24)


def test_targets():
    spec = LoRASpec(rank=1, alpha=1.0, targets=r"attn2/to_(q|v)$|^proj_out")
    adapted = nnx.eval_shape(lambda: WanTransformer(CONFIG, rngs=nnx.Rngs(0), lora=spec))
    expected = {"blocks/attn2/to_q", "blocks/attn2/to_v", "proj_out"}
    assert paths(nnx.state(adapted, nnx.LoRAParam)) == {f"{path}/lora_{x}" for path in expected for x in "ab"}


@pytest.mark.parametrize(
    "spec, message",
    [
        (LoRASpec(rank=0, alpha=1.0), "rank is 0, expected at least 1"),
        (LoRASpec(rank=4, alpha=1.0, targets="attn3"), "'attn3' match no linear layer; expected paths such as blocks/"),
        (LoRASpec(rank=4, alpha=1.0, targets="("), "is not a regular expression"),
    ],
)
def test_bad_specs_are_named(spec, message):
    with pytest.raises(UserError, match=message):
        nnx.eval_shape(lambda: WanTransformer(CONFIG, rngs=nnx.Rngs(0), lora=spec))
