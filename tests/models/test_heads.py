"""Discriminator heads: shapes, invariances, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vpae_jax.models.heads import DiscriminatorHeads, HeadsConfig, default_taps
from vpae_jax.types import Features, UserError

WIDTH, TAPS = 24, 3
KINDS = ("ca_mm", "ca", "conv")


def features(seed: int = 0, image: bool = True) -> Features:
    keys = jax.random.split(jax.random.key(seed), 3 + TAPS)
    return Features(
        taps=tuple(jax.random.normal(k, (2, 7, WIDTH)) for k in keys[3:]),
        text=jax.random.normal(keys[0], (2, 5, WIDTH)),
        text_mask=jnp.arange(5)[None] < jnp.array([[3], [5]]),
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
    many = TAPS * given.taps[0].shape[1] if kind == "conv" else 1
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
