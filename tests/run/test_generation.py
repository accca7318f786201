"""Clips of a network on many devices are decoded there: each device has its clips, and of each its rows."""

import jax
import numpy as np
import pytest

from vpae_jax import sharding
from vpae_jax.config import MeshConfig
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.models.wan_vae_rows import Rows
from vpae_jax.run.generation import decoded


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("tiny", with_transformer=False, with_encoders=False)


@pytest.mark.parametrize(("clips", "mesh"), [(1, {"fsdp": 2, "context": 4}), (2, {"fsdp": 2, "context": 4}), (8, {})])
def test_frames_are_those_of_one_device(pipeline, clips, mesh):
    latents = np.random.default_rng(0).normal(size=(clips, *pipeline.latent_shape(1)[1:])).astype(np.float32)
    devices = sharding.make_mesh(MeshConfig(**mesh), jax.devices())
    spread = pipeline.over(devices)
    assert spread.vae.rows == Rows(devices) and spread.over(devices) is spread and pipeline.vae.rows is None
    expected, _ = decoded(pipeline, latents)
    made, seconds = decoded(spread, latents, devices)
    assert made.shape == expected.shape and set(seconds) == {"decode", "transfer"}
    assert np.abs(made.astype(int) - expected).max() <= 1


def test_latents_that_are_not_finite_have_no_clips(pipeline):
    assert decoded(pipeline, np.full(pipeline.latent_shape(1), np.nan, np.float32))[0] is None
