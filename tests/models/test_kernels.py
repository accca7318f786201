"""Attention kernels against PyTorch and against attention written out; their memory, what a checkpoint keeps."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AbstractDevice, AbstractMesh

from vpae_jax.models import kernels
from vpae_jax.models.kernels import reference, splash, splash_kernel, tiled
from vpae_jax.models.kernels.chunk_mask import ChunkMask, Seen
from vpae_jax.planning import flops


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def qkv(n, m, b=2, heads=2, head_dim=16, dtype=jnp.float32):
    """Queries, keys, values and a gradient for the result."""
    shapes = ((b, n, heads, head_dim), (b, m, heads, head_dim), (b, m, heads, head_dim), (b, n, heads, head_dim))
    return tuple(jnp.asarray(draw(seed, *shape), dtype) for seed, shape in enumerate(shapes))


def make_bias(kind, m, b=2):
    """No bias, hidden keys that differ between the clips, or one logarithm of counts for all."""
    hidden = jnp.where(jnp.asarray(draw(9, b, m)) > 0.5, -jnp.inf, 0)
    return {"none": None, "hidden": hidden, "counts": jnp.log(jnp.arange(1.0, m + 1))[None]}[kind]


@jax.jit
def exact(q, k, v, bias, d_out):
    """Result and gradients of the attention written out."""
    out, vjp = jax.vjp(lambda q, k, v: reference.attention(q, k, v, bias), q, k, v)
    return out, *vjp(d_out)


def result_and_gradients(attention, q, k, v, bias, d_out):
    out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, bias), q, k, v)
    return out, *vjp(d_out)


def distance(found, expected):
    """Relative, in the 2-norm."""
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def torch_attention(q, k, v, bias=None):
    q, k, v = (torch.tensor(np.asarray(x, np.float32)).transpose(1, 2) for x in (q, k, v))
    mask = None if bias is None else torch.tensor(bias)[:, None, None, :].expand(q.shape[0], 1, q.shape[2], -1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).numpy()


@pytest.mark.parametrize("keys", [1, 9, 27])
@pytest.mark.parametrize("biased", [False, True])
def test_the_reference_equals_pytorchs(keys, biased):
    q, k, v = draw(0, 2, 9, 3, 8), draw(1, 2, keys, 3, 8), draw(2, 2, keys, 3, 8)
    bias = draw(3, 2, keys) if biased else None
    found = kernels.attention(*map(jnp.asarray, (q, k, v)), None if bias is None else jnp.asarray(bias))
    np.testing.assert_allclose(found, torch_attention(q, k, v, bias), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", [reference.attention, tiled.attention])
def test_a_bias_is_the_logarithm_of_a_count(attention):
    q, k, v, _ = qkv(5, 5)
    bias = jnp.log(jnp.array([[1.0, 1.0, 0.0, 3.0, 1.0]]))
    repeats = jnp.array([0, 1, 3, 3, 3, 4])
    np.testing.assert_allclose(
        attention(q, k, v, bias), attention(q, k[:, repeats], v[:, repeats]), rtol=1e-5, atol=1e-6
    )
    gradient = jax.grad(lambda k: attention(q, k, v, bias).sum())(k)
    assert bool(jnp.isfinite(gradient).all()) and not gradient[:, 2].any()


@pytest.mark.parametrize("attention", [reference.attention, tiled.attention])
def test_softmax_is_float32_in_bfloat16(attention):
    q, k, v, _ = qkv(300, 300, 1, 1, dtype=jnp.bfloat16)
    found = attention(q, k, v)
    assert found.dtype == jnp.bfloat16
    assert distance(found, torch_attention(q, k, v)) < 6e-3  # a sum accumulated in bfloat16 is off by 5e-2


@pytest.mark.parametrize("kind", ["none", "hidden", "counts"])
@pytest.mark.parametrize("n, m", [(1, 3), (64, 40), (80, 77)])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 1.5e-2)])
def test_tiles_equal_the_whole(monkeypatch, kind, n, m, dtype, tolerance):
    monkeypatch.setattr(tiled, "TILE", 32)
    *given, d_out = qkv(n, m, heads=1, dtype=dtype)
    bias = make_bias(kind, m)
    expected = exact(*(x.astype(jnp.float32) for x in given), bias, d_out.astype(jnp.float32))
    found = result_and_gradients(tiled.attention, *given, bias, d_out)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert distance(one, other) < tolerance


def test_large_logits_do_not_overflow(monkeypatch):
    monkeypatch.setattr(tiled, "TILE", 16)
    q, k, v, d_out = qkv(40, 50)
    for one, other in zip(
        result_and_gradients(tiled.attention, 100 * q, 10 * k, v, None, d_out),
        exact(100 * q, 10 * k, v, None, d_out),
        strict=True,
    ):
        assert distance(one, other) < 1e-4


def combine(parts):
    """Attention to all keys from results and log-sum-exps of attentions to some of them."""
    lse = jax.nn.logsumexp(jnp.stack([lse for _, lse in parts]), axis=0)
    shares = [jnp.swapaxes(jnp.exp(part - lse), 1, 2)[..., None] for _, part in parts]
    return sum(out * share for (out, _), share in zip(parts, shares, strict=True)), lse


@pytest.mark.parametrize("hide", [False, True])
def test_parts_of_the_keys_make_the_whole(monkeypatch, hide):
    monkeypatch.setattr(tiled, "TILE", 32)
    q, k, v, d_out = qkv(50, 90)
    bias = make_bias("hidden", 90)
    if hide:
        bias = bias.at[:, 40:70].set(-jnp.inf)
    cuts = [slice(0, 40), slice(40, 70), slice(70, 90)]
    parts = [tiled.forward(q, k[:, cut], v[:, cut], bias[:, cut]) for cut in cuts]
    if hide:
        assert not parts[1][0].any() and bool((parts[1][1] == -jnp.inf).all())
    out, lse = combine(parts)
    whole = exact(q, k, v, bias, d_out)
    assert distance(out, whole[0]) < 2e-6
    gradients = [tiled.backward(q, k[:, cut], v[:, cut], bias[:, cut], out, lse, d_out) for cut in cuts]
    dq, dk, dv = zip(*gradients, strict=True)
    for found, expected in zip((sum(dq), jnp.concatenate(dk, 1), jnp.concatenate(dv, 1)), whole[1:], strict=True):
        assert distance(found, expected) < 2e-6


def test_without_a_visible_key_everything_is_zero():
    q, k, v, d_out = qkv(5, 7)
    bias = jnp.full((2, 7), -jnp.inf)
    out, lse = tiled.forward(q, k, v, bias)
    assert not out.any() and bool((lse == -jnp.inf).all())
    assert not any(x.any() for x in tiled.backward(q, k, v, bias, out, lse, d_out))


@pytest.mark.parametrize("n", [20, 600])
def test_the_bias_is_a_constant(n):
    q, k, v, _ = qkv(n, n)
    assert not jax.grad(lambda bias: kernels.attention(q, k, v, bias, "cpu").sum())(make_bias("counts", n)).any()


def test_memory_grows_with_the_tokens():
    def temporary(n):
        x = jax.ShapeDtypeStruct((1, n, 2, 32), jnp.float32)
        gradients = jax.grad(lambda q, k, v: kernels.attention(q, k, v, platform="cpu").sum(), argnums=(0, 1, 2))
        return jax.jit(gradients).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(8192), temporary(32768)
    assert large < 4.1 * small
    assert large < 32768**2  # all logits of one head are four times that


def test_checkpoint_keeps_the_residuals():
    q, k, v, _ = qkv(2048, 2048, 1, 1)

    def exponentials(policy):
        """Tiles of exponentials in the program for the gradient: one forward, one backward."""
        block = jax.checkpoint(
            lambda q: jnp.sin(kernels.attention(jnp.sin(q), k, v, platform="cpu")).sum(), policy=policy
        )
        return len(re.findall(r"f32\[512,512\] = exp ", str(jax.make_jaxpr(jax.grad(block))(q))))

    nothing, everything = jax.checkpoint_policies.nothing_saveable, jax.checkpoint_policies.everything_saveable
    named = jax.checkpoint_policies.save_only_these_names(kernels.RESIDUALS)
    assert exponentials(everything) == exponentials(named) == exponentials(kernels.save_attention) == 2
    assert exponentials(nothing) == 3


@pytest.mark.parametrize(
    "kind, n, m, dtype",
    [
        ("none", 128, 128, jnp.float32),
        ("none", 130, 140, jnp.bfloat16),
        ("hidden", 130, 70, jnp.float32),
        ("counts", 128, 130, jnp.bfloat16),
    ],
)
def test_splash_equals_the_whole(monkeypatch, kind, n, m, dtype):
    monkeypatch.setattr(splash_kernel, "SMALL", (128,))
    *given, d_out = qkv(n, m, heads=1, head_dim=128, dtype=dtype)
    bias = make_bias(kind, m)
    expected = exact(*(x.astype(jnp.float32) for x in given), bias, d_out.astype(jnp.float32))
    found = result_and_gradients(lambda *x: splash.attention(*x, interpret=True), *given, bias, d_out)
    for one, other in zip(found, expected, strict=True):
        assert distance(one, other) < (2e-6 if dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize("biased", [False, True])
def test_checkpoint_keeps_splashs_residuals(biased):
    def kernel_calls(policy):
        """Kernels in the program that a TPU would get."""

        def block(x, bias):
            return jnp.sin(kernels.attention(jnp.sin(x), x, x, bias if biased else None, "tpu"))

        def loss(x, bias):
            step = jax.checkpoint(block, policy=policy)
            return jax.lax.scan(lambda x, _: (step(x, bias), None), x, None, length=2)[0].sum()

        given = jax.ShapeDtypeStruct((1, 1100, 1, 128), jnp.bfloat16), jax.ShapeDtypeStruct((1, 1100), jnp.float32)
        program = jax.jit(jax.grad(loss)).trace(*given).lower(lowering_platforms=("tpu",)).as_text()
        return sorted(re.findall(r'kernel_name = "splash_mha_([a-z]+)', program))

    assert kernel_calls(jax.checkpoint_policies.nothing_saveable) == ["dkv", "fwd", "fwd"]
    assert kernel_calls(jax.checkpoint_policies.save_only_these_names(kernels.RESIDUALS)) == ["dkv", "fwd"]
    assert kernel_calls(kernels.save_attention) == ["dkv", "fwd"]


@pytest.mark.parametrize(
    "kind, vmem, at_once", [("TPU v5", 48, 12), ("TPU v6 lite", 48, 12), ("TPU v4", None, 6), ("TPU v99", None, 4)]
)
def test_splash_suits_the_chip(kind, vmem, at_once):
    """One forward and one backward kernel, of two and five products, with the vector memory that the chip's tiles need.
    The parts of dQ are 134 MB a head, or 268 MB with small tiles: as many heads at once as their memory holds."""
    x = jax.ShapeDtypeStruct((1, 32760, 12, 128), jnp.bfloat16)

    def gradients(q, k, v, d_out):
        return jax.vjp(lambda q, k, v: kernels.attention(q, k, v, platform="tpu"), q, k, v)[1](d_out)

    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice(kind, 1, "tpu"))):
        traced = jax.jit(gradients).trace(x, x, x, x)
        program = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert sorted(re.findall(r'kernel_name = "splash_mha_([a-z]+)', program)) == ["dkv", "fwd"]
    limits = re.findall(r"scoped_memory_configs[^]]*size[^0-9]*22[^0-9]*(\d+)", program)
    assert limits == ([] if vmem is None else [str(vmem * 2**20)] * 2)
    work, one = flops.count(traced.jaxpr), 2 * 12 * 32768**2 * 128
    assert work.flops == pytest.approx(7 * one, rel=1e-3) and work.model_flops == pytest.approx(6 * one, rel=1e-3)
    tiles = 16 if vmem else 32
    assert f"bf16[{at_once},{tiles},1,32768,128]" in str(traced.jaxpr)


@pytest.mark.parametrize(
    "n, tile, padded", [(75600, 2048, 75776), (32760, 2048, 32768), (9450, 1920, 9600), (70, 128, 128)]
)
def test_tiles_pad_little(monkeypatch, n, tile, padded):
    monkeypatch.setattr(splash_kernel, "tiles", lambda: splash_kernel.TILES["v5p"])
    assert (splash_kernel.tile(n), splash_kernel.whole_tiles(n)) == (tile, padded)


LONG, TEXT = (1, 9450, 40, 128), (1, 512, 40, 128)


@pytest.mark.parametrize(
    "platform, q, k, dtype, expected",
    [
        ("cpu", (1, 80, 6, 32), (1, 80, 6, 32), "float32", "reference"),
        ("tpu", (1, 3, 4, 128), (1, 600, 4, 128), "float32", "reference"),
        ("cpu", LONG, LONG, "float32", "tiled"),
        ("cpu", LONG, TEXT, "float32", "tiled"),
        ("tpu", LONG, LONG, "bfloat16", "splash"),
        ("tpu", LONG, TEXT, "bfloat16", "splash"),
        ("tpu", LONG, LONG, "float32", "splash"),
        ("tpu", (1, 4096, 16, 64), (1, 4096, 16, 64), "bfloat16", "tiled"),
        ("gpu", LONG, LONG, "bfloat16", "cudnn"),
        ("cuda", LONG, TEXT, "float16", "cudnn"),
        ("cuda", LONG, LONG, "float32", "tiled"),
        ("gpu", (1, 4096, 16, 60), (1, 4096, 16, 60), "bfloat16", "tiled"),
        ("gpu", (1, 4096, 1, 384), (1, 4096, 1, 384), "bfloat16", "tiled"),
    ],
)
def test_which_kernel_serves(platform, q, k, dtype, expected):
    assert kernels.choose(platform, q, k, jnp.dtype(dtype)) == expected


def hidden_from(visible, attention, q, k, v, d_out):
    """Result and gradients, compiled for any number of visible keys."""

    @jax.jit
    def program(visible, q, k, v, d_out):
        out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, visible), q, k, v)
        return out, *vjp(d_out)

    return program(jnp.int32(visible), q, k, v, d_out)


def assert_hidden_from(visible, found, q, k, v, d_out):
    """The visible keys alone give the result; those beyond get no gradient."""
    mask = jnp.where(jnp.arange(k.shape[1]) < visible, 0.0, -jnp.inf)[None]
    np.testing.assert_allclose(found[0], torch_attention(q, k, v, mask), rtol=1e-5, atol=5e-6)
    expected = exact(q, k[:, :visible], v[:, :visible], None, d_out)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=5e-6)
    for one, other in zip(found[2:], expected[2:], strict=True):
        np.testing.assert_allclose(one[:, :visible], other, rtol=1e-5, atol=5e-6)
        assert not one[:, visible:].any()


@pytest.mark.parametrize("visible", [1, 32, 45, 77])
@pytest.mark.parametrize("name, small", [("reference", 2**20), ("tiled", 0)])
def test_keys_are_hidden_from_a_number_on(monkeypatch, name, small, visible):
    monkeypatch.setattr(kernels, "SMALL_LOGITS", small)
    monkeypatch.setattr(tiled, "TILE", 32)
    given = qkv(50, 77)
    assert kernels.choose("cpu", given[0].shape, given[1].shape, jnp.float32) == name
    found = hidden_from(visible, lambda q, k, v, n: kernels.attention(q, k, v, platform="cpu", visible=n), *given)
    assert_hidden_from(visible, found, *given)


@pytest.mark.parametrize(
    "visible, n, m",
    [
        (100, 130, 140),
        (130, 64, 256),
        *(pytest.param(*x, marks=pytest.mark.long) for x in ((1, 3, 7), (256, 130, 256))),
    ],
)
def test_splash_hides_keys_from_a_number_on(monkeypatch, visible, n, m):
    """Within a tile, and in whole tiles."""
    monkeypatch.setattr(splash_kernel, "SMALL", (128,))
    given = qkv(n, m, heads=1, head_dim=128)
    found = hidden_from(visible, lambda q, k, v, n: splash.attention(q, k, v, visible=n, interpret=True), *given)
    assert_hidden_from(visible, found, *given)


def by_slices(q, k, v, past, stops):
    """Each chunk's queries with what they see."""
    (earlier_k, earlier_v), parts = past or (k, v), []
    for a, b in zip((0, *stops[:-1]), stops, strict=True):
        keys, values = (jnp.concatenate([x[:, :a], own[:, a:b]], 1) for x, own in ((earlier_k, k), (earlier_v, v)))
        parts.append(reference.attention(q[:, a:b], keys, values))
    return jnp.concatenate(parts, 1)


@pytest.mark.parametrize("with_past", [True, False])
@pytest.mark.parametrize(
    "stops",
    [
        (40, 140, 240, 340),
        (340,),
        *(pytest.param(x, marks=pytest.mark.long) for x in ((140, 240, 340), (100, 200, 300), (240, 250, 260))),
    ],
    ids=str,
)
def test_splash_by_chunks(monkeypatch, stops, with_past):
    """Chunks that share tiles; a first one that is shorter, longer or like the others."""
    monkeypatch.setattr(splash_kernel, "SMALL", (128,))
    q, k, v, d_out = qkv(stops[-1], stops[-1], b=1, heads=2, head_dim=128)
    past = (k[:, ::-1] + 0.5, v[:, ::-1] - 0.5) if with_past else None

    def run(attend):
        out, vjp = jax.vjp(lambda q, k, v, past: attend(q, k, v, past, stops), q, k, v, past)
        return jax.tree.leaves((out, vjp(d_out)))

    expected = run(by_slices)
    for one, other in zip(run(lambda *given: splash.by_chunks(*given, interpret=True)), expected, strict=True):
        if other.any():
            assert distance(one, other) < 2e-6
        else:  # what is before a single chunk is seen by nobody
            assert len(stops) == 1 and not one.any()


def test_the_mask_of_chunks_leaves_out_tiles(monkeypatch):
    """Of eight chunks of a tile each, a chunk sees itself and those before it."""
    monkeypatch.setattr(splash_kernel, "SMALL", (128,))
    stops = tuple(range(128, 1025, 128))
    mask = ChunkMask(1024, 1024, stops, Seen(128, 128, None))
    tiles = [slice(i * 128, i * 128 + 128) for i in range(8)]
    seen = [[bool(mask[rows, columns].any()) for columns in tiles] for rows in tiles]
    assert seen == np.tril(np.ones((8, 8), bool)).tolist()


def test_a_tpus_kernel_is_told_how_many_keys_are_visible():
    """Of arguments that a program does not read, it has none."""
    x = jax.ShapeDtypeStruct((1, 1100, 1, 128), jnp.bfloat16)

    def lowered(attention):
        given = x, jax.ShapeDtypeStruct((), jnp.int32)
        return jax.jit(attention).trace(*given).lower(lowering_platforms=("tpu",)).as_text()

    told = lowered(lambda x, n: kernels.attention(x, x, x, platform="tpu", visible=n))
    assert "splash_mha_fwd" in told and re.search(r"@main\([^)]*tensor<i32>", told)
    assert not re.search(r"@main\([^)]*tensor<i32>", lowered(lambda x, n: kernels.attention(x, x, x, platform="tpu")))
