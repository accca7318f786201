"""A causal model's frames come chunk by chunk, and are those of the whole clip."""

import dataclasses
import json
import math
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_model
from flax import nnx

from vpae_jax.config import MeshConfig
from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.draws import noise_of_seed
from vpae_jax.flow.sampler import Sampler
from vpae_jax.inference import samplers, streaming
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.inference.pictures import first_frames
from vpae_jax.sharding import make_mesh
from vpae_jax.types import UserError
from vpae_jax.weights.settings import Defaults

PROMPT, NEGATIVE = "a three moves up", "the digit seven"
HEIGHT, WIDTH = 16, 32
ONE = Sampler(chunks=Chunks(1))
WINDOW = Sampler(chunks=Chunks(1, window=2, sink=1))


def write(tmp_path_factory, image):
    folder = tmp_path_factory.mktemp("model")
    random_model.pipeline(folder, image)
    (folder / "vpae_jax.json").write_text(json.dumps(dataclasses.asdict(Defaults(9, HEIGHT, WIDTH, 8.0))))
    return folder


@pytest.fixture(scope="module")
def t2v(tmp_path_factory):
    return load_pipeline(write(tmp_path_factory, image=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory, image=True)


@pytest.fixture(scope="module")
def i2v(folder):
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def whole(pipe, sampler, num_frames, picture=None, seed=3):
    """The clip that a call makes, if the model's own sampler is this one."""
    noise, key = noise_of_seed(seed, pipe.latent_shape(1, num_frames))
    pictures = None if picture is None else picture[None]
    condition, other = (pipe.condition([text], pictures, num_frames) for text in (PROMPT, NEGATIVE))
    return np.asarray(pipe.decode(pipe.sample(noise, condition, other, sampler, key[None])))[0]


SAMPLERS = {
    "frame by frame": (ONE, 13),
    "a window and a sink": (WINDOW, 29),
    "fresh noise, another first chunk": (
        Sampler("consistency", (1.0, 0.5, 0.0), chunks=Chunks(1, window=2), first=(1.0, 0.75, 0.5, 0.25, 0.0)),
        17,
    ),
    "three frames a chunk": (Sampler("consistency", (1.0, 0.5, 0.0), chunks=Chunks(3)), 33),
    "guided, a first chunk of one frame": (Sampler("euler", (1.0, 0.5, 0.0), 3.0, Chunks(2, first=1, window=3)), 17),
}


CASES = {
    "t2v": ("frame by frame", "guided, a first chunk of one frame"),
    "i2v": ("a window and a sink", "fresh noise, another first chunk", "three frames a chunk"),
    "i2v without a picture": ("frame by frame",),
}


def continued(pipe, sampler, num_frames, picture, seed=3):
    """The clip that a call makes of a text-to-video model and a picture, if the model's own sampler is this one."""
    noise, key = noise_of_seed(seed, pipe.latent_shape(1, num_frames))
    given = pipe.vae.encode(first_frames(picture[None], HEIGHT, WIDTH))
    conditions = (pipe.condition([text], None, num_frames) for text in (PROMPT, NEGATIVE))
    return np.asarray(pipe.decode(pipe.sample(noise, *conditions, sampler, key[None], given=given)))[0]


@pytest.mark.parametrize("model, name", [(model, name) for model, names in CASES.items() for name in names])
def test_frames_are_those_of_the_whole_clip(t2v, i2v, picture, model, name):
    sampler, num_frames = SAMPLERS[name]
    pipe, given = (t2v if model == "t2v" else i2v), (picture if model == "i2v" else None)
    chunks = list(pipe.stream(PROMPT, given, sampler, 3, NEGATIVE, num_frames))
    expected = whole(pipe, sampler, num_frames, given)
    sizes = [4 * (stop - start) for start, stop in sampler.chunks.walk(1 + num_frames // 4)]
    assert [len(chunk) for chunk in chunks] == [sizes[0] - 3, *sizes[1:]]
    assert {chunk.dtype for chunk in chunks} == {np.dtype(np.uint8)} and expected.std() > 5
    # The same numbers, of which another program may round one in another way.
    assert np.abs(np.concatenate(chunks).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("guidance", (1.0, 3.0))
def test_a_text_to_video_model_continues_a_picture(t2v, picture, guidance):
    """The picture is the first chunk, made by nobody, whatever chunks the model makes; the others remember it."""
    asked = Sampler("consistency", (1.0, 0.5, 0.0), guidance, Chunks(2), first=(1.0, 0.0))
    chunks = list(t2v.stream(PROMPT, picture, asked, 3, NEGATIVE, 17))
    assert [len(chunk) for chunk in chunks] == [1, 8, 8]
    expected = continued(t2v, dataclasses.replace(asked, chunks=Chunks(2, first=1), first=()), 17, picture)
    assert np.abs(np.concatenate(chunks).astype(int) - expected).max() <= 1
    other = np.concatenate(list(t2v.stream(PROMPT, 255 - picture, asked, 3, NEGATIVE, 17))).astype(int)
    assert np.abs(other - expected)[1:].max() > 1


def test_a_whole_clip_is_decoded_piece_by_piece(t2v):
    """Its frames are those of decoding all at once; no more than those of two latent frames are on the device."""
    latents = jax.random.normal(jax.random.key(0), t2v.latent_shape(1, 17))
    expected, pieces = np.asarray(t2v.decode(latents))[0].astype(int), []

    def on_device():
        return sum(x.dtype == jnp.uint8 and x.shape == (1, 4, HEIGHT, WIDTH, 3) for x in jax.live_arrays())

    before = on_device()
    for piece in streaming.decoded(t2v.vae, latents):
        pieces.append(piece.copy())  # which on a processor is the device's own memory
        del piece
        assert on_device() <= before + 2
    assert [len(piece) for piece in pieces] == [1, 4, 4, 4, 4] and expected.std() > 5
    assert np.abs(np.concatenate(pieces) - expected).max() <= 1
    broken = latents.at[0, 2, 0, 0, 0].set(jnp.nan)
    with pytest.raises(UserError, match="the video is not finite"):
        list(streaming.decoded(t2v.vae, broken))


def test_a_seed_decides(t2v):
    def made(seed):
        return np.concatenate(list(t2v.stream(PROMPT, sampler=ONE, seed=seed)))

    np.testing.assert_array_equal(made(1), made(1))
    assert (made(1) != made(2)).mean() > 0.1


def test_a_video_without_end(i2v, picture):
    endless = i2v.stream(PROMPT, picture, WINDOW, num_frames=math.inf)
    begun = np.concatenate(list(islice(endless, 12)))
    np.testing.assert_array_equal(begun, np.concatenate(list(i2v.stream(PROMPT, picture, WINDOW, num_frames=45))))


def test_a_mesh_makes_the_same_frames(folder, i2v, picture):
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, context=2, tensor=1), jax.devices()[:2])
    sharded = load_pipeline(folder, mesh=mesh)
    found, expected = (
        np.concatenate(list(pipe.stream(PROMPT, picture, WINDOW, num_frames=17))) for pipe in (sharded, i2v)
    )
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_the_next_chunk_is_on_its_way_when_one_is_given(t2v):
    """Its frames are on the device, or will be, and none of another chunk."""

    def on_device():
        frames = [x for x in jax.live_arrays() if x.dtype == jnp.uint8 and x.shape[-3:] == (HEIGHT, WIDTH, 3)]
        return {np.asarray(x).tobytes() for x in frames}

    given, found = [], []
    for frames in t2v.stream(PROMPT, sampler=WINDOW, num_frames=17):
        given.append(frames.tobytes())
        del frames
        found.append(on_device())
    assert len(set(given)) == 5 and found[:-1] == [{frames} for frames in given[1:]]


def test_memory_does_not_grow_with_frames(i2v, picture):
    def held(num_frames, sampler=WINDOW):
        return [
            sum(x.nbytes for x in jax.live_arrays())
            for _ in i2v.stream(PROMPT, picture, sampler, num_frames=num_frames)
        ]

    held(17)  # constants of programs
    short, long = held(17), held(161)
    assert len(long) == 41 and set(long[3:-1]) == set(short[3:-1]) and len(set(long[3:-1])) == 1
    assert max(held(161, ONE)) > max(long)  # that all earlier frames are kept would be seen


def test_all_chunks_but_the_first_are_one_program(i2v, picture):
    sampler = Sampler(chunks=Chunks(1, window=3))
    programs = (streaming._make, streaming._remember, streaming._decode, streaming._encode_grey)
    before = [program._cache_size() for program in programs]
    list(i2v.stream(PROMPT, picture, sampler, num_frames=17))
    made = [program._cache_size() for program in programs]
    # One of each, and two of decoding; none where other tests have compiled it.
    new = [now - then for now, then in zip(made, before, strict=True)]
    assert new[0] == 1 and all(0 <= count <= most for count, most in zip(new, (1, 1, 2, 1), strict=True))
    list(i2v.stream(PROMPT, picture, sampler, num_frames=41))
    assert [program._cache_size() for program in programs] == made


def test_grey_frames_come_piece_by_piece(i2v, picture):
    first = jnp.asarray(picture, jnp.float32)[None, None] / 127.5 - 1
    grey = jnp.zeros((1, 4 * 39, HEIGHT, WIDTH, 3))
    graph, weights = nnx.split(i2v.vae)
    encode = jax.jit(lambda weights, video: nnx.merge(graph, weights).encode(video))
    expected = encode(weights, jnp.concatenate([first, grey], axis=1))
    begun, past = samplers.encode_first_frame(i2v.vae, first, 2)
    pieces = [begun]
    for _ in range(19):
        piece, past = streaming._encode_grey(graph, weights, past, 2, begun.shape[2])
        pieces.append(piece)
    frames = jnp.concatenate(pieces, axis=1)
    assert all(level.settled for level in past)
    np.testing.assert_array_equal(frames[..., :4], np.eye(40)[None, 0, :, None, None, None] * np.ones((1, 1, 2, 4, 4)))
    assert np.abs(frames[..., 4:] - expected).max() <= 1e-6
    np.testing.assert_array_equal(frames, i2v.condition_frames(first, 157))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sampler": None}, "this model generates all frames of a video at once, and cannot stream; load a causal"),
        ({"sampler": ONE, "num_frames": math.inf}, "this model sees all earlier frames, which needs unlimited memory"),
        ({"num_frames": 11}, "num_frames is 11, expected 1 \\+ a multiple of 4, such as 9"),
        (
            {"sampler": Sampler(chunks=Chunks(2)), "num_frames": 9},
            "num_frames is 9, or 3 latent frames, but this",
        ),
        ({"height": 20}, "height is 20, expected a multiple of 16, such as 16"),
        ({"seed": -1}, "seed is -1, expected a number from 0 to 4294967295"),
        (
            {"image": np.zeros((16, 32, 3), np.uint8), "sampler": Sampler(chunks=Chunks(3)), "num_frames": 9},
            "such as 13",
        ),
        ({"prompt": "a three " * 17}, "tokens, at most 16"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_streamed_is_said_at_once(t2v, changes, message):
    with pytest.raises(UserError, match=message) as error:
        t2v.stream(**{"prompt": PROMPT, "sampler": WINDOW, **changes})  # no frame is asked for
    assert "\n" not in str(error.value)


def test_a_video_that_is_not_finite_is_refused(t2v):
    graph, weights = nnx.split(t2v.vae)
    broken = dataclasses.replace(t2v, vae=nnx.merge(graph, jax.tree.map(lambda x: x * jnp.nan, weights)))
    with pytest.raises(UserError, match="the video is not finite"):
        next(broken.stream(PROMPT, sampler=WINDOW))
