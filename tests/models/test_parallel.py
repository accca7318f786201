"""Attention across a mesh equals attention on one device, in values and gradients, with tokens that fill no device."""

from collections import Counter
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import PartitionSpec

from vpae_jax.config import MeshConfig
from vpae_jax.models import kernels
from vpae_jax.models.kernels import reference, splash
from vpae_jax.models.parallel import MeshLayout, Ring, gather, ring_attention
from vpae_jax.models.wan_dit import WanTransformer, WanTransformerConfig
from vpae_jax.planning import flops
from vpae_jax.sharding import TRANSFORMER_RULES, make_mesh
from vpae_jax.types import Condition, UserError

# Mesh, heads, and how the context axis is used.
CASES = {
    "ulysses 8": (MeshConfig(fsdp=1, context=8), 8, (8, 1)),
    "ring 8": (MeshConfig(fsdp=1, context=8), 3, (1, 8)),
    "ulysses 2 x ring 2, tensor 2": (MeshConfig(fsdp=1, context=4, tensor=2), 4, (2, 2)),
    "data 2 x fsdp 2 x ring 2": (MeshConfig(data=2, fsdp=2, context=2), 5, (1, 2)),
}
CLIPS, TOKENS, DIM = 4, 21, 8


def random(*shapes, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("tokens", [TOKENS, 24])
@pytest.mark.parametrize("case", CASES)
def test_self_attention_equals_the_reference(case, tokens):
    config, heads, split = CASES[case]
    layout = MeshLayout(make_mesh(config), heads)
    assert (layout.ulysses, layout.ring) == split
    padded = layout.padded(tokens)
    assert padded % (split[0] * split[1]) == 0 and padded - tokens < split[0] * split[1]
    q, k, v, weight = random(*[(CLIPS, tokens, heads, DIM)] * 4)
    # What stands in the padding must not matter, unless it is seen.
    fill = lambda x: jnp.pad(x, ((0, 0), (0, padded - tokens), (0, 0), (0, 0)), constant_values=7.0)  # noqa: E731

    def across(q, k, v):
        return layout.self_attention(fill(q), fill(k), fill(v), tokens)[:, :tokens]

    def total(function):
        return jax.jit(jax.value_and_grad(lambda *x: (weight * function(*x)).sum(), argnums=(0, 1, 2)))

    np.testing.assert_allclose(jax.jit(across)(q, k, v), reference.attention(q, k, v), atol=2e-6)
    found, expected = total(across)(q, k, v), total(reference.attention)(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, expected)


@pytest.mark.parametrize("platform, aligned, plain", [("cuda", 64, 24), ("gpu", 64, 24), ("tpu", 24, 24)])
def test_gpus_fill_clips_up_to_whole_vectors_of_a_device(monkeypatch, platform, aligned, plain):
    monkeypatch.setattr(MeshLayout, "platform", platform)
    layout = MeshLayout(make_mesh(MeshConfig(fsdp=1, context=8)), 8)
    assert (layout.padded(21), layout.padded(21, aligned=False)) == (aligned, plain)


SPLASH = kernels.Passes(partial(splash.forward, interpret=True), partial(splash.backward, interpret=True))


@pytest.mark.parametrize("size, tokens, dtype", [(2, 40, "float32"), (4, 41, "float32"), (4, 57, "bfloat16")])
def test_a_ring_of_a_tpus_kernels_equals_the_reference(size, tokens, dtype):
    """Of 80 tokens, four devices hold 20 each: some hold padding alone, their own keys or those of a later turn."""
    padded = 40 if size == 2 else 80
    mesh = make_mesh(MeshConfig(fsdp=1, context=size), jax.devices()[:size])
    ring, spec = Ring(1, size, tokens, padded), PartitionSpec(None, "context")
    attend = jax.shard_map(
        lambda q, k, v: ring_attention(q, k, v, ring, SPLASH),
        mesh=mesh,
        in_specs=(spec, spec, spec),
        out_specs=spec,
        check_vma=False,
    )
    q, k, v, weight = (x.astype(dtype) for x in random(*[(1, tokens, 1, 128)] * 4))
    fill = lambda x: jnp.pad(x, ((0, 0), (0, padded - tokens), (0, 0), (0, 0)), constant_values=7.0)  # noqa: E731

    def run(function, *given):
        out, vjp = jax.vjp(function, *given)
        return out, *vjp(weight.astype(out.dtype))

    found = jax.jit(partial(run, lambda q, k, v: attend(fill(q), fill(k), fill(v))[:, :tokens]))(q, k, v)
    expected = run(reference.attention, *(x.astype(jnp.float32) for x in (q, k, v)))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        error = np.linalg.norm(np.asarray(one, np.float32) - other) / np.linalg.norm(other)
        assert error < (2e-6 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize(
    "platform, forward, backward",
    [
        ("cuda", "dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper"),
        ("tpu", "splash_mha_fwd", "splash_mha_dkv"),
    ],
)
@pytest.mark.parametrize("tokens", [32760, 32755])
def test_a_ring_runs_the_accelerators_kernels_alone(monkeypatch, platform, forward, backward, tokens):
    """12 heads on eight devices: four rings of two. Two products forward and five backward for each turn, no tile."""
    monkeypatch.setattr(MeshLayout, "platform", platform)
    layout = MeshLayout(make_mesh(MeshConfig(fsdp=1, context=8)), 12)
    assert (layout.ulysses, layout.ring) == (4, 2)
    x = jax.ShapeDtypeStruct((1, layout.padded(tokens), 12, 128), jnp.bfloat16)

    def gradients(q, k, v, d_out):
        return jax.vjp(lambda q, k, v: layout.self_attention(q, k, v, tokens), q, k, v)[1](d_out)

    program = jax.make_jaxpr(gradients)(x, x, x, x)
    work = flops.count(program)
    assert work.flops == pytest.approx(7 * 2 * 12 * 32760**2 * 128, rel=0.01) and not work.unknown_loops
    found = Counter(called(program.jaxpr))
    assert {name: found[name] for name in (forward, backward)} == {forward: 2, backward: 2}


def called(jaxpr):
    """Names of the primitives, and of Pallas's kernels, in a program and the programs within it."""
    for equation in jaxpr.eqns:
        kernel = equation.primitive.name == "pallas_call"
        # A splash kernel's name says besides whether there are segments and residuals.
        yield "_".join(equation.params["name"].split("_")[:3]) if kernel else equation.primitive.name
        for inner in () if kernel else equation.params.values():
            if isinstance(inner, (Jaxpr, ClosedJaxpr)):
                yield from called(getattr(inner, "jaxpr", inner))


def test_gathered_weights_stay_split_over_tensor_alone():
    mesh = make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))
    layer = {
        "attn1": {"to_q": {"kernel": jnp.ones((8, 16))}, "to_out": {"kernel": jnp.ones((16, 8)), "bias": jnp.ones(8)}}
    }
    found = jax.jit(lambda x: gather(x, TRANSFORMER_RULES, mesh, "blocks/", stacked=True))(layer)["attn1"]
    shapes = jax.tree.map(lambda x: x.addressable_shards[0].data.shape, found)
    assert shapes == {"to_q": {"kernel": (8, 8)}, "to_out": {"kernel": (8, 8), "bias": (8,)}}


def test_cross_attention_exchanges_nothing():
    layout = MeshLayout(make_mesh(MeshConfig(fsdp=2, context=2, tensor=2)), 4)
    q, k, v = random((4, 16, 4, DIM), (4, 5, 4, DIM), (4, 5, 4, DIM))
    bias = jnp.array([[0.0, 1.0, -jnp.inf, 2.0, 0.0]])
    program = jax.jit(layout.cross_attention).lower(q, k, v, bias).compile()
    assert not any(word in program.as_text() for word in ("all-to-all", "collective-permute", "all-gather"))
    np.testing.assert_allclose(program(q, k, v, bias), reference.attention(q, k, v, bias), atol=1e-6)


def test_heads_that_the_tensor_axis_does_not_divide_are_named():
    with pytest.raises(UserError, match=r"config.mesh.tensor is 8, which does not divide the transformer's 12 heads"):
        MeshLayout(make_mesh(MeshConfig(fsdp=1, tensor=8)), 12)


def test_clips_that_do_not_fill_the_mesh_are_on_every_device():
    """A preview of three clips on eight devices."""
    layout = MeshLayout(make_mesh(MeshConfig(fsdp=4, context=2)), 4)
    q, k, v = random(*[(3, 10, 4, DIM)] * 3)
    found = jax.jit(lambda *x: layout.self_attention(*x, 10))(q, k, v)
    np.testing.assert_allclose(found, reference.attention(q, k, v), atol=2e-6)


SIZES = WanTransformerConfig(
    num_attention_heads=2, attention_head_dim=8, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2
)


@cache
def gradient(remat):
    """The gradient's program, traced, and the weights that it takes. So many tokens are attended to by tiles."""
    x, text = random((1, 3, 32, 32, 16), (1, 4, 16))
    condition = Condition(text, jnp.ones((1, 4), bool))
    model = WanTransformer(SIZES, rngs=nnx.Rngs(0), remat=remat)
    model.proj_out.kernel.set_value(jax.random.normal(jax.random.key(1), model.proj_out.kernel.shape))
    graph, weights = nnx.split(model)
    loss = lambda weights: (nnx.merge(graph, weights)(x, jnp.full(1, 0.5), condition) ** 2).mean()  # noqa: E731
    return jax.jit(jax.grad(loss)).trace(weights), weights


@cache
def value(remat):
    traced, weights = gradient(remat)
    return traced.lower().compile()(weights)


@pytest.mark.parametrize(
    "remat", ["full", *(pytest.param(r, marks=pytest.mark.long) for r in ("dots", "attention", "offload"))]
)
def test_recomputing_changes_no_gradient(remat):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), value(remat), value("none"))


def test_offloaded_inputs_of_blocks_leave_the_device():
    """As a TPU runs it; a processor has but one memory."""

    def moved(remat):
        return gradient(remat)[0].lower(lowering_platforms=("tpu",)).as_text().count("pinned_host")

    assert moved("offload") > 0 and moved("full") == 0
