"""TAEHV's decoder against PyTorch's on random weights, read from files as they are published."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from original_taehv import random_taehv
from safetensors.torch import save_file

from vpae_jax.models.wan_vae import WAN_LATENTS_MEAN, WAN_LATENTS_STD
from vpae_jax.types import UserError
from vpae_jax.weights.find import find_model
from vpae_jax.weights.loading import load_part

SMALL = (32, 24, 16, 8)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[tuple[int, ...], Path]:
    """Published files of two sizes: safetensors, and a checkpoint of PyTorch."""
    folder = tmp_path_factory.mktemp("taehv")
    save_file(random_taehv(SMALL).state_dict(), folder / "small.safetensors")
    torch.save(random_taehv().state_dict(), folder / "taew2_1.pth")
    return {SMALL: folder / "small.safetensors", (256, 128, 64, 64): folder / "taew2_1.pth"}


def decoder(path: Path, dtype=jnp.float32):
    return load_part(find_model(path), "decoder", dtype)


def latents(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("widths", "shape", "dtype", "most"),
    [
        (SMALL, (2, 4, 5, 6, 16), jnp.float32, 2e-5),
        (SMALL, (1, 1, 3, 2, 16), jnp.float32, 2e-5),
        (SMALL, (2, 3, 4, 4, 16), jnp.bfloat16, 0.1),
        ((256, 128, 64, 64), (1, 2, 2, 3, 16), jnp.float32, 2e-5),
    ],
)
def test_frames_are_those_of_pytorch(files, widths, shape, dtype, most):
    z, theirs = latents(*shape), random_taehv(widths)
    kind = torch.float32 if dtype == jnp.float32 else torch.bfloat16
    given = torch.from_numpy(z).permute(0, 1, 4, 2, 3).to(kind)
    expected = torch.stack([theirs.to(kind)(clip) for clip in given]).float().permute(0, 1, 3, 4, 2)
    made = np.asarray(decoder(files[widths], dtype).decode(jnp.asarray(z)))
    assert made.shape == (shape[0], 1 + 4 * (shape[1] - 1), 8 * shape[2], 8 * shape[3], 3)
    assert np.std(expected.numpy()) > 0.1 and np.abs((made + 1) / 2 - expected.numpy()).max() < most


def test_pieces_are_the_whole_clip(files):
    """In float64: in float32, jaxlib 0.12 computes a convolution of fewer frames in another order."""
    with jax.enable_x64(True):
        model, z = decoder(files[SMALL], jnp.float64), jnp.asarray(latents(1, 5, 3, 4, 16), jnp.float64)
        first, cache = model.decode_next(z[:, :2])
        rest, _ = model.decode_next(z[:, 2:], cache)
        forgotten, _ = model.decode_next(z[:, 2:])
        whole = np.asarray(model.decode(z))
    assert first.shape[1] == 5 and rest.shape[1] == 12
    np.testing.assert_allclose(np.concatenate([first, rest], 1), whole, atol=1e-6)
    assert np.abs(np.asarray(forgotten)[:, -8:] - whole[:, -8:]).max() > 1e-2, "what the cache holds is seen"


def test_a_config_beside_the_file_says_that_latents_are_not_normalised(files, tmp_path):
    save_file(random_taehv().state_dict(), tmp_path / "lighttaew2_1.safetensors")
    (tmp_path / "config.json").write_text('{"raw_latents": true}')
    raw, z = decoder(tmp_path / "lighttaew2_1.safetensors"), jnp.asarray(latents(1, 1, 2, 2, 16))
    expected = decoder(files[256, 128, 64, 64]).decode(z * np.array(WAN_LATENTS_STD) + np.array(WAN_LATENTS_MEAN))
    np.testing.assert_allclose(raw.decode(z), expected, atol=1e-5)


def test_what_is_no_such_decoder_is_one_line(files, tmp_path):
    whole = random_taehv(SMALL).state_dict()

    def refused(tensors) -> str:
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(UserError) as error:
            decoder(tmp_path / "x.safetensors")
        return str(error.value)

    without = {name: value for name, value in whole.items() if name != "decoder.8.weight"}
    assert "'decoder.8.weight' of shape [24, 32, 3, 3] is missing" in refused(without)
    assert "'decoder.23.bias' of shape [2] is unknown" in refused(whole | {"decoder.23.bias": torch.zeros(2)})
    more = whole | {"decoder.7.conv.weight": torch.zeros(64, 32, 1, 1)}
    assert "three factors that multiply to 4" in refused(more)
    damaged = whole | {"decoder.22.bias": torch.tensor([0.0, torch.nan, 0.0])}
    assert "'decoder.22.bias' holds NaN" in refused(damaged)
    with pytest.raises(UserError, match="latents have 8 channels, but the decoder takes 16"):
        decoder(files[SMALL]).decode(jnp.zeros((1, 1, 2, 2, 8)))
