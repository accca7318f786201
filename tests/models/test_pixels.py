"""What a discriminator on pixels sees: frames as the pipeline decodes them, prepared as the image processor does it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vpae_jax.methods.base import FrameDecoder, PixelEncoder
from vpae_jax.models.clip import CLIPVision
from vpae_jax.models.pixels import PixelCLIP, PixelCLIPConfig, PixelEncoderConfig, Preprocessing
from vpae_jax.models.presets import TINY
from vpae_jax.models.wan_vae import WanVAE, WanVAEConfig
from vpae_jax.types import UserError
from vpae_jax.weights.image_processor import ImageProcessor

CENTRE = jnp.float32(0.5)
CONFIG = PixelCLIPConfig(TINY.image_encoder, Preprocessing(32, (32, 32)))
# Two levels, and two video frames for each latent one after the first.
VAE = WanVAEConfig(
    base_dim=8,
    z_dim=4,
    dim_mult=(1, 2),
    num_res_blocks=1,
    temperal_downsample=(True,),
    latents_mean=(0.1, -0.2, 0.3, 0.0),
    latents_std=(1.0, 0.5, 2.0, 1.5),
    scale_factor_temporal=2,
    scale_factor_spatial=2,
)
LATENTS = jnp.asarray(np.random.default_rng(3).normal(size=(2, 4, 6, 8, 4)), jnp.float32)


def of(processor: ImageProcessor) -> Preprocessing:
    return Preprocessing(processor.size, processor.crop_size, processor.image_mean, processor.image_std)


def pictures(height, width, count=2):
    """Smooth ones with edges and some noise, uint8."""
    rng = np.random.default_rng(height)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.stack([np.sin(9 * x + 5 * y + c) + (np.sin(20 * x) > 0.5) for c in range(3 * count)], -1)
    noisy = 127 + 80 * waves.reshape(height, width, count, 3) + 12 * rng.normal(size=(height, width, count, 3))
    return np.moveaxis(noisy, 2, 0).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("processor", "height", "width"),
    [
        (ImageProcessor(32, (32, 32)), 48, 48),
        (ImageProcessor(32, (32, 32)), 48, 83),
        (ImageProcessor(32, (32, 32)), 90, 50),
        (ImageProcessor(40, (32, 32)), 24, 31),  # made larger
        (ImageProcessor((24, 40), None, (0.5,) * 3, (0.2,) * 3), 60, 60),
        (ImageProcessor(32, (32, 32)), 32, 32),
    ],
)
def test_equals_the_image_processor(processor, height, width):
    """To two levels of 255, and half a level on average: it rounds twice to 8 bits, which would have no gradient."""
    given = pictures(height, width)
    found = jax.jit(of(processor))(jnp.asarray(given / 127.5 - 1, jnp.float32), CENTRE)
    expected = processor(given)
    levels = np.abs(np.asarray(found) - expected) * np.asarray(processor.image_std) * 255
    assert found.shape == expected.shape and found.dtype == jnp.float32
    assert levels.max() < 2 and levels.mean() < 0.5


def test_the_crop_moves_along_what_is_left_over():
    """At every place the square is part of the resized picture; the centre never shows the sides."""
    given = jnp.asarray(pictures(32, 60) / 127.5 - 1, jnp.float32)
    whole = jax.jit(Preprocessing(32, None))(given, CENTRE)
    crop = jax.jit(Preprocessing(32, (32, 32)))
    for place, left in ((0.0, 0), (0.5, 14), (0.99, 27)):
        np.testing.assert_allclose(crop(given, jnp.float32(place)), whole[:, :, left : left + 32], atol=1e-6)
    grads = [jax.grad(lambda x, p=p: crop(x, p).sum())(given) for p in (jnp.float32(0), jnp.float32(0.99))]
    seen = [np.abs(grad).max((0, 1, 3)) > 0 for grad in grads]
    assert seen[0][:32].all() and not seen[0][32:].any() and seen[1][27:59].all() and not seen[1][:27].any()


def test_a_crop_beyond_the_picture_is_refused():
    with pytest.raises(UserError, match="crop 40x40 is larger than the resized image 32x32"):
        Preprocessing(32, (40, 40))(jnp.zeros((1, 64, 64, 3)), CENTRE)


@pytest.fixture(scope="module")
def encoder():
    return PixelCLIP(CONFIG, rngs=nnx.Rngs(0))


def test_features_are_the_hidden_states_of_every_frames_patches(encoder):
    """Its weights are CLIP's by name, and so are its numbers; frames do not see each other."""
    plain = CLIPVision(CONFIG.clip, rngs=nnx.Rngs(1))
    nnx.update(plain, nnx.state(encoder, nnx.Param))
    video = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 3, 48, 40, 3)), jnp.float32)
    found = nnx.jit(lambda m, v: m.features(v, CENTRE, (1, 3)))(encoder, video)
    assert found.grid == (3, 4, 4) and found.text is None
    for clip, frame in ((0, 2), (1, 0)):
        pixels = CONFIG.preprocessing(video[clip, frame][None], CENTRE)
        for tap, states in zip(found.taps, plain.hidden_states(pixels, (1, 3)), strict=True):
            assert tap.shape == (2, 3 * 16, 64)
            np.testing.assert_allclose(tap[clip, 16 * frame : 16 * (frame + 1)], states[0, 1:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(plain(pixels), plain.hidden_states(pixels, (2,))[0], rtol=1e-6)


def test_what_methods_and_runs_ask_of_them_is_there(encoder):
    assert isinstance(encoder, PixelEncoder) and isinstance(CONFIG, PixelEncoderConfig)
    assert (CONFIG.width, CONFIG.depth) == (64, 3)
    assert isinstance(nnx.eval_shape(lambda: WanVAE(VAE, rngs=nnx.Rngs(0))), FrameDecoder)


# The decoder.


@pytest.fixture(scope="module")
def vae():
    """A random one whose values fill the range, and leave it here and there."""
    return nnx.split(WanVAE(VAE, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def weighted():
    """Weights of a clip's video frames, of which none cancels another."""
    return jnp.asarray(np.random.default_rng(4).normal(size=(2, 7, 12, 16, 3)), jnp.float32)


@pytest.fixture(scope="module")
def whole(vae, weighted):
    """The whole clip's decoding, and how the weighted sum of frame 0 and of each latent frame's changes with all."""
    graph, weights = vae

    def sums(z):
        parts = (nnx.merge(graph, weights).decode(z) * weighted).sum((0, 2, 3, 4))
        return jnp.concatenate([parts[:1], parts[1:].reshape(3, 2).sum(1)])

    return jax.jit(nnx.merge(graph, weights).decode)(LATENTS), jax.jit(jax.jacrev(sums))(LATENTS)


@pytest.fixture(scope="module")
def at(vae, weighted):
    """The frames of one latent frame and the gradient of their weighted sum."""
    graph, weights = vae

    @jax.jit
    def run(z, frame):
        def value(z):
            frames = nnx.merge(graph, weights).decode_at(z, frame)
            first, last = weighted[:, :1], jax.lax.dynamic_slice_in_dim(weighted, 2 * frame - 1, 2, axis=1)
            return (frames * jnp.concatenate([first, last], axis=1)).sum(), frames

        return jax.grad(value, has_aux=True)(z)

    return run


@pytest.mark.parametrize("frame", [2, *(pytest.param(f, marks=pytest.mark.long) for f in (1, 3))])
def test_frames_are_the_pipelines(at, whole, frame):
    """Exactly those of the whole clip's decoding, of which the causal decoder needs all that comes before. The gradient
    in the chosen latent frame is that of its frames, in the first one that of the first frame, and in no other one."""
    video, grads = whole
    grad, frames = at(LATENTS, jnp.int32(frame))
    expected = np.concatenate([video[:, :1], video[:, 2 * frame - 1 : 2 * frame + 1]], axis=1)
    assert 0 < (np.abs(expected) == 1).mean() < 0.5
    np.testing.assert_allclose(frames, expected, atol=1e-5)
    scale = float(np.abs(grads).max())
    np.testing.assert_allclose(grad[:, frame], grads[frame, :, frame], atol=1e-4 * scale)
    np.testing.assert_allclose(grad[:, 0], grads[0, :, 0], atol=1e-4 * scale)
    assert np.abs(grad[:, frame]).max() > 0.01 * scale < 100 * np.abs(grad[:, 0]).max()
    assert not np.delete(np.asarray(grad), [0, frame], axis=1).any()


def test_the_past_is_seen_and_the_future_is_not(at):
    frames = at(LATENTS, jnp.int32(2))[1]
    past, future = (at(LATENTS.at[:, index].add(1.0), jnp.int32(2))[1] for index in (1, 3))
    np.testing.assert_array_equal(future, frames)
    np.testing.assert_array_equal(past[:, 0], frames[:, 0])
    assert np.abs(past[:, 1:] - frames[:, 1:]).max() > 1e-3


def test_a_clip_of_one_latent_frame_has_one_frame(vae):
    graph, weights = vae
    model = nnx.merge(graph, weights)
    found = jax.jit(model.decode_at)(LATENTS[:, :1], jnp.int32(1))
    np.testing.assert_allclose(found, jax.jit(model.decode)(LATENTS[:, :1]), atol=1e-5)


def test_bfloat16_is_close_to_float32(vae, encoder):
    """What the heads read of decoded clips: to a few hundredths."""

    def states(dtype):
        own = [
            (WanVAE(VAE, rngs=nnx.Rngs(0), dtype=dtype), vae[1]),
            (PixelCLIP(CONFIG, rngs=nnx.Rngs(0), dtype=dtype), nnx.split(encoder)[1]),
        ]
        graphs = [nnx.split(model)[0] for model, _ in own]

        @jax.jit
        def run(weights, z):
            decoder, reader = (nnx.merge(graph, w) for graph, w in zip(graphs, weights, strict=True))
            return reader.features(decoder.decode_at(z, jnp.int32(1)), CENTRE, (1, 2, 3)).taps

        return run([w for _, w in own], LATENTS)

    for half, full in zip(states(jnp.bfloat16), states(jnp.float32), strict=True):
        assert half.dtype == jnp.bfloat16 and full.dtype == jnp.float32
        error = np.linalg.norm(np.float32(half) - full) / np.linalg.norm(full)
        assert 1e-4 < error < 0.05
