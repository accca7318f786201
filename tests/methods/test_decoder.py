"""Distillation of a small decoder: its loss, and the pieces of clips that it looks at."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpae_jax.methods.base import Context
from vpae_jax.methods.decoder import Decoder
from vpae_jax.types import Batch, Condition, UserError


class Painter:
    """Decodes every latent value into a constant multiple of it, in a frame as large as the latents."""

    def __init__(self, factor: float):
        self.factor = factor

    def decode(self, z):
        return self.factor * z[..., :3]

    def decode_raw(self, z):
        return self.decode(z), []


def batch(*shape: int) -> Batch:
    z = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape) / np.prod(shape)
    null = jnp.zeros((1, 2)), jnp.zeros(1, bool)
    return Batch(z, Condition(jnp.zeros((shape[0], 1, 2)), jnp.zeros((shape[0], 1), bool)), *null)


def context(seed: int = 0) -> Context:
    key = jax.random.key(seed)
    return Context(jnp.int32(0), jax.random.split(key, 2), key)


def test_the_loss_is_the_difference_to_the_autoencoder():
    data = batch(2, 3, 4, 4, 16)
    video = np.asarray(data.latents[..., :3])
    loss, metrics = Decoder(l1=2.0, l2=3.0).loss({"vae": Painter(1.0), "decoder": Painter(0.5)}, data, context())
    error = 0.5 * video
    expected = 2 * np.abs(error).mean((1, 2, 3, 4)) + 3 * (error**2).mean((1, 2, 3, 4))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert metrics["psnr"] == pytest.approx(np.mean(10 * np.log10(4 / (error**2).mean((1, 2, 3, 4)))), rel=1e-5)


def test_only_the_small_decoder_is_differentiated():
    data = batch(1, 2, 2, 2, 16)

    def loss(factors):
        return Decoder().loss({"vae": Painter(factors[0]), "decoder": Painter(factors[1])}, data, context())[0].sum()

    of_vae, of_decoder = jax.grad(loss)(jnp.array([1.0, 0.5]))
    assert of_vae == 0 and of_decoder < 0


def test_pieces_are_cut_anywhere_in_rows_and_columns_from_the_first_frame_on():
    method, z = Decoder(frames=2, side=3), batch(1, 4, 5, 6, 16).latents
    places = set()
    for seed in range(40):
        piece = np.asarray(method.piece(z, jax.random.key(seed)))
        assert piece.shape == (1, 2, 3, 3, 16)
        (row,), (column,) = np.where(np.isin(np.asarray(z[0, 0, :, :, 0]), piece[0, 0, 0, 0, 0]))
        np.testing.assert_array_equal(piece, z[:, :2, row : row + 3, column : column + 3])
        places.add((row, column))
    assert {row for row, _ in places} == {0, 1, 2} and {column for _, column in places} == {0, 1, 2, 3}
    assert Decoder(frames=9, side=9).piece(z, jax.random.key(0)).shape == z.shape


def test_parts_of_a_batch_see_the_same_place():
    whole, context_of = batch(2, 2, 5, 6, 16), context()
    method, nets = Decoder(side=3), {"vae": Painter(1.0), "decoder": Painter(0.5)}
    parts = [
        method.loss(nets, replace(whole, latents=whole.latents[i : i + 1]), context_of)[0].item() for i in range(2)
    ]
    np.testing.assert_allclose(method.loss(nets, whole, context_of)[0], parts, rtol=1e-6)


def test_a_loss_of_nothing_is_refused():
    with pytest.raises(UserError, match="l1 and l2 are both 0"):
        Decoder(l1=0.0, l2=0.0)
