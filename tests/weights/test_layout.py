"""Whole model directories: written from pieces, loaded by diffusers; schedulers, defaults and refusals."""

import hashlib
import json

import diffusers
import numpy as np
import pytest
import random_model
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vpae_jax.types import UserError
from vpae_jax.weights import layout
from vpae_jax.weights.find import find_model
from vpae_jax.weights.image_processor import ImageProcessor, read_image_processor
from vpae_jax.weights.loading import read_part
from vpae_jax.weights.settings import (
    IMAGE_NEGATIVE_PROMPT,
    NEGATIVE_PROMPT,
    Defaults,
    Scheduler,
    read_defaults,
    read_scheduler,
)
from vpae_jax.weights.writing import from_tree

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers", "ignore::DeprecationWarning:diffusers")
PARTS = ("transformer", "vae", "text_encoder", "image_encoder")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    random_model.pipeline(folder, image=True)
    return folder


def write_model(folder, source, parts, overwrite=False, **contents):
    """`layout.write_model` from folders and trees."""
    given = {name: from_tree(name, *part) for name, part in parts.items()}
    layout.write_model(folder, layout.Contents(find_model(source), given, **contents), overwrite=overwrite)


def test_written_from_pieces_it_loads_in_diffusers(source, tmp_path):
    pieces = tmp_path / "pieces"
    random_model.build_tokenizer(pieces / "tokenizer")
    parts = {name: read_part(source, name) for name in PARTS}
    clip = Defaults(num_frames=9, height=32, width=48, fps=8.0, negative_prompt="残缺的")
    write_model(tmp_path / "out", pieces, parts, scheduler=Scheduler("euler", 2.0, 1, 1.0), defaults=clip)
    assert read_defaults(tmp_path / "out") == clip
    assert read_scheduler(tmp_path / "out") == Scheduler("euler", 2.0, 1, 1.0)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, diffusers.WanImageToVideoPipeline)
    assert isinstance(loaded.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    assert loaded.scheduler.config.shift == 2.0
    assert loaded.tokenizer("a three moves up").input_ids[-1] == 1
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    pixels = loaded.image_processor(picture, return_tensors="np")["pixel_values"]
    processor = read_image_processor(tmp_path / "out" / "image_processor", 32)
    np.testing.assert_allclose(processor(picture[None])[0], pixels[0].transpose(1, 2, 0), atol=1e-6)


def test_a_text_to_video_model_has_no_image_parts(source, tmp_path):
    config, params = read_part(source, "text_encoder")
    random_model.pipeline(tmp_path / "t2v", image=False)
    write_model(tmp_path / "out", tmp_path / "t2v", {"text_encoder": (config, params)})
    assert isinstance(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out"), diffusers.WanPipeline)
    assert read_scheduler(tmp_path / "out") == Scheduler("unipc", 3.0)
    assert not (tmp_path / "out" / "image_encoder").exists()
    assert read_defaults(tmp_path / "out") == Defaults(81, 480, 832, 16.0, NEGATIVE_PROMPT)
    assert read_defaults(tmp_path / "t2v", image=True) == Defaults(81, 480, 832, 16.0, IMAGE_NEGATIVE_PROMPT)


def test_unchanged_parts_are_copied_and_changed_ones_replaced(source, tmp_path):
    config, params = read_part(source, "transformer")
    params["proj_out"]["bias"] = params["proj_out"]["bias"] + 1
    write_model(tmp_path / "out", source, {"transformer": (config, params)})
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / "vae" / name).read_bytes() == (source / "vae" / name).read_bytes()
    _, found = read_part(tmp_path / "out", "transformer")
    np.testing.assert_array_equal(found["proj_out"]["bias"], params["proj_out"]["bias"])


def test_refusals_leave_nothing_behind(source, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    for overwrite in (False, True):  # only a model directory is ever replaced
        with pytest.raises(UserError, match="already exists"):
            write_model(taken, source, {}, overwrite=overwrite)
    with pytest.raises(UserError, match=r"no transformer \(found: no part of a Wan model\)"):
        find_model(taken).require_whole()
    parts = {name: read_part(source, name) for name in PARTS}
    with pytest.raises(UserError, match=r"no tokenizer \(found: no part of a Wan model\)"):
        find_model(taken).require_whole(parts)
    parts["transformer"] = (parts["transformer"][0], {"blocks": {}, "unknown": np.zeros(3)})
    with pytest.raises(ValueError, match="unknown"):
        write_model(tmp_path / "out", source, parts)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_overwriting_a_model_directory(source, tmp_path):
    write_model(tmp_path / "out", source, {})
    write_model(tmp_path / "out", source, {}, scheduler=Scheduler("euler", 7.0), overwrite=True)
    assert read_scheduler(tmp_path / "out").shift == 7.0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_negative_prompts_are_wans():
    """By the checksum of sample_neg_prompt in Wan's wan/configs/shared_config.py."""
    digest = hashlib.sha256(NEGATIVE_PROMPT.encode()).hexdigest()
    assert digest == "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"
    assert IMAGE_NEGATIVE_PROMPT == "镜头晃动\uff0c" + NEGATIVE_PROMPT


def spoil(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "file, changes, read, message",
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, find_model, "_class_name is 'FluxPipeline'"),
        (
            "model_index.json",
            {"transformer_2": ["diffusers", "WanTransformer3DModel"]},
            find_model,
            "boundary_ratio is None, expected a number between 0 and 1",
        ),
        ("model_index.json", {"expand_timesteps": True}, find_model, "Wan 2.2"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, read_scheduler, "'DDIMScheduler'"),
        ("vpae_jax.json", {"frames": 9}, read_defaults, "vpae_jax.json.frames: unknown key"),
        ("vpae_jax.json", {"negative_prompt": None}, read_defaults, "negative_prompt: expected str, found None"),
    ],
)
def test_other_pipelines_are_refused_in_one_line(source, tmp_path, file, changes, read, message):
    write_model(tmp_path / "out", source, {}, defaults=Defaults())
    spoil(tmp_path / "out" / file, **changes)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / "out")
    assert file in str(error.value) and "\n" not in str(error.value)


def test_no_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_model(tmp_path / "nowhere")


@pytest.mark.parametrize("height, width", [(32, 32), (30, 71), (100, 41)])
@pytest.mark.parametrize(
    "theirs, ours",
    [
        (
            dict(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
            ImageProcessor(24, (24, 24)),
        ),
        (
            dict(size={"height": 20, "width": 28}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.2] * 3),
            ImageProcessor((20, 28), None, (0.5,) * 3, (0.2,) * 3),
        ),
    ],
)
def test_image_processor_equals_transformers(tmp_path, height, width, theirs, ours):
    processor = CLIPImageProcessorPil(**theirs)
    processor.save_pretrained(tmp_path)
    assert read_image_processor(tmp_path, 32) == ours
    pictures = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    expected = processor(images=list(pictures), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(ours(pictures), expected.transpose(0, 2, 3, 1), atol=1e-6)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(ours.to_json()))
    assert read_image_processor(tmp_path, 32) == ours


def test_a_picture_of_too_long_a_shape_is_refused():
    with pytest.raises(UserError, match=r"the image is 1x400000, too elongated for the image encoder; crop it"):
        ImageProcessor()(np.zeros((1, 1, 400_000, 3), np.uint8))


def test_unknown_image_settings_are_refused(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**ImageProcessor().to_json(), "resample": 2}))
    with pytest.raises(UserError, match="resample is 2, only 3 is supported"):
        read_image_processor(tmp_path, 32)
    for change, message in (
        ({"size": {"shortest_edge": 10**6}}, "size is 1000000, crop_size"),
        ({"size": {"shortest_edge": 0}}, "size is 0, crop_size"),
        ({"crop_size": {"height": 24, "width": -1}}, r"crop_size \(24, -1\); expected pixels from 1 to 4096"),
        ({"image_std": [0.5, 0.0, 0.5]}, r"image_std is \(0.5, 0.0, 0.5\), expected positive numbers"),
    ):
        path.write_text(json.dumps({**ImageProcessor().to_json(), **change}))
        with pytest.raises(UserError, match=message):
            read_image_processor(tmp_path, 32)
    path.write_text(json.dumps({**ImageProcessor().to_json(), "do_tile": True}))
    with pytest.raises(UserError, match="do_tile: unknown key"):
        read_image_processor(tmp_path, 32)
