"""From prompt and picture to frames: equal to Diffusers' Wan pipelines on the same weights and the same noise.

The weights are random, so nobody can see in the frames whether they are right. They are therefore chosen so that
prompt, negative prompt, picture and guidance each move the frames by many levels, and little is black or white.
"""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import random_model
import torch
from PIL import Image

from vpae_jax.inference.loading import load_pipeline
from vpae_jax.weights.settings import Defaults, Scheduler

PROMPT, NEGATIVE = "a three moves up", "the digit seven"
SIZE = {"num_frames": 5, "height": 32, "width": 48}
# Ours are rounded to whole levels, which is half a level; the networks are allowed a tenth more.
LIMIT = 0.6 / 255


def load(folder, image):
    theirs = random_model.pipeline(folder, image)
    generator = torch.Generator().manual_seed(7)
    for weight in theirs.transformer.parameters():  # strong enough for every condition to be seen in the frames
        weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    theirs.transformer.save_pretrained(folder / "transformer")
    theirs.set_progress_bar_config(disable=True)
    ours = load_pipeline(folder)
    return theirs, dataclasses.replace(ours, defaults=Defaults(**SIZE))


@pytest.fixture(scope="module")
def t2v(tmp_path_factory):
    return load(tmp_path_factory.mktemp("model"), image=False)


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    return load(tmp_path_factory.mktemp("model"), image=True)


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)


def as_euler(theirs, ours, steps):
    """The same weights as a student that is sampled with Euler's method."""
    scheduler = Scheduler("euler", 3.0, steps, 1.0)
    made = diffusers.FlowMatchEulerDiscreteScheduler.from_config(scheduler.to_json())
    student = type(theirs)(**{**theirs.components, "scheduler": made})
    student.set_progress_bar_config(disable=True)
    return student, dataclasses.replace(ours, scheduler=scheduler)


def compare(theirs, ours, steps, guidance, picture=None):
    """Makes a video with both, at the size that ours chooses; returns ours."""
    height, width = SIZE["height"], SIZE["width"]
    if picture is not None:
        height, width = ours.fit(*picture.shape[:2])
    noise = jax.random.normal(jax.random.key(1), ours.latent_shape(1, height=height, width=width))
    expected = theirs(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        num_frames=SIZE["num_frames"],
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=torch.tensor(np.asarray(noise)).permute(0, 4, 1, 2, 3),
        output_type="np",
        **({} if picture is None else {"image": Image.fromarray(picture)}),
    ).frames[0]
    found = ours(PROMPT, image=picture, steps=steps, guidance=guidance, negative_prompt=NEGATIVE, noise=noise)
    assert found.dtype == np.uint8 and found.shape == expected.shape == (SIZE["num_frames"], height, width, 3)
    assert found.std() > 20 and np.isin(found, (0, 255)).mean() < 0.2
    difference = np.abs(found / 255 - expected).max()
    assert difference <= LIMIT, f"{255 * difference:.4f} levels of 255"
    return found


UNIPC = [(4, 1.0), (4, 5.0), *(pytest.param(steps, 5.0, marks=pytest.mark.long) for steps in (1, 50))]
EULER = [(1, 1.0), (4, 1.0), (4, 3.0)]


@pytest.mark.parametrize("steps, guidance", UNIPC)
def test_text_to_video_frames_equal_diffusers(t2v, steps, guidance):
    compare(*t2v, steps, guidance)


@pytest.mark.parametrize("steps, guidance", UNIPC)
def test_image_to_video_frames_equal_diffusers(i2v, picture, steps, guidance):
    compare(*i2v, steps, guidance, picture)


@pytest.mark.parametrize("steps, guidance", EULER)
def test_text_to_video_students_frames_equal_diffusers(t2v, steps, guidance):
    compare(*as_euler(*t2v, steps), steps, guidance)


@pytest.mark.parametrize("steps, guidance", EULER)
def test_image_to_video_students_frames_equal_diffusers(i2v, picture, steps, guidance):
    compare(*as_euler(*i2v, steps), steps, guidance, picture)


def test_a_picture_of_another_shape_equals_diffusers(i2v):
    """It decides the video's size."""
    picture = np.random.default_rng(1).integers(0, 256, (30, 70, 3), np.uint8)
    assert compare(*i2v, 1, 1.0, picture).shape[1:3] == (16, 48)


def test_frames_depend_on_every_condition(t2v, i2v, picture):
    """Else their equality above would say little."""
    for (_, ours), image in ((t2v, None), (i2v, picture)):
        given = dict(prompt=PROMPT, image=image, steps=4, guidance=5.0, negative_prompt=NEGATIVE)
        changes = [dict(prompt="a seven"), dict(negative_prompt=""), dict(guidance=1.0), dict(seed=1)]
        if image is not None:
            changes.append(dict(image=255 - image))
        frames = ours(**given).astype(int)
        for change in changes:
            moved = np.abs(ours(**{**given, **change}).astype(int) - frames).max()
            assert moved > 8, (change.keys(), moved)
