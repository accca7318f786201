"""What a page may ask for, on the embedded model: good requests, and one line for every bad one."""

import json
from functools import partial

import numpy as np
import pytest
from PIL import Image

from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.sampler import Sampler
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.serving import limits
from vpae_jax.serving.limits import Asked, TooLarge, parse_request, read_upload
from vpae_jax.serving.models import Model
from vpae_jax.types import UserError

GOOD = {"page": "a-1", "prompt": "a three moves up", "seed": 7}


@pytest.fixture(scope="module")
def models():
    """The embedded model as the teacher, and as a student of one step."""
    pipeline = load_pipeline("tiny", with_transformer=False, with_encoders=False)
    return [Model("teacher", pipeline, pipeline.sampler()), Model("student", pipeline, pipeline.sampler(1, 1.0))]


def parse(models, /, **changes):
    return parse_request(json.dumps({**GOOD, **changes}).encode(), models)


def test_what_is_left_out_is_the_model_s_own(models):
    own = {"teacher": models[0].pipeline.sampler(), "student": Sampler()}
    assert parse(models) == Asked("a-1", "a three moves up", 7, None, own)
    assert own["teacher"].evaluations == 100


def test_steps_and_guidance_are_each_model_s(models):
    given = {"teacher": {"steps": 4, "guidance": 2}, "student": {"steps": "2"}}
    found = parse(models, models=given, image="name", seed=2**32 - 1)
    assert [found.samplers[name].steps for name in ("teacher", "student")] == [4, 2]
    assert [found.samplers[name].guidance for name in ("teacher", "student")] == [2.0, 1.0]
    assert (found.image, found.seed) == ("name", 2**32 - 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "prompt is empty; describe"),
        ({"prompt": " \n "}, "prompt is empty"),
        ({"prompt": None}, "prompt is null; expected text"),
        ({"prompt": "a" * 2001}, "prompt has 2001 characters, expected at most 2000; shorten it"),
        ({"prompt": "a three " * 20}, r"prompt \(teacher\): .*tokens"),
        ({"prompt": "a \ud800"}, "surrogate"),
        ({"page": ""}, "page is ''; expected"),
        ({"page": "a/b"}, "page is 'a/b'; expected"),
        ({"page": 3}, "page is 3; expected text"),
        ({"seed": -1}, "seed is -1, expected a number from 0 to 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296, expected"),
        ({"seed": 1.5}, "seed is 1.5; expected a whole number"),
        ({"seed": "x" * 99}, r"seed is \"x{39}\.\.\.; expected"),
        ({"seed": True}, "seed is true; expected"),
        ({"image": 3}, "image is 3; expected text"),
        ({"more": 1}, 'the request has an unknown field "more"; expected page, prompt'),
        ({"models": []}, r"models is \[\]; expected an object"),
        ({"models": {"other": {}}}, 'models has an unknown field "other"; expected teacher, student'),
        ({"models": {"student": {"step": 1}}}, 'models.student has an unknown field "step"'),
        ({"models": {"student": {"steps": 0}}}, "student: steps is 0; expected a whole number from 1 to 100"),
        ({"models": {"student": {"steps": 101}}}, "student: steps is 101; expected"),
        ({"models": {"student": {"steps": True}}}, "student: steps is true; expected"),
        ({"models": {"student": {"steps": 1.5}}}, "student: steps is 1.5; expected"),
        ({"models": {"student": {"steps": "many"}}}, "student: steps=many: expected a number of steps"),
        ({"models": {"student": {"steps": "4,1"}}}, "student: steps is 4,1, but this model is not causal"),
        ({"models": {"student": {"steps": "4,1000"}}}, 'student: steps is "4,1000"; expected'),
        ({"models": {"student": {"guidance": 0.5}}}, "student: guidance is 0.5; expected a number from 1"),
        ({"models": {"student": {"guidance": 10**400}}}, r"student: guidance is 10{39}\.\.\.; expected"),
        ({"models": {"student": {"guidance": float("nan")}}}, "student: guidance is NaN; expected"),
        ({"models": {"student": {"guidance": "x"}}}, 'student: guidance is "x"; expected'),
    ],
)
def test_bad_requests_are_one_line(models, changes, message):
    with pytest.raises(UserError, match=message) as found:
        parse(models, **changes)
    assert "\n" not in str(found.value) and len(str(found.value)) < 300


@pytest.mark.parametrize("body", [b"", b"\xff", b"{", b"[" * 60_000, b"9" * 5000])
def test_what_is_no_json_is_one_line(models, body):
    with pytest.raises(UserError, match="the request is not JSON"):
        parse_request(body, models)


@pytest.mark.parametrize("body", [b"[]", b"3", b"null"])
def test_what_is_no_object_is_one_line(models, body):
    with pytest.raises(UserError, match=r"the request is .*; expected an object"):
        parse_request(body, models)


def test_an_image_is_for_a_model_that_takes_one(models, monkeypatch):
    text_only = Model("model", models[0].pipeline, models[0].sampler)
    monkeypatch.setattr(Model, "takes_image", property(lambda self: False))
    with pytest.raises(UserError, match="image: no model here takes a first frame"):
        parse([text_only], image="name")


def test_causal_models_take_images_and_two_numbers_of_steps(models):
    sampler = Sampler(chunks=Chunks(1), times=(1.0, 0.5, 0.0), first=(1.0, 0.75, 0.5, 0.25, 0.0))
    causal = Model("causal", models[0].pipeline, sampler)
    assert causal.takes_image and causal.own_steps == (4, 2)


def test_uploads_are_read_as_sample_reads_them(models, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "upload", format="png")
    np.testing.assert_array_equal(read_upload(tmp_path / "upload", models), pixels)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "image: .*not an image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "image: .*not an image"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "image: "),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image: .*not an image"),
    ],
)
def test_what_is_no_image_is_one_line(models, tmp_path, content, message):
    (tmp_path / "upload").write_bytes(content)
    with pytest.raises(UserError, match=message) as found:
        read_upload(tmp_path / "upload", models)
    assert str(tmp_path) not in str(found.value) and "\n" not in str(found.value)


def test_images_have_bounds(models, tmp_path, monkeypatch):
    save = partial(Image.Image.save, fp=tmp_path / "upload", format="png")
    save(Image.new("RGB", (4000, 8)))
    with pytest.raises(UserError, match="too elongated"):
        read_upload(tmp_path / "upload", models)
    monkeypatch.setattr(limits, "MAX_IMAGE_PIXELS", 99)
    save(Image.new("RGB", (10, 10)))
    with pytest.raises(TooLarge, match="image has 100 pixels, expected at most 99; make it smaller"):
        read_upload(tmp_path / "upload", models)
