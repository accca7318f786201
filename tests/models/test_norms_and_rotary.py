"""Rotary embedding and norms against PyTorch and Diffusers; gradients of norms against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from flax import nnx

from vpae_jax.models.norms import LayerNorm, RMSNorm, layer_norm, rms_norm
from vpae_jax.models.rotary import rope_table, rotate


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("grid, head_dim", [((3, 4, 5), 128), ((1, 7, 2), 32), ((5, 1, 3), 24), ((2, 2, 2), 10)])
def test_rotary_embedding_equals_diffusers(grid, head_dim):
    theirs = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)
    cos, sin = theirs(torch.zeros(1, 1, grid[0], 2 * grid[1], 2 * grid[2]))
    found = rope_table(grid, head_dim)
    np.testing.assert_allclose(found[0], cos[0, :, 0, 0::2].numpy(), atol=1e-7)
    np.testing.assert_allclose(found[1], sin[0, :, 0, 1::2].numpy(), atol=1e-7)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    cos, sin = map(jnp.asarray, rope_table((1, 1, 9), 24))
    q, k = (jnp.broadcast_to(jnp.asarray(draw(seed, 1, 1, 2, 24)), (1, 9, 2, 24)) for seed in (0, 1))
    turned_q, turned_k = rotate(q, cos, sin), rotate(k, cos, sin)
    np.testing.assert_allclose(jnp.linalg.norm(turned_q, axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-5)
    logits = jnp.einsum("bnhd,bmhd->hnm", turned_q, turned_k)
    np.testing.assert_allclose(logits[:, 1:, 1:], logits[:, :-1, :-1], rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(logits[:, 0, 1] - logits[:, 0, 0]).min()) > 1e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norms_equal_pytorchs(dtype):
    x = jnp.asarray(3 + 5 * draw(0, 4, 6, 20), dtype)
    wide = torch.tensor(np.asarray(x, np.float32))
    scale, bias = draw(1, 20), draw(2, 20)
    rms, layer = RMSNorm(20, eps=1e-2), LayerNorm(20, eps=1e-2)
    rms.scale[...], layer.scale[...], layer.bias[...] = map(jnp.asarray, (scale, scale, bias))
    expected = torch.nn.functional.rms_norm(wide, (20,), torch.tensor(scale), 1e-2)
    assert rms(x).dtype == dtype
    np.testing.assert_allclose(rms(x), expected, rtol=1e-5 if dtype == jnp.float32 else 5e-3, atol=1e-5)
    expected = torch.nn.functional.layer_norm(wide, (20,), torch.tensor(scale), torch.tensor(bias), 1e-2)
    assert layer(x).dtype == jnp.float32
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-5)
    gains, shifts = draw(3, 4, 1, 20), draw(4, 4, 1, 20)  # another one for each clip
    expected = torch.nn.functional.layer_norm(wide, (20,), eps=1e-2) * torch.tensor(gains) + torch.tensor(shifts)
    found = layer_norm(x, jnp.asarray(gains), jnp.asarray(shifts), 1e-2)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("spread", [(20,), (4, 1, 20)])
def test_gradients_of_norms_are_those_of_their_formulas(dtype, spread):
    x = jnp.asarray(3 + 5 * draw(0, 4, 6, 20), dtype)
    gain, bias, weights = (jnp.asarray(draw(seed, *shape)) for seed, shape in enumerate((spread, spread, x.shape), 1))

    def layer(x, gain, bias):
        wide = x.astype(jnp.float32)
        mean, variance = wide.mean(-1, keepdims=True), wide.var(-1, keepdims=True)
        return (wide - mean) / jnp.sqrt(variance + 1e-2) * gain + bias

    def rms(x, gain):
        wide = x.astype(jnp.float32)
        return (wide / jnp.sqrt((wide**2).mean(-1, keepdims=True) + 1e-2) * gain).astype(x.dtype)

    pairs = [(layer, lambda *args: layer_norm(*args, 1e-2), (x, gain, bias))]
    if len(spread) == 1:
        pairs.append((rms, lambda *args: rms_norm(*args, 1e-2), (x, gain)))
    for formula, ours, args in pairs:
        expected, found = (
            jax.grad(lambda *args, f=f: (f(*args) * weights).sum(), argnums=range(len(args)))(*args)
            for f in (formula, ours)
        )
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            tolerance = 1e-4 if one.dtype == jnp.float32 else 1e-2
            np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=tolerance, atol=tolerance)


def test_norms_hold_parameters():
    assert len(jax.tree.leaves(nnx.state(LayerNorm(4, eps=1e-6), nnx.Param))) == 2
