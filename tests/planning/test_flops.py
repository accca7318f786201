"""FLOPs against counts by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import Mesh, PartitionSpec

from vpae_jax.methods.common import every_kth_step
from vpae_jax.models import presets
from vpae_jax.models.wan_dit import WanTransformer
from vpae_jax.planning.flops import Work, count
from vpae_jax.types import Condition


def counted(function, *shapes, dtype=jnp.float32) -> Work:
    structs = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return count(jax.jit(function).trace(*structs).jaxpr)


def test_products_and_their_traffic():
    work = counted(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (3, 4, 5), (3, 5, 6))
    assert work.flops == 2 * 3 * 4 * 5 * 6
    assert work.activation_bytes == 4 * 3 * (4 * 5 + 5 * 6 + 4 * 6)
    assert work.weight_bytes == 0
    assert counted(lambda a, w: a @ w, (3, 4, 5), (5, 6)).weight_bytes == 4 * 5 * 6


def test_convolutions():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert counted(convolve, (2, 8, 8, 3), (3, 3, 3, 5)).flops == 2 * 2 * 8 * 8 * 5 * 3 * 3 * 3


@pytest.mark.parametrize(("policy", "passes"), [(None, 3), (jax.checkpoint_policies.nothing_saveable, 4)])
def test_recomputation_counts_apart(policy, passes):
    def loss(weights, x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        if policy is not None:
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    work = counted(jax.grad(loss, argnums=(0, 1)), (7, 16, 16), (4, 16))
    once = 7 * 2 * 4 * 16 * 16
    assert (work.flops, work.model_flops, work.recomputed) == (passes * once, 3 * once, (passes - 3) * once)


def test_a_term_of_every_fourth_step_counts_a_quarter():
    """Forwards and backwards, and what is written down beside it as a whole."""

    def loss(every, w, x):
        rare = every_kth_step(every, 3, lambda: jnp.sum(jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x)))
        return jnp.sum(jnp.tanh(x @ w)) + rare

    usual, rare = (counted(jax.grad(partial(loss, every)), (16, 16), (4, 16)).flops for every in (1, 4))
    beside = counted(jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w))), (16, 16), (4, 16)).flops
    assert rare == beside + (usual - beside) / 4 and beside < rare < usual


def test_the_dearest_branch_counts():
    def either(flag, x):
        return jax.lax.cond(flag > 0, lambda x: x @ x, lambda x: x, x)

    structs = (jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((8, 8), jnp.float32))
    assert count(jax.jit(either).trace(*structs).jaxpr).flops == 2 * 8**3


def test_a_loop_without_end_in_sight_is_said():
    def until(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1, lambda x: x @ x, x)

    work = counted(until, (8, 8))
    assert (work.flops, work.unknown_loops) == (2 * 8**3, 1)


def test_mapped_products_count_on_every_device():
    mesh = Mesh(np.array(jax.devices()), ("x",))
    rows, whole = PartitionSpec("x"), PartitionSpec()
    product = jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    assert counted(product, (16, 4), (4, 3)).flops == 2 * 16 * 4 * 3


def test_a_kernel_counts_at_every_point_of_its_grid():
    def kernel(x, y, out):
        out[...] = jnp.dot(x[...], y[...])

    product = pl.pallas_call(
        kernel,
        grid=(4, 2),
        in_specs=[pl.BlockSpec((8, 16), lambda i, j: (i, 0)), pl.BlockSpec((16, 8), lambda i, j: (0, j))],
        out_specs=pl.BlockSpec((8, 8), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((32, 16), jnp.float32),
    )
    assert counted(product, (32, 16), (16, 16)).flops == 2 * 32 * 16 * 16


@pytest.mark.parametrize(("fused", "backward"), [(False, 7), (True, 5)])
def test_attention_kernels(fused, backward):
    b, heads, n, d = 3, 2, 512, 128
    small = None if fused else 256
    blocks = splash_attention_kernel.BlockSizes(256, 256, 256, 256, 256, 256, small, small, use_fused_bwd_kernel=fused)
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((n, n))] * heads)
    kernel = splash_attention_kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=blocks)

    def loss(q, k, v):
        return jax.vmap(kernel)(q, k, v).sum()

    one = 2 * b * heads * n * n * d
    shapes = [(b, heads, n, d)] * 3
    assert counted(loss, *shapes, dtype=jnp.bfloat16).flops == 2 * one
    work = counted(jax.grad(loss, argnums=(0, 1, 2)), *shapes, dtype=jnp.bfloat16)
    assert work.flops == pytest.approx((2 + backward) * one, rel=0.01)
    assert work.model_flops == pytest.approx(6 * one, rel=0.01)  # twice forward, four times backward


def test_a_transformer_by_hand():
    config = presets.TINY.transformer
    graph, weights = nnx.split(nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0))))
    b, (f, h, w), s, pictures = 2, (3, 6, 6), 15, 17

    def run(weights, x, t, text, mask, image, frames):
        return nnx.merge(graph, weights)(x, t, Condition(text, mask, image, frames))

    structs = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((b, f, h, w, 16), (b,), (b, s, config.text_dim), (b, s), (b, pictures, 64), (b, f, h, w, 20))
    ]
    structs[3] = jax.ShapeDtypeStruct((b, s), jnp.bool_)
    flops = count(jax.jit(run).trace(weights, *structs).jaxpr).flops
    d, n = config.width, f * (h // 2) * (w // 2)
    text = s + 1  # and one token of padding
    block = n * (4 * d * d + 2 * n * d)  # self-attention
    block += n * 2 * d * d + text * 2 * d * d + pictures * 2 * d * d + 2 * n * (text + pictures) * d  # cross-attention
    block += n * 2 * d * config.ffn_dim
    enter = n * 4 * 36 * d + text * (config.text_dim * d + d * d) + pictures * (64 * 64 + 64 * d)
    enter += config.freq_dim * d + d * d + 6 * d * d
    assert flops == 2 * b * (config.num_layers * block + enter + n * d * 4 * 16)
