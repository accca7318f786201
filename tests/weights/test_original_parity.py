"""Weights in the original layout compute what the original modules compute."""

import jax
import jax.numpy as jnp
import numpy as np
import original_wan
import pytest
import torch
from flax import nnx

from vpae_jax.types import Condition
from vpae_jax.weights.loading import load_part

FOLDERS = {
    "t2v": dict(image=False),
    "i2v": dict(image=True, shards=1, dtype=torch.bfloat16, transformer=dict(text_len=24)),
    "flf2v": dict(
        image=True,
        shards=3,
        transformer=dict(
            model_type="flf2v", dim=30, num_heads=5, ffn_dim=26, freq_dim=14, num_layers=3, out_dim=12, in_dim=20
        ),
        text_encoder=dict(vocab_size=390, dim=20, dim_attn=21, dim_ffn=17, num_heads=3, num_layers=3, num_buckets=8),
        image_encoder=dict(image_size=30, patch_size=6, dim=48, mlp_ratio=3, num_layers=2),
        vae=dict(base_dim=6, dim_mult=(1, 2, 1), num_res_blocks=2, temperal_downsample=(True, False)),
    ),
    "short text": dict(
        image=False,
        transformer=dict(text_len=24, dim=42, num_heads=3, eps=1e-4, num_layers=1, patch_size=(1, 1, 2)),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Gives a folder of these sizes, and the modules whose weights it holds."""
    made = {}

    def give(name):
        if name not in made:
            target = tmp_path_factory.mktemp("model")
            made[name] = (target, original_wan.save_folder(target, **FOLDERS[name]))
        return made[name]

    return give


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"), torch.no_grad():
        yield


def error(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), theirs.double().numpy()
    assert ours.shape == theirs.shape
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def last(x):
    """Channels last."""
    return jnp.asarray(np.moveaxis(x, 1, -1))


@pytest.mark.parametrize("name", FOLDERS)
def test_transformer(folder, name):
    path, made = folder(name)
    model = load_part(path, "transformer")
    theirs, c, batch = made.transformer, model.config, 2
    assert c.text_len == theirs.sizes["text_len"]
    (pf, ph, pw), image, frames = c.patch_size, None, None
    x, t = normal(batch, c.out_channels, 3 * pf, 2 * ph, 3 * pw), np.array([0.999, 0.0375], np.float32)
    if c.image_dim is not None:
        tokens = theirs.image_tokens * (2 if c.pos_embed_seq_len else 1)
        image = normal(batch, tokens, c.image_dim)
        frames = normal(batch, c.in_channels - c.out_channels, *x.shape[2:])
    for lengths in ((5, 12), (24, 24), (1, 1)) if name == "short text" else ((5, 12),):
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        text = normal(*mask.shape, c.text_dim) * mask[..., None]
        given = (image if image is None else jnp.asarray(image), frames if frames is None else last(frames))
        condition = Condition(jnp.asarray(text), jnp.asarray(mask), *given)
        run = nnx.jit(lambda m, x, t, condition=condition: m(x, t, condition))
        ours = run(model, last(x), jnp.asarray(t))
        given = [None if value is None else torch.tensor(value) for value in (text, image, frames)]
        expected = theirs(torch.tensor(x), torch.tensor(1000 * t), *given)
        assert error(np.moveaxis(np.asarray(ours), -1, 1), expected) <= 1e-5


def test_text_encoder(folder):
    path, made = folder("flf2v")
    ids = np.random.default_rng(0).integers(0, 384, (3, 40))
    mask = np.arange(40) < np.array([1, 17, 40])[:, None]
    model = load_part(path, "text_encoder")
    ours = nnx.jit(lambda m, *args: m(*args))(model, jnp.asarray(ids), jnp.asarray(mask))
    theirs = made.text_encoder(torch.tensor(ids), torch.tensor(mask))
    assert error(np.asarray(ours)[mask], theirs[torch.tensor(mask)]) <= 1e-5


@pytest.mark.parametrize("name", ["flf2v", "i2v"])
def test_image_encoder(folder, name):
    path, made = folder(name)
    model = load_part(path, "image_encoder")
    pixels = normal(2, 3, model.config.image_size, model.config.image_size)
    ours = nnx.jit(lambda m, x: m(x))(model, last(pixels))
    assert error(ours, made.image_encoder(torch.tensor(pixels))) <= 1e-5


@pytest.mark.parametrize("name", ["t2v", "flf2v"])
def test_autoencoder(folder, name):
    path, made = folder(name)
    model = load_part(path, "vae")
    c = model.config
    side, frames = 2 * c.scale_factor_spatial, 1 + 2 * c.scale_factor_temporal
    video = np.tanh(normal(1, 3, frames, side, side))
    mean = nnx.jit(lambda m, x: m.moments(x)[0])(model, last(video))
    expected = made.vae.encode(torch.tensor(video)).latent_dist.mode()
    assert error(np.moveaxis(np.asarray(mean), -1, 1), expected) <= 1e-5
    latents = normal(1, c.z_dim, 3, 2, 2)
    ours = nnx.jit(lambda m, z: jnp.clip(m.decode_raw(z), -1, 1))(model, last(latents))
    theirs = made.vae.decode(torch.tensor(latents)).sample
    assert error(np.moveaxis(np.asarray(ours), -1, 1), theirs) <= 1e-5 and (theirs.abs() < 1).float().mean() > 0.5


def test_bfloat16_weights_are_those_of_the_module(folder):
    """The modules hold what the file holds, in float32; so stored bfloat16 costs nothing."""
    path, made = folder("i2v")
    stored = torch.load(path / original_wan.TEXT_FILE, weights_only=True)
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    model = load_part(path, "text_encoder", jnp.bfloat16)
    assert model.shared.embedding[...].dtype == jnp.bfloat16
    table = np.asarray(model.shared.embedding[...].astype(jnp.float32))
    np.testing.assert_array_equal(table, made.text_encoder.token_embedding.weight.numpy())
