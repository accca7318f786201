"""What the tests of LoRA files share: models with a teacher and a student, and comparisons of changes."""

import logging
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import random_model
import torch

from vpae_jax.types import Condition
from vpae_jax.weights.extraction import extract
from vpae_jax.weights.loading import read_part
from vpae_jax.weights.lora import Lora, Merged
from vpae_jax.weights.parts import flat
from vpae_jax.weights.writing import from_tree

RANK = 20  # more than the shorter side of one layer, so that ranks differ
FILE = "pytorch_lora_weights.safetensors"


def model(folder: Path, image: bool) -> SimpleNamespace:
    """A pipeline of diffusers, its transformer as the teacher, and a student that differs everywhere."""
    pipe = random_model.pipeline(folder, image)
    config, params = read_part(folder, "transformer")
    draw = np.random.default_rng(0).standard_normal
    changed = jax.tree.map(lambda x: np.asarray(x) + 0.1 * draw(x.shape, np.float32), params)
    teacher, student = (from_tree("transformer", config, tree) for tree in (params, changed))
    lora = extract(student, teacher, RANK).lora
    return SimpleNamespace(
        folder=folder, pipe=pipe, config=config, params=params, teacher=teacher, student=student, lora=lora
    )


@contextmanager
def silent(caplog):
    """Fails if diffusers or PEFT has something to remark."""
    diffusers.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield
    diffusers.logging.disable_propagation()
    assert [r.getMessage() for r in caplog.records if r.name.startswith(("diffusers", "peft"))] == []


def layers(values):
    """Every parameter and layer."""
    for path, shape in values.shapes().items():
        for layer in range(shape[0] if path.startswith("blocks/") else 1):
            yield path, layer


def assert_same(found: Lora, expected: Lora):
    assert found.adapters.keys() == expected.adapters.keys()
    assert found.differences.keys() == expected.differences.keys()
    for key, adapter in expected.adapters.items():
        np.testing.assert_array_equal(found.adapters[key].a, adapter.a)
        np.testing.assert_array_equal(found.adapters[key].b, adapter.b)
    for key, value in expected.differences.items():
        np.testing.assert_array_equal(found.differences[key], value)


def assert_merges_as(merged: Merged, module: torch.nn.Module, tmp_path: Path):
    """Merged weights are those of diffusers' module."""
    module.save_pretrained(tmp_path / "fused" / "transformer")
    fused = flat(read_part(tmp_path / "fused", "transformer")[1])
    for path, layer in layers(merged):
        expected = fused[path][layer] if path.startswith("blocks/") else fused[path]
        np.testing.assert_allclose(merged.read(path, layer), expected, atol=1e-6, rtol=1e-6, err_msg=path)


def velocities(config, torch_models, our_models):
    """Outputs for one random input."""
    draw = np.random.default_rng(1).standard_normal
    x = draw((1, 3, 4, 6, config.in_channels), np.float32)
    text, image = draw((1, 512, config.text_dim), np.float32), draw((1, 5, config.image_dim or 1), np.float32)
    has_image = config.image_dim is not None
    condition = Condition(
        text=jnp.asarray(text),
        text_mask=jnp.ones((1, 512), bool),
        image=jnp.asarray(image) if has_image else None,
        frames=jnp.asarray(x[..., 16:]) if has_image else None,
    )
    for ours in our_models:
        yield np.asarray(ours(jnp.asarray(x[..., :16]), jnp.asarray([0.7]), condition))
    for theirs in torch_models:
        with torch.no_grad():
            out = theirs(
                torch.tensor(x).permute(0, 4, 1, 2, 3),
                torch.tensor([700.0]),
                torch.tensor(text),
                torch.tensor(image) if has_image else None,
            ).sample
        yield out.permute(0, 2, 3, 4, 1).numpy()
