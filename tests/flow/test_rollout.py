"""Clips made chunk by chunk, against loops written out, by a causal network in closed form."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpae_jax.flow import draws
from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.rollout import Guided, Recurrent, cut, next_chunk, roll_out
from vpae_jax.types import Condition, Memory, UserError

B, C = 2, 3


@dataclass(frozen=True)
class Recalling:
    """Its velocity depends on time and condition, and on what it remembers: a vector of each frame, which depends on
    the frame, its time, its prompt and the memory before it."""

    chunks: Chunks

    def empty(self, x):
        zeros = jnp.zeros((1, len(x), x.shape[1], 1, x.shape[-1]))
        return Memory(zeros, zeros, jnp.int32(0))

    def step(self, x, t, condition, past):
        before = past.keys.sum((0, 2, 3)) / jnp.maximum(past.frames, 1)
        v = jnp.tanh(x + before[:, None, None, None] + condition.text.mean((1, 2)).reshape(-1, 1, 1, 1, 1))
        v = v * (1 + t.reshape(-1, 1, 1, 1, 1))
        if condition.frames is not None:
            v = v + condition.frames
        kept = v.mean((2, 3))[None, :, :, None]
        return v, (kept, 2 * kept)

    def memorize(self, past, pair, frames):
        at = (0, 0, past.frames, 0, 0)
        keys, values = (jax.lax.dynamic_update_slice(*both, at) for both in zip(past_pair(past), pair, strict=True))
        return Memory(keys, values, past.frames + frames)


def past_pair(past):
    return past.keys, past.values


def inputs(frames, images=True):
    draw = np.random.default_rng(0).standard_normal
    normal = lambda *shape: jnp.asarray(draw(shape), jnp.float32)  # noqa: E731
    size = (B, frames, 2, 2, C)
    condition = Condition(normal(B, 4, 5), jnp.ones((B, 4), bool), frames=normal(*size) if images else None)
    return normal(*size), condition


def solve(velocity, noise, key):
    """Two evaluations, with fresh noise between them; also what the second one reads."""
    x0 = noise - velocity(noise, jnp.ones(len(noise)))
    z = 0.5 * x0 + 0.5 * draws.normal(key, noise.shape)
    return z - 0.5 * velocity(z, jnp.full(len(z), 0.5)), z


def one_step(velocity, noise, key):
    return noise - velocity(noise, jnp.ones(len(noise))), 0 * noise


def by_hand(network, noise, condition, key, solvers):
    """Chunk by chunk, each by a solver of its own; the memory as a list of what has been kept of chunks."""
    spans, clips, more, kept = network.chunks.spans(noise.shape[1]), [], [], []
    keys = [jax.random.split(own, len(spans)) for own in draws.clip_keys(key, B)]
    for number, (start, stop) in enumerate(spans):
        frames = condition.frames
        own = condition if frames is None else replace(condition, frames=frames[:, start:stop])
        past = network.empty(noise[:, :start])
        if kept:
            joined = [jnp.concatenate(parts, 2) for parts in zip(*kept, strict=True)]
            past = Memory(*joined, jnp.int32(start))
        key = jnp.stack([of_clip[number] for of_clip in keys])
        x0, other = solvers[number](lambda x, t: network.step(x, t, own, past)[0], noise[:, start:stop], key)  # noqa: B023
        kept.append(network.step(x0, jnp.zeros(B), own, past)[1])
        clips.append(x0)
        more.append(other)
    return (
        jnp.concatenate(clips, 1),
        jnp.concatenate(more, 1),
        [jnp.concatenate(parts, 2) for parts in zip(*kept, strict=True)],
    )


def assert_same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


CASES = [(Chunks(2), 6), (Chunks(2, first=1), 5), (Chunks(1, first=3), 5), (Chunks(), 3), (Chunks(3, first=3), 6)]


@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.split(jax.random.key(4), B)], ids=["one", "of clips"])
@pytest.mark.parametrize(("chunks", "frames"), CASES)
def test_a_roll_out_is_the_loop_over_its_chunks(chunks, frames, key):
    network, (noise, condition) = Recalling(chunks), inputs(frames)
    assert isinstance(network, Recurrent)
    x0, more, past = roll_out(network, noise, condition, key, solve)
    expected = by_hand(network, noise, condition, key, [solve] * frames)
    assert_same([x0, more, [past.keys, past.values]], list(expected))
    assert int(past.frames) == frames


def test_without_more_and_without_frames():
    network, (noise, condition) = Recalling(Chunks(2)), inputs(6, images=False)
    x0, more, _ = roll_out(network, noise, condition, jax.random.key(0), lambda *given: (solve(*given)[0], None))
    assert more is None
    assert_same(x0, by_hand(network, noise, condition, jax.random.key(0), [solve] * 3)[0])


@pytest.mark.parametrize(("chunks", "frames"), CASES)
def test_the_first_chunk_by_another_solver(chunks, frames):
    network, (noise, condition) = Recalling(chunks), inputs(frames)
    x0, more, past = roll_out(network, noise, condition, jax.random.key(0), solve, first=one_step)
    expected = by_hand(network, noise, condition, jax.random.key(0), [one_step] + [solve] * frames)
    assert_same([x0, more, [past.keys, past.values]], list(expected))


@pytest.mark.parametrize(("chunks", "frames"), CASES)
def test_a_given_first_chunk_is_remembered(chunks, frames):
    network, (noise, condition) = Recalling(chunks), inputs(frames)
    size = chunks.spans(frames)[0][1]
    given = jnp.sin(7 * noise[:, :size])
    alone = lambda *given: (solve(*given)[0], None)  # noqa: E731
    x0, more, past = roll_out(network, noise, condition, jax.random.key(0), alone, given=given)
    assert more is None
    np.testing.assert_array_equal(x0[:, :size], given)
    expected = by_hand(network, noise, condition, jax.random.key(0), [lambda *_: (given, given)] + [solve] * frames)
    assert_same([x0, [past.keys, past.values]], [expected[0], expected[2]])


def test_given_frames_that_are_no_chunk_are_refused():
    noise, condition = inputs(6)
    with pytest.raises(UserError, match=r"^1 latent frames are given, but the first chunk has 3; set chunks.first=1$"):
        roll_out(Recalling(Chunks()), noise, condition, jax.random.key(0), solve, given=noise[:, :1])
    with pytest.raises(UserError, match=r"^a clip of 6 latent frames is not a whole number of chunks"):
        roll_out(Recalling(Chunks(4)), noise, condition, jax.random.key(0), solve)


def test_every_chunk_of_every_clip_draws_its_own():
    noise, condition = inputs(6)
    fresh = lambda velocity, noise, key: (0 * noise, draws.normal(key, noise.shape))  # noqa: E731
    for first in (None, fresh):
        _, drawn, _ = roll_out(Recalling(Chunks(2)), noise, condition, jax.random.key(0), fresh, first)
        numbers = np.asarray(drawn)
        assert len(np.unique(numbers)) == numbers.size
    _, other, _ = roll_out(Recalling(Chunks(2)), noise, condition, jax.random.key(1), fresh)
    assert not np.intersect1d(numbers, other).size


def test_a_clip_draws_the_same_in_any_batch():
    network, (noise, condition) = Recalling(Chunks(2)), inputs(6)
    keys = jax.random.split(jax.random.key(0), B)
    both, _, _ = roll_out(network, noise, condition, keys, solve)
    alone, _, _ = roll_out(network, *jax.tree.map(lambda x: x[1:], (noise, condition, keys)), solve)
    assert_same(both[1:], alone)


def test_a_roll_out_of_any_length_is_one_chunks_program():
    """A scan over chunks, and a chunk before it where the first one differs."""

    def equations(chunks, frames, **options):
        network, given = Recalling(chunks), inputs(frames)
        program = jax.make_jaxpr(lambda *given: roll_out(network, *given, jax.random.key(0), solve, **options))(*given)
        (scan,) = (one for one in program.eqns if one.primitive.name == "scan")
        return len(program.eqns), scan.params["length"]

    assert equations(Chunks(2), 6)[1] == 3
    assert equations(Chunks(2), 6)[0] == equations(Chunks(2), 20)[0]
    assert equations(Chunks(2, first=1), 7)[1] == equations(Chunks(2), 8, first=one_step)[1] == 3


def test_one_turn():
    network, (noise, condition) = Recalling(Chunks(2)), inputs(4)
    keys = jax.random.split(jax.random.key(0), (2, B))
    past = network.empty(noise)
    for start, stop, key in ((0, 2, keys[0]), (2, 4, keys[1])):
        own = cut(condition, start, stop)
        expected = solve(lambda x, t: network.step(x, t, own, past)[0], noise[:, start:stop], key)  # noqa: B023
        x0, more, after = next_chunk(network, noise[:, start:stop], own, key, past, solve)
        assert_same((x0, more), expected)
        pair = network.step(x0, jnp.zeros(B), own, past)[1]
        assert_same(after.keys[:, :, start:stop], pair[0])
        past = after
    assert int(past.frames) == 4


@pytest.mark.parametrize(("chunks", "frames"), [(Chunks(2), 6), (Chunks(1, first=3), 5)])
def test_guidance_is_two_networks_with_a_memory_each(chunks, frames):
    """Both remember the guided clip, each under its own prompt."""
    network, (noise, condition) = Recalling(chunks), inputs(frames)
    unconditional = Condition(-2 * condition.text, condition.text_mask, frames=7 * condition.frames)
    w, key = 3.0, jax.random.key(0)
    x0, more, past = roll_out(Guided(network, unconditional, w), noise, condition, key, solve)

    memories, clips, mores = [network.empty(noise)] * 2, [], []
    for (start, stop), keys in zip(
        chunks.spans(frames), draws.split(draws.clip_keys(key, B), len(chunks.spans(frames))), strict=True
    ):
        own = condition.frames[:, start:stop]
        prompts = replace(condition, frames=own), replace(unconditional, frames=own)

        def velocity(x, t, prompts=prompts, memories=memories):
            cond, uncond = (network.step(x, t, prompt, past)[0] for prompt, past in zip(prompts, memories, strict=True))
            return uncond + w * (cond - uncond)

        made, other = solve(velocity, noise[:, start:stop], keys)
        clips.append(made)
        mores.append(other)
        memories = [
            network.memorize(past, network.step(made, jnp.zeros(B), prompt, past)[1], stop - start)
            for prompt, past in zip(prompts, memories, strict=True)
        ]
    assert_same((x0, more), (jnp.concatenate(clips, 1), jnp.concatenate(mores, 1)))
    assert_same(past.keys, jnp.concatenate([memory.keys for memory in memories], 1))
    assert int(past.frames) == frames
    plain = roll_out(network, noise, condition, key, solve)[0]
    assert_same(roll_out(Guided(network, unconditional, 1.0), noise, condition, key, solve)[0], plain)
    assert float(jnp.abs(x0 - plain).max()) > 0.1
