"""A pipeline whose encoders stay in their files: the print of the model that records compare is the same."""

import jax
import jax.numpy as jnp
import pytest
import random_model

from vpae_jax import convert
from vpae_jax.encoding.encoder import fingerprint
from vpae_jax.inference import experts, loading
from vpae_jax.inference.loading import load_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An image-to-video model in two layouts: one is read by tensors, the other by arrays."""
    root = tmp_path_factory.mktemp("models")
    random_model.pipeline(root / "diffusers", image=True)
    convert.main([str(root / "diffusers"), str(root / "orbax"), "--format=orbax"])
    return root


@pytest.mark.parametrize("layout", ["diffusers", "orbax"])
def test_encoders_that_stay_in_their_files_have_the_print_of_those_that_are_read(models, layout, monkeypatch):
    expected, read = fingerprint(load_pipeline(models / layout, jnp.bfloat16)), []
    load = loading.load_part

    def noted(model, part, *more):
        read.append(part)
        return load(model, part, *more)

    for module in (loading, experts):
        monkeypatch.setattr(module, "load_part", noted)
    left = load_pipeline(models / layout, with_transformer=False, with_encoders=False)
    assert read == ["vae"]
    for model in (left.text_encoder, left.image_encoder):
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model))
    assert fingerprint(left) == expected == fingerprint(load_pipeline(models / "diffusers"))
