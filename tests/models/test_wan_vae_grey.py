"""A picture that grey frames follow is encoded as the whole clip is, at a part of the cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vpae_jax.models.wan_vae import WanVAE, WanVAEConfig
from vpae_jax.models.wan_vae_grey import encode_first, encode_grey

CONFIG = WanVAEConfig(base_dim=4, num_res_blocks=2)  # Wan's depth: the same frames are seen
PIECES = 32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_levels_rest_when_they_have_settled(dtype):
    graph, weights = nnx.split(WanVAE(CONFIG, rngs=nnx.Rngs(0), dtype=dtype))
    first = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 1, 16, 16, 3)), jnp.float32)

    @jax.jit
    def whole(weights, video):
        return nnx.merge(graph, weights).encode(video)

    @jax.jit
    def begin(weights, first):
        return encode_first(nnx.merge(graph, weights), first)

    @jax.jit
    def advance(weights, past):
        return encode_grey(nnx.merge(graph, weights), past, 1, 2)

    expected = whole(weights, jnp.concatenate([first, jnp.zeros((1, 4 * PIECES, 16, 16, 3))], axis=1))
    latents, past = begin(weights, first)
    made, settled = [latents], []
    for _ in range(PIECES):
        latents, past = advance(weights, past)
        made.append(latents)
        settled.append([bool(level.settled) for level in past])
    found = jnp.concatenate(made, axis=1)
    # The same numbers, of which another program may round one in another way.
    assert np.abs(found - expected).max() <= (1e-5 if dtype == jnp.float32 else 0.1) * np.abs(expected).max()
    # What the receptive fields of the levels say: from frame 11, 19, 39 and 113 of the clip on nothing changes.
    runs = [1 + [piece[level] for piece in settled].index(True) for level in range(4)]
    assert all(run <= most for run, most in zip(runs, (4, 6, 11, 29), strict=True)) and runs == sorted(runs)
    assert settled == sorted(settled) and all(settled[-1])
    np.testing.assert_array_equal(found[:, runs[3] :], found[:, -1:].repeat(PIECES + 1 - runs[3], 1))
    assert np.abs(found[:, 4] - found[:, -1]).max() > 1e-2  # the finest levels rest long before the latents do
