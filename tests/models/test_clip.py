"""The CLIP vision tower equals transformers' `CLIPVisionModel` at its penultimate hidden states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from vpae_jax.models.clip import CLIPVision, CLIPVisionConfig
from vpae_jax.types import UserError
from vpae_jax.weights.loading import load_part

SIZES = [
    dict(
        image_size=32, patch_size=8, hidden_size=64, num_attention_heads=4, intermediate_size=128, num_hidden_layers=3
    ),
    dict(
        image_size=42,
        patch_size=14,
        hidden_size=48,
        num_attention_heads=3,
        intermediate_size=100,
        num_hidden_layers=2,
        hidden_act="gelu",
        layer_norm_eps=1e-3,
    ),
]


@pytest.fixture(params=SIZES, ids=["tiny", "gelu"])
def pair(request, tmp_path):
    """A random transformers model, the folder that it was saved to, and images."""
    torch.manual_seed(0)
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**request.param)).eval()
    with torch.no_grad():
        for weight in model.parameters():  # larger than the initial weights, so that every term is seen
            weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "image_encoder")
    side = request.param["image_size"]
    return model, tmp_path, np.random.default_rng(0).standard_normal((3, side, side, 3)).astype(np.float32)


def run(model, *inputs):
    return nnx.jit(lambda m, *x: m(*x))(model, *map(jnp.asarray, inputs))


def relative(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def torch_states(model, pixels):
    with torch.no_grad():
        pixels = torch.tensor(pixels).permute(0, 3, 1, 2).to(model.dtype)
        return model(pixels, output_hidden_states=True).hidden_states[-2].float().numpy()


@pytest.mark.parametrize("batch", [1, 3])
def test_equals_transformers(pair, batch):
    model, folder, pixels = pair
    ours = run(load_part(folder, "image_encoder"), pixels[:batch])
    assert ours.shape[1] == CLIPVisionConfig(**{k: getattr(model.config, k) for k in SIZES[0]}).num_tokens
    assert relative(ours, torch_states(model, pixels[:batch])) <= 1e-5


def test_bfloat16_error_is_that_of_torch(pair):
    model, folder, pixels = pair
    exact = torch_states(model, pixels)
    ours = run(load_part(folder, "image_encoder", jnp.bfloat16), pixels)
    assert ours.dtype == jnp.bfloat16
    assert relative(ours, exact) <= 1.5 * relative(torch_states(model.bfloat16(), pixels), exact)


def test_last_layer_is_kept_but_not_run(pair):
    _, folder, pixels = pair
    model = load_part(folder, "image_encoder")
    grads = nnx.jit(nnx.grad(lambda m: jnp.square(m(jnp.asarray(pixels))).mean()))(model)
    for name, leaf in nnx.to_flat_state(grads):
        leaf = np.asarray(leaf.get_value())
        if name[0] == "layers":
            assert not leaf[-1].any() and (name[1:] == ("k_proj", "bias") or leaf[:-1].any()), name
        else:
            assert leaf.any() == (name[0] != "post_layernorm"), name


def test_abstract_construction():
    abstract = nnx.eval_shape(lambda: CLIPVision(CLIPVisionConfig(**SIZES[0]), rngs=nnx.Rngs(0)))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(abstract, nnx.Param)))


def test_bad_sizes_are_one_line():
    with pytest.raises(UserError, match="hidden_act is 'tanh'"):
        CLIPVisionConfig(hidden_act="tanh")
    with pytest.raises(UserError, match="image_size 30 is not a multiple of patch_size 8"):
        CLIPVisionConfig(image_size=30, patch_size=8)
    with pytest.raises(UserError, match="hidden_size 64 is not a multiple of num_attention_heads 5"):
        CLIPVisionConfig(hidden_size=64, num_attention_heads=5)
    with pytest.raises(UserError, match="images are 16x32, expected 32x32"):
        nnx.eval_shape(lambda: CLIPVision(CLIPVisionConfig(**SIZES[0]), rngs=nnx.Rngs(0))(jnp.zeros((1, 16, 32, 3))))
