"""The Wan transformer written out in PyTorch in float64, with a matrix that says which frame sees which, and where.

Nothing is shared with `vpae_jax` but the weights' names and layouts: every query frame turns all keys by itself, logits
of all tokens with all tokens are there, and those that nobody may see are -inf. A clip of which each chunk sees the
earlier ones clean is a sequence of clean frames and, behind them, noisy ones.
"""

import math
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import Tensor

from vpae_jax.models.wan_dit import WanTransformer

HIDDEN = -1


def random_model(config, **options) -> WanTransformer:
    """Every weight random, norms, tables and biases included, and of a size at which every term matters."""
    draw = np.random.default_rng(0).standard_normal

    def one(path, leaf):
        name = str(path[-2].key)
        if name == "kernel":
            inputs = math.prod(leaf.shape[1:-1] if str(path[0].key) == "blocks" else leaf.shape[:-1])
            return jnp.asarray(draw(leaf.shape) / inputs**0.5, leaf.dtype)
        return jnp.asarray((name == "scale") + 0.3 * draw(leaf.shape), leaf.dtype)

    graph, params = nnx.split(nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0), **options)), nnx.Param)
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(one, params))


def tensors(tree) -> dict[str, Tensor]:
    """Weights by path, which PyTorch differentiates."""
    flat = {"/".join(map(str, path)): np.asarray(value[...]) for path, value in nnx.to_flat_state(tree)}
    return {path: tensor(value).requires_grad_() for path, value in flat.items()}


def tensor(x) -> Tensor:
    return torch.tensor(np.asarray(x, np.float64))


def velocity(weights: dict[str, Tensor], config, x, t, condition, place: np.ndarray) -> Tensor:
    """The velocity of frames, each at a time of its own.

    Args:
      weights: by path.
      config: sizes.
      x: `[b, f, h, w, c]`, of clean and noisy frames.
      t: `[b, f]`.
      condition: whose `frames`, if there are any, are those of `x`.
      place: `[f, f]`, at which place the row's frame sees the column's, or HIDDEN; its own on the diagonal.
    """
    x = tensor(x) if condition.frames is None else torch.cat([tensor(x), tensor(condition.frames)], -1)
    (b, f, h, w, _), heads = x.shape, config.num_attention_heads
    rows, columns = h // 2, w // 2
    patches = x.unflatten(3, (columns, 2)).unflatten(2, (rows, 2)).permute(0, 1, 2, 4, 3, 5, 6).flatten(4)
    hidden = linear(patches.flatten(2, 3), weights, "patch_embedding")
    half = config.freq_dim // 2
    waves = 1000 * tensor(t)[..., None] * 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    time = mlp(torch.cat([waves.cos(), waves.sin()], -1), weights, "condition_embedder/time_embedder", F.silu)
    rows_of_time = linear(F.silu(time), weights, "condition_embedder/time_proj").unflatten(-1, (6, -1))
    padding = (0, 0, 0, config.text_len - condition.text.shape[1])
    text = mlp(F.pad(tensor(condition.text), padding), weights, "condition_embedder/text_embedder", tanh_gelu)
    image = None if condition.image is None else image_tokens(tensor(condition.image), weights)
    turns = turns_of(np.arange(place.max() + 1), rows, columns, config.attention_head_dim)

    for layer in range(config.num_layers):
        own = {name.removeprefix("blocks/"): w[layer] for name, w in weights.items() if name.startswith("blocks/")}
        table = (own["scale_shift_table"] + rows_of_time)[:, :, :, None]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.unbind(2)
        y = norm(hidden, config) * (1 + scale) + shift
        hidden = hidden + gate * self_attention(y, own, config, turns, place)
        y = hidden.flatten(1, 2)
        y = norm(y, config) * own["norm2/scale"] + own["norm2/bias"]
        q = rms_norm(linear(y, own, "attn2/to_q"), own["attn2/norm_q/scale"], config)
        k = rms_norm(linear(text, own, "attn2/to_k"), own["attn2/norm_k/scale"], config)
        out = attend(q, k, linear(text, own, "attn2/to_v"), heads)
        if image is not None:
            k = rms_norm(linear(image, own, "attn2/add_k_proj"), own["attn2/norm_added_k/scale"], config)
            out = out + attend(q, k, linear(image, own, "attn2/add_v_proj"), heads)
        hidden = hidden + linear(out, own, "attn2/to_out").unflatten(1, (f, -1))
        y = norm(hidden, config) * (1 + ffn_scale) + ffn_shift
        y = linear(tanh_gelu(linear(y, own, "ffn/proj_in")), own, "ffn/proj_out")
        hidden = hidden + ffn_gate * y

    shift, scale = (weights["scale_shift_table"] + time[:, :, None])[:, :, :, None].unbind(2)
    out = linear(norm(hidden, config) * (1 + scale) + shift, weights, "proj_out")
    out = out.reshape(b, f, rows, columns, 2, 2, -1).permute(0, 1, 2, 4, 3, 5, 6)
    return out.reshape(b, f, h, w, -1)


def self_attention(y: Tensor, weights: dict[str, Tensor], config, turns: Tensor, place: np.ndarray) -> Tensor:
    """Attention of all frames' tokens, `[b, f, n, d]`, a query frame at a time."""
    heads = config.num_attention_heads
    q = rms_norm(linear(y, weights, "attn1/to_q"), weights["attn1/norm_q/scale"], config)
    k = rms_norm(linear(y, weights, "attn1/to_k"), weights["attn1/norm_k/scale"], config)
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in (q, k, linear(y, weights, "attn1/to_v")))
    results = []
    for i, row in enumerate(place):
        turned = turn(k, turns[row.clip(0)])
        logits = torch.einsum("bnhd,bjmhd->bhnjm", turn(q[:, i], turns[row[i]]), turned) / q.shape[-1] ** 0.5
        logits = logits.masked_fill(torch.tensor(row == HIDDEN)[:, None], -math.inf)
        probabilities = logits.flatten(3).softmax(-1)
        results.append(torch.einsum("bhnm,bmhd->bnhd", probabilities, v.flatten(1, 2)).flatten(2))
    return linear(torch.stack(results, 1), weights, "attn1/to_out")


def turns_of(frames: np.ndarray, rows: int, columns: int, head_dim: int) -> Tensor:
    """Complex numbers of modulus 1, `[f, n, head_dim / 2]`: a frame's tokens turn with frame, row and column."""
    pairs = head_dim // 2
    counts = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    places = torch.cartesian_prod(*(torch.as_tensor(x).double() for x in (frames, range(rows), range(columns))))
    rates = [10000.0 ** -(torch.arange(count, dtype=torch.float64) / count) for count in counts]
    angles = torch.cat([places[:, [axis]] * rate for axis, rate in enumerate(rates)], 1)
    return torch.polar(torch.ones_like(angles), angles).reshape(len(frames), rows * columns, pairs)


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Heads' channels in pairs, as complex numbers, times those of their tokens."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns[..., None, :]).flatten(-2)


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    kernel = weights[f"{name}/kernel"]
    return x @ kernel.reshape(-1, kernel.shape[-1]) + weights[f"{name}/bias"]


def mlp(x: Tensor, weights: dict[str, Tensor], name: str, activation) -> Tensor:
    return linear(activation(linear(x, weights, f"{name}/linear_1")), weights, f"{name}/linear_2")


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def norm(x: Tensor, config) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=config.eps)


def rms_norm(x: Tensor, scale: Tensor, config) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + config.eps).sqrt() * scale


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def image_tokens(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    own = {
        name.removeprefix("condition_embedder/image_embedder/"): weight
        for name, weight in weights.items()
        if "/image_embedder/" in name
    }
    x = F.layer_norm(x, x.shape[-1:], own["norm1/scale"], own["norm1/bias"])
    x = linear(F.gelu(linear(x, own, "ff/proj_in")), own, "ff/proj_out")
    return F.layer_norm(x, x.shape[-1:], own["norm2/scale"], own["norm2/bias"])


def places(sizes: list[int], window: int = 0, sink: int = 0) -> np.ndarray:
    """`place` of a clip in chunks of so many frames: a frame sees its chunk, and of those before it the latest `window`
    (0: all) and the clip's first `sink`, which stand directly before the window."""
    place, starts = np.full((sum(sizes),) * 2, HIDDEN), np.cumsum([0, *sizes])
    for start, stop in pairwise(starts):
        oldest = max(start - window, 0) if window else 0
        seen = {frame: frame for frame in range(oldest, stop)}
        for frame in range(min(sink, oldest)):
            seen[frame] = oldest - min(sink, oldest) + frame
        for frame, where in seen.items():
            place[start:stop, frame] = where
    return place


def clean_then_noisy(place: np.ndarray, sizes: list[int]) -> np.ndarray:
    """`place` of a clean clip and, behind it, the noisy one, whose chunks see themselves noisy and the others clean."""
    chunk = np.repeat(np.arange(len(sizes)), sizes)
    same = chunk[:, None] == chunk
    hidden = np.full_like(place, HIDDEN)
    return np.block([[place, hidden], [np.where(same, HIDDEN, place), np.where(same, place, HIDDEN)]])
