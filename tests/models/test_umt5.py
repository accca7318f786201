"""The UMT5 encoder equals transformers' `UMT5EncoderModel`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from vpae_jax.models.umt5 import UMT5Config, UMT5Encoder, relative_buckets
from vpae_jax.types import UserError
from vpae_jax.weights.loading import load_part

SIZES = [
    dict(vocab_size=300, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
    dict(vocab_size=97, d_model=48, d_kv=24, d_ff=80, num_layers=3, num_heads=3, relative_attention_max_distance=20),
]


@pytest.fixture(params=SIZES, ids=["tiny", "odd"])
def pair(request, tmp_path):
    """A random transformers model and the folder that it was saved to."""
    torch.manual_seed(0)
    model = transformers.UMT5EncoderModel(transformers.UMT5Config(**request.param)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layer_norm" in name:  # ones would hide a norm that forgets its scale
                weight.copy_(1 + 0.2 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "text_encoder")
    return model, tmp_path


def tokens(vocab: int, lengths: tuple[int, ...], width: int):
    ids = np.random.default_rng(1).integers(0, vocab, (len(lengths), width))
    return ids, np.arange(width)[None] < np.asarray(lengths)[:, None]


def run(model, *inputs):
    return nnx.jit(lambda m, *x: m(*x))(model, *map(jnp.asarray, inputs))


def relative(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def torch_states(model, ids, mask):
    with torch.no_grad():
        return model(torch.tensor(ids), torch.tensor(mask)).last_hidden_state.float().numpy()


@pytest.mark.parametrize("lengths, width", [((16,), 16), ((5, 16, 1), 16), ((30, 61), 61)])
def test_equals_transformers(pair, lengths, width):
    model, folder = pair
    ids, mask = tokens(model.config.vocab_size, lengths, width)
    ours = run(load_part(folder, "text_encoder"), ids, mask)
    assert relative(ours, torch_states(model, ids, mask)) <= 1e-5


def test_bfloat16_error_is_that_of_torch(pair):
    model, folder = pair
    ids, mask = tokens(model.config.vocab_size, (7, 20, 13, 20), 20)
    exact = torch_states(model, ids, mask)
    ours = run(load_part(folder, "text_encoder", jnp.bfloat16), ids, mask)
    assert ours.dtype == jnp.bfloat16
    assert relative(ours, exact) <= 1.5 * relative(torch_states(model.bfloat16(), ids, mask), exact)


def test_padding_does_not_reach_the_prompt(pair):
    model, folder = pair
    ids, mask = tokens(model.config.vocab_size, (4, 9), 12)
    encoder = load_part(folder, "text_encoder")
    other = np.where(mask, ids, (ids + 1) % model.config.vocab_size)
    first, second = (np.asarray(run(encoder, x, mask)) for x in (ids, other))
    np.testing.assert_array_equal(first[mask], second[mask])
    assert np.abs(first[~mask] - second[~mask]).max() > 0.1


@pytest.mark.parametrize("buckets, distance", [(32, 128), (32, 20), (8, 128)])
def test_buckets_equal_transformers_for_every_distance(buckets, distance):
    config = transformers.UMT5Config(
        relative_attention_num_buckets=buckets, relative_attention_max_distance=distance, num_layers=1
    )
    attention = transformers.models.umt5.modeling_umt5.UMT5Attention(config, True)
    position = torch.arange(512)[None, :] - torch.arange(512)[:, None]
    expected = attention._relative_position_bucket(position).numpy()
    np.testing.assert_array_equal(relative_buckets(512, buckets, distance), expected)


def test_abstract_construction_and_gradients():
    config = UMT5Config(**SIZES[0])
    abstract = nnx.eval_shape(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0)))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(abstract, nnx.Param)))
    model = nnx.jit(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0)))()
    layers = nnx.state(model, nnx.Param)["blocks"]["attention"]["q"]["kernel"].get_value()
    assert not np.allclose(layers[0], layers[1])  # each layer has its own initial weights
    ids, mask = (jnp.asarray(x) for x in tokens(300, (8, 3), 8))
    grads = nnx.jit(nnx.grad(lambda m: jnp.square(m(ids, mask)).mean() + m(ids, mask)[..., 0].mean()))(model)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_other_feed_forwards_are_refused():
    with pytest.raises(UserError, match="feed_forward_proj is 'relu'"):
        UMT5Config(feed_forward_proj="relu")
