"""Discriminator heads: shapes, invariances, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from vpae_jax.config import MeshConfig
from vpae_jax.models.heads import DiscriminatorHeads, HeadsConfig, default_taps
from vpae_jax.sharding import HEADS_RULES, make_mesh, param_shardings
from vpae_jax.types import Features, UserError

WIDTH, TAPS = 24, 3
KINDS = ("ca_mm", "ca", "conv", "conv3d")
GRID = (1, 7, 1)


def features(seed: int = 0, image: bool = True) -> Features:
    keys = jax.random.split(jax.random.key(seed), 3 + TAPS)
    return Features(
        taps=tuple(jax.random.normal(k, (2, 7, WIDTH)) for k in keys[3:]),
        text=jax.random.normal(keys[0], (2, 5, WIDTH)),
        text_mask=jnp.arange(5)[None] < jnp.array([[3], [5]]),
        grid=GRID,
        image=jax.random.normal(keys[1], (2, 4, WIDTH)) if image else None,
    )


def make(kind="ca_mm", **options) -> DiscriminatorHeads:
    config = HeadsConfig(width=WIDTH, taps=tuple(range(1, TAPS + 1)), kind=kind, num_heads=4, **options)
    return DiscriminatorHeads(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "depth, taps", [(40, (18, 29, 40)), (30, (14, 22, 30)), (12, (6, 9, 12)), (8, (4, 6, 8)), (4, (2, 3, 4))]
)
def test_default_taps(depth, taps):
    assert default_taps(depth) == taps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"hidden": 16}, {"queries": "shared", "num_queries": 2}])
def test_logits_of_a_clip_that_depend_on_every_tap(kind, options):
    heads, given = make(kind, **options), features()
    logit = heads(given)
    many = {"conv": TAPS * 7, "conv3d": TAPS * 4}.get(kind, 1)
    assert logit.shape == (2, many) and logit.dtype == jnp.float32
    grads = jax.grad(lambda taps: heads(dataclasses.replace(given, taps=taps)).sum())(given.taps)
    assert all(float(jnp.abs(g).max()) > 0 for g in grads)


@pytest.mark.parametrize("kind", KINDS)
def test_clips_do_not_see_each_other(kind):
    heads, given = make(kind), features()
    first = jax.tree.map(lambda x: x[:1], given)
    np.testing.assert_allclose(heads(first), heads(given)[:1], rtol=1e-5, atol=1e-6)


def test_only_the_semantic_head_reads_prompt_and_picture():
    given, other = features(0), features(1)
    for kind in KINDS:
        heads = make(kind)
        changed = [
            heads(dataclasses.replace(given, text=other.text)),
            heads(dataclasses.replace(given, image=other.image)),
        ]
        for logit in changed:
            assert bool((jnp.abs(logit - heads(given)) > 1e-7).all()) == (kind == "ca_mm")


def test_padding_of_the_prompt_is_not_seen():
    heads, given = make(), features()
    noisy = jnp.where(given.text_mask[..., None], given.text, 99.0)
    np.testing.assert_array_equal(heads(dataclasses.replace(given, text=noisy)), heads(given))
    longer = dataclasses.replace(
        given, text=jnp.pad(given.text, ((0, 0), (0, 3), (0, 0))), text_mask=jnp.pad(given.text_mask, ((0, 0), (0, 3)))
    )
    np.testing.assert_allclose(heads(longer), heads(given), rtol=1e-5, atol=1e-7)


def test_ways_to_tell_modalities_apart_and_to_read_the_condition():
    given = features()
    order, image = jnp.array([2, 0, 1, 3, 4]), given.image[:, ::-1]
    text, mask = given.text[:, order], given.text_mask[:, order]  # moves the first clip's three words
    moved = dataclasses.replace(given, text=text, text_mask=mask, image=image)
    mean = dataclasses.replace(
        given, image=jnp.broadcast_to(given.image.mean(axis=1, keepdims=True), given.image.shape)
    )
    for options, order_matters, spread_matters in (
        ({}, False, True),
        ({"modality": "sinusoid"}, True, True),
        ({"condition": "pooled"}, False, False),
    ):
        heads = make(**options)
        logit = heads(given)
        assert bool((jnp.abs(heads(moved) - logit) > 1e-6).any()) == order_matters, options
        assert bool((jnp.abs(heads(mean) - logit) > 1e-6).any()) == spread_matters, options
        assert bool(jnp.isfinite(heads(dataclasses.replace(given, text_mask=jnp.zeros_like(given.text_mask)))).all())


def test_logits_may_be_averaged_in_the_heads():
    given = features()
    many, one = make("conv"), make("conv", average="logits")
    nnx.update(one, nnx.state(many))
    np.testing.assert_allclose(one(given), many(given).mean(1, keepdims=True), rtol=1e-5)


def on_grid(grid: tuple[int, int, int], seed: int = 0) -> Features:
    """Hidden states whose tokens lie on this grid."""
    f, h, w = grid
    rng = np.random.default_rng(seed)
    taps = tuple(jnp.asarray(rng.normal(size=(2, f * h * w, WIDTH)), jnp.float32) for _ in range(TAPS))
    return dataclasses.replace(features(), taps=taps, grid=grid)


def test_convolutions_see_the_neighbours_in_space_and_time():
    """One logit for every second token along each axis, of the 3 x 3 x 3 tokens around it and of no other one."""
    heads, grid = make("conv3d", hidden=8), (4, 5, 6)
    given = on_grid(grid)
    kept = (2, 3, 3)
    logits = heads(given).reshape(2, TAPS, *kept)
    first = lambda tap: heads(dataclasses.replace(given, taps=(tap, *given.taps[1:])))[0]  # noqa: E731
    grads = jax.jit(jax.jacrev(first))(given.taps[0])
    found = np.abs(grads).max(-1).reshape(TAPS, *kept, 2, *grid) > 0
    assert not found[1:].any() and not found[0, :, :, :, 1].any(), "of this tap and this clip alone"
    for place in np.ndindex(*kept):
        near = [np.abs(np.arange(size) - 2 * at) <= 1 for size, at in zip(grid, place, strict=True)]
        np.testing.assert_array_equal(found[0, *place, 0], np.einsum("f,h,w->fhw", *near) > 0)
    assert logits.shape == (2, TAPS, *kept)


def test_the_order_of_tokens_matters_to_convolutions_alone():
    given = on_grid((4, 5, 6))
    turned = dataclasses.replace(given, taps=tuple(tap[:, ::-1] for tap in given.taps))
    other = dataclasses.replace(given, grid=(6, 5, 4))
    for kind in KINDS:
        heads = make(kind, average="logits")
        found = [float(jnp.abs(heads(one) - heads(given)).max()) > 1e-6 for one in (turned, other)]
        assert found == [kind == "conv3d"] * 2


def test_a_convolution_of_the_heads_is_pytorchs():
    """Of the same kernel and bias: every place, also those at the rim."""
    heads, given = make("conv3d", hidden=8), on_grid((3, 5, 4))
    conv = heads.heads.convs[0]
    rng = np.random.default_rng(1)
    conv.bias[...] = jnp.asarray(rng.normal(size=8), jnp.float32)
    x = rng.normal(size=(2, 3, 5, 4, 8)).astype(np.float32)
    weight = torch.tensor(np.asarray(conv.kernel[...])).permute(4, 3, 0, 1, 2)
    frames = torch.tensor(x).permute(0, 4, 1, 2, 3)
    expected = torch.nn.functional.conv3d(frames, weight, torch.tensor(np.asarray(conv.bias[...])), 2, 1)
    np.testing.assert_allclose(conv(jnp.asarray(x)), expected.permute(0, 2, 3, 4, 1), rtol=1e-4, atol=1e-5)
    assert heads(given).shape == (2, TAPS * 2 * 3 * 2)


def test_the_grid_is_part_of_a_program():
    """It passes through transformations as it is, and another grid is another program."""
    heads = make("conv3d", hidden=8)
    run = jax.jit(lambda given: heads(jax.lax.stop_gradient(given)))
    for grid in ((4, 5, 6), (6, 5, 4)):
        np.testing.assert_allclose(run(on_grid(grid)), heads(on_grid(grid)), rtol=1e-4, atol=1e-6)
    assert run._cache_size() == 2
    assert jax.tree.map(lambda x: 2 * x, on_grid((4, 5, 6))).grid == (4, 5, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_the_same_on_a_mesh(kind):
    """Tokens that are split over devices are put together for convolutions."""
    config = make(kind, hidden=16).config
    mesh = make_mesh(MeshConfig(fsdp=2, context=4))
    alone, spread = (DiscriminatorHeads(config, rngs=nnx.Rngs(0), mesh=m) for m in (None, mesh))
    given = on_grid((2, 4, 5))
    graph, params = nnx.split(spread, nnx.Param)
    params = jax.device_put(params, param_shardings(params, HEADS_RULES, mesh))
    tokens = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context"))
    placed = dataclasses.replace(given, taps=jax.device_put(given.taps, tokens))

    def loss(params, given, graph=graph):
        logits = nnx.merge(graph, params)(given)
        return (logits**2).sum(), logits

    (_, found), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, placed)
    graph, params = nnx.split(alone, nnx.Param)
    (_, expected), wanted = jax.jit(jax.value_and_grad(lambda p, g: loss(p, g, graph), has_aux=True))(params, given)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_text_to_video_features_have_no_picture():
    assert make()(features(image=False)).shape == (2, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_scale_of_hidden_states_does_not_matter(kind):
    heads, given = make(kind), features()
    large = dataclasses.replace(given, taps=tuple(1000 * tap for tap in given.taps))
    np.testing.assert_allclose(heads(large), heads(given), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_close_to_float32(kind):
    heads, given = make(kind), features()
    _, params = nnx.split(heads)
    half = DiscriminatorHeads(dataclasses.replace(heads.config), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    nnx.update(half, params)
    logit = half(jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, given))
    np.testing.assert_allclose(logit, heads(given), atol=0.03 * max(0.1, float(jnp.abs(heads(given)).max())))


def test_bad_sizes_are_named():
    with pytest.raises(UserError, match="num_heads 5 does not divide the inner width 24"):
        HeadsConfig(width=24, taps=(1, 2, 3), num_heads=5)
    with pytest.raises(UserError, match="2 taps were given, 3 are expected"):
        make()(dataclasses.replace(features(), taps=features().taps[:2]))
