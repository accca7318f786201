"""Clips of causal models: chunk by chunk, of any number of chunks, the first one in more steps if asked to."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import random_model

from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.sampler import Sampler
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.inference.pictures import first_frames
from vpae_jax.types import UserError
from vpae_jax.weights.find import find_model
from vpae_jax.weights.layout import Contents, write_model
from vpae_jax.weights.settings import Defaults, Scheduler

PROMPT = "a three moves up"
STUDENT = dataclasses.replace(Sampler.even(4, 3.0, 1.0, "consistency"), chunks=Chunks(1))


def written(folder, base, sampler):
    clip = Defaults(9, 16, 32, 8.0)
    write_model(folder, Contents(find_model(base), scheduler=Scheduler.of(sampler, 3.0), defaults=clip))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    random_model.pipeline(folder, image=True)
    return folder


@pytest.fixture(scope="module")
def ours(base, tmp_path_factory):
    return load_pipeline(written(tmp_path_factory.mktemp("causal") / "model", base, STUDENT))


def clip(pipeline, **given):
    return pipeline(PROMPT, seed=3, **given).astype(int)


def test_it_is_sampled_as_its_folder_says(ours, base):
    """As the sampler that it was written of samples the same weights."""
    assert ours.sampler() == STUDENT
    plain = load_pipeline(base)
    key = jax.random.key(0)[None]
    noise = jax.random.normal(jax.random.key(1), ours.latent_shape(1))
    condition = ours.condition([PROMPT])
    found = ours.sample(noise, condition, key=key)
    np.testing.assert_array_equal(found, plain.sample(noise, condition, sampler=STUDENT, key=key))
    whole = plain.sample(noise, condition, sampler=dataclasses.replace(STUDENT, chunks=None), key=key)
    assert np.abs(found - whole).max() > 0.01


def test_earlier_chunks_know_nothing_of_later_ones(ours):
    """So a clip is the beginning of a longer one, which Euler's steps show: they draw no noise of their own."""
    noise = jax.random.normal(jax.random.key(1), ours.latent_shape(1, 21))
    long = clip(ours, solver="euler", steps=2, noise=noise, num_frames=21)
    short = clip(ours, solver="euler", steps=2, noise=noise[:, :3])
    assert long.shape == (21, 16, 32, 3) and np.abs(long[:9] - short).max() <= 1


def test_the_first_chunk_in_more_steps(ours):
    """It is that of as many steps; the others are of fewer, and after another first one."""
    four, one, mixed = clip(ours, steps=4), clip(ours, steps=1), clip(ours, steps=(4, 1))
    assert np.abs(mixed[0] - four[0]).max() <= 1 and np.abs(mixed[0] - one[0]).max() > 1
    assert np.abs(mixed[1:] - four[1:]).max() > 1 and np.abs(mixed[1:] - one[1:]).max() > 1


def test_a_window_that_moves_changes_what_is_seen_and_a_sink_keeps_the_start(ours):
    size = {"steps": 1, "num_frames": 21}
    all_frames, two, kept = (clip(ours, **size, **given) for given in ({}, {"window": 2}, {"window": 2, "sink": 1}))
    assert clip(ours, **size, window=5).tolist() == all_frames.tolist()  # the last of six sees five
    for frames in (two, kept):  # the first three see all
        assert np.abs(frames[:9] - all_frames[:9]).max() <= 1 and np.abs(frames[13:] - all_frames[13:]).max() > 1
    assert np.abs(two[13:] - kept[13:]).max() > 1


def test_a_picture_and_guidance(ours):
    picture = np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)
    alone, guided = (clip(ours, image=picture, steps=1, guidance=guidance) for guidance in (1.0, 3.0))
    assert alone.shape == (9, 16, 32, 3) and np.abs(alone - guided).max() > 1


def test_a_text_to_video_model_continues_a_picture(tmp_path):
    """Which is its first chunk; the clip's own length is the next one that has whole chunks after it."""
    random_model.pipeline(tmp_path / "base", image=False)
    student = dataclasses.replace(STUDENT, chunks=Chunks(3))
    pipe = load_pipeline(written(tmp_path / "model", tmp_path / "base", student))
    picture = np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)
    frames = clip(pipe, image=picture)
    assert len(clip(pipe)) == 9 and len(frames) == 13  # three latent frames; one and three
    shown = pipe.decode(pipe.vae.encode(first_frames(picture[None], 16, 32)))[0, 0]
    assert np.abs(frames[0] - np.asarray(shown, int)).max() <= 1
    longer, of_another = clip(pipe, image=picture, num_frames=25), clip(pipe, image=255 - picture)
    assert np.abs(longer[:13] - frames).max() <= 1 and np.abs(of_another - frames)[1:].max() > 1
    with pytest.raises(UserError, match=r"num_frames is 9, or 3 latent frames, .* of 1 and then 3; .* such as 13"):
        pipe(PROMPT, image=picture, num_frames=9)


def test_a_first_chunk_is_given_to_no_other_model(base):
    pipe = load_pipeline(base)
    noise = jax.random.normal(jax.random.key(1), pipe.latent_shape(1))
    with pytest.raises(UserError, match="latents of a first chunk were given, but the sampler makes whole clips"):
        pipe.sample(noise, pipe.condition([PROMPT]), sampler=Sampler(), given=noise[:, :1])


@pytest.mark.parametrize(
    ("chunks", "num_frames", "message"),
    [
        (
            Chunks(3),
            17,
            "num_frames is 17, or 5 latent frames, but this causal model generates chunks of 3; .* such as 21",
        ),
        (Chunks(3), 5, "such as 9"),
        (
            Chunks(4, first=1),
            41,
            "11 latent frames, .* chunks of 1 and then 4; give a whole number of chunks, such as 33",
        ),
        (Chunks(1), 8, r"num_frames is 8, expected 1 \+ a multiple of 4"),
    ],
)
def test_a_clip_of_no_whole_number_of_chunks(ours, chunks, num_frames, message):
    scheduler = Scheduler.of(dataclasses.replace(STUDENT, chunks=chunks))
    with pytest.raises(UserError, match=message):
        dataclasses.replace(ours, scheduler=scheduler)(PROMPT, num_frames=num_frames)


def test_what_only_a_causal_model_takes(base):
    with pytest.raises(UserError, match="steps is 4,1, but this model is not causal"):
        load_pipeline(base)(PROMPT, steps=(4, 1))


def test_two_experts_are_not_causal(base, tmp_path):
    folder = written(tmp_path / "model", base, STUDENT)
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"transformer_2": index["transformer"], "boundary_ratio": 0.5}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is causal and has two experts"):
        load_pipeline(folder)
