"""The autoencoder with the rows of a clip over several devices, against one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vpae_jax.config import MeshConfig
from vpae_jax.models.wan_vae import WanVAE, WanVAEConfig
from vpae_jax.models.wan_vae_grey import encode_first, encode_grey
from vpae_jax.models.wan_vae_rows import Rows
from vpae_jax.sharding import make_mesh

CONFIG = WanVAEConfig(
    base_dim=4,
    z_dim=4,
    dim_mult=(1, 2, 2),
    num_res_blocks=1,
    temperal_downsample=(False, True),
    scale_factor_temporal=2,
    scale_factor_spatial=4,
    latents_mean=(0.1,) * 4,
    latents_std=(1.2,) * 4,
)


@functools.cache
def model(mesh: MeshConfig | None = None, devices: int = 1):
    """Random weights, whose attention does something; compiled encoding of a clip and of a first frame, and decoding in
    two pieces."""
    vae = WanVAE(CONFIG, rngs=nnx.Rngs(0))
    for block in (vae.encoder.mid_block, vae.decoder.mid_block):
        kernel = block.attentions[0].proj.kernel
        kernel[...] = jax.random.normal(jax.random.key(1), kernel.shape) / 4
    for path, leaf in nnx.to_flat_state(nnx.state(vae)):
        if path[-1] == "bias":  # what fills up must be zero again after each of them
            leaf[...] = 0.3 * jax.random.normal(jax.random.key(2), leaf.shape)
    if mesh is not None:
        vae.rows = Rows(make_mesh(mesh, jax.devices()[:devices]))
    graph, weights = nnx.split(vae)

    @jax.jit
    def encode(weights, video):
        return nnx.merge(graph, weights).encode(video)

    @jax.jit
    def still(weights, first):
        vae = nnx.merge(graph, weights)
        begun, past = encode_first(vae, first)
        return jnp.concatenate([begun, encode_grey(vae, past, 9, begun.shape[2])[0]], axis=1)

    @jax.jit
    def decode(weights, latents):
        vae = nnx.merge(graph, weights)
        begun, cache = vae.decode_next(latents[:, :2])
        return jnp.concatenate([begun, vae.decode_next(latents[:, 2:], cache)[0]], axis=1)

    return weights, encode, still, decode


@pytest.mark.parametrize(
    "mesh, devices, rows",
    [
        (MeshConfig(fsdp=1, context=2), 2, 5),  # 3 rows and 2
        (MeshConfig(fsdp=2, context=2, tensor=2), 8, 8),  # clips, and 2 rows each
        (MeshConfig(fsdp=1, context=8), 8, 6),  # two devices have none
    ],
)
def test_equals_one_device(mesh, devices, rows):
    weights, *alone = model()
    _, *spread = model(mesh, devices)
    draw = np.random.default_rng(0)
    video = draw.uniform(-1, 1, (2, 5, 4 * rows, 8, 3)).astype(np.float32)
    latents = draw.normal(size=(2, 3, rows, 2, 4)).astype(np.float32)
    for one, several, x in zip(alone, spread, (video, video[:, :1], latents), strict=True):
        expected, found = (np.asarray(run(weights, x)) for run in (one, several))
        assert found.shape == expected.shape and expected.std() > 0.1
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_devices_hold_strips_and_exchange_rows():
    """Compiled: no device holds another's rows, but for keys and values; each 3x3 convolution asks its neighbours."""
    weights, _, _, decode = model(MeshConfig(fsdp=1, context=4), 4)
    latents = jax.ShapeDtypeStruct((1, 3, 32, 4, 4), jnp.float32)
    program = decode.lower(weights, latents).compile()
    text = program.as_text()
    assert text.count("collective-permute(") > 20 and "all-to-all" not in text
    alone = model()[3].lower(weights, latents).compile()
    share = program.memory_analysis().temp_size_in_bytes / alone.memory_analysis().temp_size_in_bytes
    assert share < 0.5
