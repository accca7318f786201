"""The causal transformer against one written out with a matrix of who sees whom, and its own promises."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from plain_wan import HIDDEN, clean_then_noisy, places, random_model, tensor, tensors, velocity

from vpae_jax.config import MeshConfig
from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.rollout import roll_out
from vpae_jax.models.wan_causal import CausalWan, _Whole
from vpae_jax.models.wan_dit import WanTransformerConfig
from vpae_jax.sharding import TRANSFORMER_RULES, make_mesh, param_shardings
from vpae_jax.types import Condition, Memory, UserError

T2V = WanTransformerConfig(
    num_attention_heads=2, attention_head_dim=12, text_dim=20, freq_dim=16, ffn_dim=40, num_layers=2, text_len=8
)
I2V = replace(T2V, in_channels=36, image_dim=28, added_kv_proj_dim=24)
# Chunks, and how many frames each has.
CASES = {
    "frames": (Chunks(1), [1, 1, 1]),
    "pairs": (Chunks(2), [2, 2]),
    "threes": (Chunks(), [3, 3]),
    "first of 1": (Chunks(2, first=1), [1, 2, 2]),
    "first of 3": (Chunks(1, first=3), [3, 1]),
    "window": (Chunks(2, window=3), [2, 2, 2, 2]),
    "window and sink": (Chunks(2, window=3, sink=1), [2, 2, 2, 2, 2]),
    "window and large sink": (Chunks(1, first=3, window=1, sink=2), [3, 1, 1, 1]),
}
VARIANTS = {name: (T2V, *case) for name, case in CASES.items()} | {
    "image-to-video": (I2V, *CASES["first of 1"]),
    "image-to-video, window and sink": (I2V, *CASES["window and sink"]),
}
SHORT = ("threes", "window and sink", "image-to-video")
variants = pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.long] * (name not in SHORT)) for name in VARIANTS]
)


class Programs:
    """Compiled evaluations of a causal transformer, and what they are given."""

    def __init__(self, config, chunks, sizes, **options):
        graph, self.weights = nnx.split(random_model(config, **options), nnx.Param)
        self.config, self.chunks, self.sizes = config, chunks, sizes

        def compiled(evaluate):
            return jax.jit(lambda weights, *given: evaluate(CausalWan(nnx.merge(graph, weights), chunks), *given))

        self.call = compiled(CausalWan.__call__)
        self.recall = compiled(CausalWan.recall)
        self.remember = compiled(CausalWan.remember)
        self.step = compiled(CausalWan.step)
        self.roll_out = compiled(lambda *given: roll_out(*given, jax.random.key(0), one_step))
        self.memorize = jax.jit(CausalWan(nnx.merge(graph, self.weights), chunks).memorize, static_argnums=2)
        self.empty = CausalWan(nnx.merge(graph, self.weights), chunks).empty
        self.x0, self.x, self.t, self.condition = inputs(config, sum(sizes))

    def place(self):
        return places(self.sizes, self.chunks.window, self.chunks.sink)

    def spans(self):
        stops = np.cumsum(self.sizes).tolist()
        return list(zip([0, *stops], stops, strict=False))

    def part(self, start, stop):
        """What a chunk is conditioned on."""
        frames = self.condition.frames
        return self.condition if frames is None else replace(self.condition, frames=frames[:, start:stop])

    def past(self, weights=None):
        """The memory of the clean clip."""
        return self.remember(weights or self.weights, self.x0, jnp.zeros_like(self.t), self.condition)

    def remembered(self, past, start, stop, chunk=None):
        """A memory with a chunk behind what it holds, by default one of the clean clip."""
        zeros, chunk = jnp.zeros(len(self.x0)), self.x0[:, start:stop] if chunk is None else chunk
        _, pair = self.step(self.weights, chunk, zeros, self.part(start, stop), past)
        return self.memorize(past, pair, stop - start)

    @property
    def chunk_times(self):
        """A time for each chunk, that of its last frame, as its frames have it."""
        last = [stop - 1 for start, stop in self.spans() for _ in range(start, stop)]
        return self.t[:, jnp.asarray(last)]


programs = cache(lambda variant, **options: Programs(*VARIANTS[variant], **options))


def inputs(config, frames, batch=2, rows=4, columns=6, seed=1):
    """A clean and a noisy clip, a time for each frame, and what they are conditioned on."""
    draw = np.random.default_rng(seed).standard_normal
    normal = lambda *shape: jnp.asarray(draw(shape), jnp.float32)  # noqa: E731
    mask = jnp.arange(6) < jnp.arange(3, 3 + batch)[:, None]
    image, given = None, None
    if config.image_dim is not None:
        image, given = normal(batch, 5, config.image_dim), normal(batch, frames, rows, columns, 20)
    condition = Condition(normal(batch, 6, config.text_dim) * mask[..., None], mask, image, given)
    t = jnp.asarray(np.random.default_rng(seed + 1).integers(50, 1024, (batch, frames)) / 1024, jnp.float32)
    size = (batch, frames, rows, columns, 16)
    return normal(*size), normal(*size), t, condition


def error(found, expected) -> float:
    """Relative, in the 2-norm."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def taught(weights, config, x0, x, t, condition, place, sizes):
    """The plain velocity of noisy frames whose chunks see the earlier ones clean."""
    if condition.frames is not None:
        condition = replace(condition, frames=jnp.concatenate([condition.frames] * 2, 1))
    both, times = jnp.concatenate([x0, x], 1), jnp.concatenate([jnp.zeros_like(t), t], 1)
    found = velocity(weights, config, both, times, condition, clean_then_noisy(place, sizes))
    return found[:, x0.shape[1] :]


@variants
def test_equal_to_a_mask_over_all_tokens(variant):
    run = programs(variant)
    given, place = (run.x, run.t, run.condition), run.place()
    plain = tensors(run.weights)
    found = run.call(run.weights, *given)
    assert found.dtype == run.x.dtype
    assert error(found, velocity(plain, run.config, *given, place).detach()) < 3e-6
    found = run.recall(run.weights, *given, run.past())
    expected = taught(plain, run.config, run.x0, *given, place, run.sizes)
    assert error(found, expected.detach()) < 3e-6


@variants
def test_chunk_by_chunk_equals_all_at_once(variant):
    """Also where the window moves what the memory holds, and the sink with it."""
    run = programs(variant)
    t = run.chunk_times
    expected = run.recall(run.weights, run.x, t, run.condition, run.past())
    past, kept = run.empty(run.x), run.chunks.window + run.chunks.sink
    for start, stop in run.spans():
        v, _ = run.step(run.weights, run.x[:, start:stop], t[:, start], run.part(start, stop), past)
        assert error(v, expected[:, start:stop]) < 3e-6, start
        past = run.remembered(past, start, stop)
        assert int(past.frames) == (min(stop, kept) if run.chunks.window else stop)
    assert run.step._cache_size() == len({*run.sizes}), "one program for all chunks of a size"


def test_the_memory_of_a_clip_is_what_the_steps_leave():
    run = programs("threes")
    past, whole = run.empty(run.x0), run.past()
    for start, stop in run.spans():
        past = run.remembered(past, start, stop)
    assert int(past.frames) == int(whole.frames) == 6
    assert past.keys.shape == whole.keys.shape == (2, 2, 6 * 6, 2, 12)
    assert error(past.keys, whole.keys) < 3e-6 and error(past.values, whole.values) < 3e-6


def test_a_memory_in_bfloat16():
    exact, run = programs("window and sink"), programs("window and sink", dtype=jnp.bfloat16)
    t = jnp.full_like(run.t, 0.75)
    past = run.past()
    assert past.keys.dtype == past.values.dtype == run.empty(run.x).keys.dtype == jnp.bfloat16
    found = run.recall(run.weights, run.x, t, run.condition, past)
    expected = exact.recall(exact.weights, run.x, t, run.condition, exact.past())
    rounding = error(found, expected)
    assert found.dtype == jnp.float32 and 1e-3 < rounding < 3e-2
    past = run.empty(run.x)
    for start, stop in run.spans():
        v, _ = run.step(run.weights, run.x[:, start:stop], t[:, start], run.part(start, stop), past)
        assert error(v, expected[:, start:stop]) < 1.5 * rounding
        past = run.remembered(past, start, stop)


def test_one_chunk_is_the_transformer_that_sees_all():
    model = random_model(I2V)
    causal = CausalWan(model, Chunks(3))
    _, x, t, condition = inputs(I2V, 3)
    t = jnp.repeat(t[:, :1], 3, 1)
    whole = jax.jit(lambda x, t: model(x, t[:, 0], condition))(x, t)
    assert error(jax.jit(lambda x, t: causal(x, t, condition))(x, t), whole) < 1e-6
    found, _ = jax.jit(lambda x, t: causal.step(x, t[:, 0], condition, causal.empty(x)))(x, t)
    assert error(found, whole) < 1e-6


def frames_of(gradient, frames):
    """The frames, of an array with frames or their tokens on its axis -4 (or 1 of 2), that a gradient reaches."""
    moved = jnp.moveaxis(gradient, 1, 0)
    return {frame for frame, part in enumerate(moved.reshape(frames, -1)) if part.any()}


@pytest.mark.parametrize("variant", ["image-to-video", pytest.param("window and sink", marks=pytest.mark.long)])
def test_earlier_frames_do_not_see_later_ones(variant):
    run = programs(variant)
    _, *other = inputs(run.config, sum(run.sizes), seed=7)
    given = (run.x, run.t, replace(run.condition, text=other[2].text))
    expected = run.call(run.weights, *given)
    for _, stop in run.spans():
        mixed = lambda own, other: jnp.concatenate([own[:, :stop], other[:, stop:]], 1)  # noqa: B023, E731
        x, t, condition = mixed(run.x, other[0]), mixed(run.t, other[1]), given[2]
        if condition.frames is not None:
            condition = replace(condition, frames=mixed(condition.frames, other[2].frames))
        found = run.call(run.weights, x, t, condition)
        np.testing.assert_array_equal(found[:, :stop], expected[:, :stop])
        assert not (found[:, stop:] == expected[:, stop:]).any()


@pytest.mark.parametrize("variant", ["window and large sink", pytest.param("image-to-video", marks=pytest.mark.long)])
def test_gradients_reach_what_is_seen_and_nothing_else(variant):
    run, count = programs(variant), sum(VARIANTS[variant][2])
    seen, chunk = run.place() != HIDDEN, np.repeat(np.arange(len(run.sizes)), run.sizes)
    through_two_layers = seen.astype(int) @ seen > 0

    @jax.jit
    def pull(weight, past):
        evaluate = lambda x, t: run.call(run.weights, x, t, run.condition)  # noqa: E731
        whole = jax.vjp(evaluate, run.x, run.t)[1](weight)
        evaluate = lambda x, k, v: run.recall(run.weights, x, run.t, run.condition, Memory(k, v, past.frames))  # noqa: E731
        return *whole, *jax.vjp(evaluate, run.x, past.keys, past.values)[1](weight)

    for number, (start, stop) in enumerate(run.spans()):
        weight = jnp.zeros_like(run.x).at[:, start:stop].set(1.0)
        x, t, noisy, keys, values = pull(weight, run.past())
        assert frames_of(x, count) == frames_of(t, count) == {*np.flatnonzero(through_two_layers[start])}
        assert frames_of(noisy, count) == {*range(start, stop)}
        for gradient in (*keys, *values):  # of each layer
            assert frames_of(gradient, count) == {*np.flatnonzero(seen[start] & (chunk != number))}


def test_what_a_memory_has_not_in_use_is_not_seen():
    run = programs("window and sink")
    past = run.remembered(run.empty(run.x), 0, 2)
    used = 2 * 6  # tokens
    assert past.keys.shape[2] == 6 * 6 and int(past.frames) == 2

    def step(keys, values):
        return run.step(run.weights, run.x[:, 2:4], run.t[:, 2], run.condition, Memory(keys, values, past.frames))[0]

    noise = jnp.asarray(np.random.default_rng(3).standard_normal(past.keys.shape), jnp.float32)
    stale = [x.at[:, :, used:].set(noise[:, :, used:]) for x in (past.keys, past.values)]
    v, pull = jax.vjp(step, *stale)
    np.testing.assert_array_equal(v, step(past.keys, past.values))
    for gradient in pull(jnp.ones_like(v)):
        assert gradient[:, :, :used].any((1, 3, 4)).all() and not gradient[:, :, used:].any()


@cache
def plain_gradients():
    """Of the weights, of a weighted sum of velocities whose chunks see the earlier ones clean."""
    run = programs("window and sink")
    plain = tensors(run.weights)
    v = taught(plain, run.config, run.x0, run.x, run.chunk_times, run.condition, run.place(), run.sizes)
    (v * tensor(weighting(run))).sum().backward()
    return {path: weight.grad.numpy() for path, weight in plain.items()}


def weighting(run):
    return np.random.default_rng(4).standard_normal(run.x.shape).astype(np.float32)


def assert_gradients(found):
    found, expected = {path: x.detach() for path, x in tensors(found).items()}, plain_gradients()
    assert found.keys() == expected.keys()
    for path, gradient in expected.items():
        assert error(found[path], gradient) < 1e-5, path


@pytest.mark.parametrize(
    "remat", ["full", *(pytest.param(r, marks=pytest.mark.long) for r in ("none", "dots", "attention"))]
)
def test_gradients_of_all_chunks_at_once(remat):
    run = programs("window and sink", remat=remat)

    @jax.jit
    @jax.grad
    def gradients(weights):
        v = run.recall(weights, run.x, run.chunk_times, run.condition, run.past(weights))
        return (weighting(run) * v).sum()

    assert_gradients(gradients(run.weights))


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.long)])
def test_gradients_of_chunk_by_chunk(remat):
    """They pass through the memory, as long as nobody stops them."""
    run = programs("window and sink", remat=remat)

    def parts(x):
        return jnp.moveaxis(jnp.reshape(x, (2, 5, 2, *x.shape[2:])), 1, 0)

    @jax.jit
    @jax.grad
    def gradients(weights):
        def turn(past, chunk):
            x0, x, t, weight = chunk
            v, _ = run.step(weights, x, t, run.condition, past)
            _, pair = run.step(weights, x0, jnp.zeros_like(t), run.condition, past)
            return run.memorize(past, pair, 2), (weight * v).sum()

        chunks = parts(run.x0), parts(run.x), run.chunk_times[:, ::2].T, parts(weighting(run))
        return jax.lax.scan(turn, run.empty(run.x), chunks)[1].sum()

    assert_gradients(gradients(run.weights))


def one_step(velocity, noise, key):
    return noise - velocity(noise, jnp.ones(len(noise))), None


def test_a_roll_out_longer_than_its_window():
    """Equals steps by hand, and all chunks at once after the memory of what it made."""
    run = programs("window and sink")
    x0, _, past = run.roll_out(run.weights, run.x, run.condition)
    by_hand, made = run.empty(run.x), []
    for start, stop in run.spans():
        v, _ = run.step(run.weights, run.x[:, start:stop], jnp.ones(2), run.condition, by_hand)
        made.append(run.x[:, start:stop] - v)
        by_hand = run.remembered(by_hand, start, stop, made[-1])
    assert error(x0, jnp.concatenate(made, 1)) < 3e-6
    assert error(past.keys, by_hand.keys) < 3e-6 and error(past.values, by_hand.values) < 3e-6
    assert int(past.frames) == 4
    whole = run.remember(run.weights, x0, jnp.zeros_like(run.t), run.condition)
    v = run.recall(run.weights, run.x, jnp.ones_like(run.t), run.condition, whole)
    assert error(run.x - v, x0) < 3e-6


def test_a_roll_out_needs_as_much_as_its_window():
    """Whatever its length: only the clip itself grows, of which the program may hold a few copies."""
    config = replace(T2V, num_layers=8)
    graph, weights = nnx.split(random_model(config), nnx.Param)
    _, one, _, condition = inputs(config, 1)
    remembered = 2 * config.num_layers * config.width / (4 * one.shape[-1]) * one.nbytes  # of a frame

    def temporary(chunks, frames):
        def program(weights, noise):
            return roll_out(
                CausalWan(nnx.merge(graph, weights), chunks), noise, condition, jax.random.key(0), one_step
            )[0]

        noise = jax.ShapeDtypeStruct((2, frames, *one.shape[2:]), jnp.float32)
        return jax.jit(program).lower(weights, noise).compile().memory_analysis().temp_size_in_bytes

    short, middle, long = (temporary(Chunks(2, window=3, sink=1), frames) for frames in (6, 12, 24))
    assert long - middle < 3 * 12 * one.nbytes < 0.6 * 12 * remembered
    assert middle - short < 3 * 6 * one.nbytes
    assert temporary(Chunks(2), 24) - long > (24 - 6) * remembered, "without a window, all frames are remembered"


SPLIT = replace(I2V, num_attention_heads=4, text_dim=16, ffn_dim=64, image_dim=16, added_kv_proj_dim=48)
MESHES = {
    "fsdp 2 x context 2 x tensor 2": MeshConfig(fsdp=2, context=2, tensor=2),
    "data 2 x context 2 x tensor 2": MeshConfig(data=2, fsdp=1, context=2, tensor=2),
    "fsdp 4 x context 2": MeshConfig(fsdp=4, context=2),
    "fsdp 2 x context 4": MeshConfig(fsdp=2, context=4),
}


@cache
def on_mesh(config, gradients):
    """Velocities, a roll-out, the memory and what a roll-out remembers; gradients through all. 4 tokens are a chunk."""
    mesh = None if config is None else make_mesh(config)
    graph, weights = nnx.split(random_model(SPLIT, mesh=mesh), nnx.Param)
    x0, x, t, condition = inputs(SPLIT, 5, batch=4, columns=4)
    if mesh is not None:
        weights = jax.device_put(weights, param_shardings(weights, TRANSFORMER_RULES, mesh))
        clips = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        x0, x, t, condition = jax.device_put((x0, x, t, condition), clips)

    def total(weights):
        network = CausalWan(nnx.merge(graph, weights), Chunks(1, window=2, sink=1))
        past = network.remember(x0, jnp.zeros_like(t), condition)
        rolled, _, rest = roll_out(network, x, condition, jax.random.key(0), one_step)
        found = network(x, t, condition), network.recall(x, t, condition, past), rolled
        return sum((jnp.cos(jnp.arange(v.size)).reshape(v.shape) * v).sum() for v in found), (found, past, rest)

    if gradients:
        (_, found), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(weights)
        return *found, gradient
    return jax.jit(total)(weights)[1]


@pytest.mark.parametrize(
    ("mesh", "gradients"),
    [
        ("fsdp 2 x context 2 x tensor 2", False),
        *(pytest.param(mesh, True, marks=pytest.mark.long) for mesh in MESHES),
    ],
)
def test_numbers_are_the_same_on_every_mesh(mesh, gradients):
    config = MESHES[mesh]
    velocities, *memories = found = on_mesh(config, gradients)
    expected = on_mesh(None, gradients)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert error(a, b) < 1e-5, path
    assert len(velocities) == 3
    for memory in memories[:2]:
        layers, clips, tokens, heads, channels = memory.keys.shape
        share = clips // (config.data * config.fsdp), tokens, heads // (config.context * config.tensor), channels
        assert memory.keys.sharding.shard_shape(memory.keys.shape) == (layers, *share)


def test_errors_name_culprit_and_remedy():
    deep = random_model(replace(T2V, patch_size=(2, 2, 2)))
    with pytest.raises(UserError, match=r"^the transformer's patches are 2 latent frames deep; .* needs patches of 1$"):
        CausalWan(deep, Chunks())
    run = programs("threes")
    _, x, t, condition = inputs(T2V, 7)
    for evaluate in (run.call, run.remember, lambda *given: run.recall(*given, run.past())):
        with pytest.raises(UserError, match=r"^a clip of 7 latent frames .*; make it 6, or set chunks.size"):
            evaluate(run.weights, x, t, condition)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(fsdp=1, context=8), r"is 8, which does not divide the 4 heads of a device: .* divisor of both"),
        (MeshConfig(fsdp=1, context=4, tensor=2), r"is 4, which does not divide the 2 heads of a device: "),
        (MeshConfig(fsdp=2, context=4), r"is 4, which does not divide the 6 tokens of these latents: "),
    ],
)
def test_meshes_that_do_not_divide_are_named(mesh, message):
    config = replace(T2V, num_attention_heads=4)
    model = random_model(config, mesh=make_mesh(mesh))
    network = CausalWan(model, Chunks(1))
    _, x, t, condition = inputs(config, 1)
    for evaluate in (network, network.remember):
        with pytest.raises(UserError, match=f"^config.mesh.context {message}"):
            jax.eval_shape(evaluate, x, t, condition)
    with pytest.raises(UserError, match=f"^config.mesh.context {message}"):
        jax.eval_shape(network.step, x, t[:, 0], condition, jax.eval_shape(network.empty, x))


@pytest.mark.parametrize(
    "chunks, with_past, kernels",
    [(Chunks(1), True, 1), (Chunks(1), False, 1), (Chunks(1, window=2), True, 3)],
    ids=("past", "no past", "window"),
)
def test_all_chunks_are_one_kernel_on_a_tpu(chunks, with_past, kernels):
    """In the program that a TPU would get; with a window there is a kernel for each number of frames that are seen."""
    frame, frames = 1200, 4
    attend = _Whole(chunks.spans(frames), chunks, frame)
    x = jax.ShapeDtypeStruct((1, frame * frames, 1, 128), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((frame * frames, 64), jnp.float32)
    run = lambda q, k, v, past, tables: attend(q, k, v, past, tables, "tpu")  # noqa: E731
    traced = jax.jit(run).trace(x, x, x, (x, x) if with_past else None, (table, table))
    program = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert program.count('kernel_name = "splash_mha_fwd') == kernels
