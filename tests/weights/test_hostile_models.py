"""Model folders from strangers: what would fill the memory, or go on for ever, is refused in one line, at once."""

import json
import os
import shutil
import struct

import pytest
from finding import refused
from folders import edit_json

from vpae_jax.types import UserError
from vpae_jax.weights import orbax
from vpae_jax.weights.filenames import MAX_JSON, read_json, write_json
from vpae_jax.weights.find import find_model
from vpae_jax.weights.parts import config_json
from vpae_jax.weights.safetensors_file import MAX_HEADER, MAX_TENSORS
from vpae_jax.weights.settings import read_defaults, read_scheduler
from vpae_jax.weights.spiece import MAX_FILE, check_files


@pytest.mark.parametrize("name", ["vae/config.json", "vpae_jax.json", "model_index.json"])
def test_json_of_gigabytes_is_not_read(theirs, name):
    (theirs / name).touch()
    os.truncate(theirs / name, 8 * 2**30)  # sparse
    assert refused(theirs) == (
        f"{theirs / name}: has more than {MAX_JSON} bytes, too many for such a file; fetch it again"
    )


def test_json_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "zero.json"):
        with pytest.raises(UserError, match=f"{name}: is not a regular file"):
            read_json(tmp_path / name)


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model", "special_tokens_map.json"])
def test_tokenizers_of_gigabytes_are_not_read(theirs, name):
    path = theirs / "tokenizer" / name
    path.touch()
    os.truncate(path, 8 * 2**30)
    with pytest.raises(
        UserError, match=rf"{path}: has {8 * 2**30} bytes, expected a tokenizer's, of at most {MAX_FILE}"
    ):
        check_files(theirs / "tokenizer")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=f"{path}: is not a regular file"):
        check_files(theirs / "tokenizer")


def test_headers_of_a_million_tensors_are_not_read(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER + 1) + b"{")
    os.truncate(path, 2 * MAX_HEADER)
    reason = f"header too large: {MAX_HEADER + 1} bytes, expected at most {MAX_HEADER}"
    assert refused(path) == f"{path}: truncated or not a safetensors file ({reason}); fetch it again"


def test_more_tensors_than_any_model_has(tmp_path):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    raw = json.dumps({str(i): entry for i in range(MAX_TENSORS + 1)}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    message = f"holds {MAX_TENSORS + 1} tensors, expected at most {MAX_TENSORS}; is this a model?"
    assert refused(tmp_path / "m.safetensors") == f"{tmp_path / 'm.safetensors'}: {message}"


@pytest.mark.parametrize(
    "part, changes, message",
    [
        ("vae", {"dim_mult": [1] * 100_000}, "dim_mult has 100000 entries, expected at most 256"),
        ("vae", {"num_res_blocks": 10**9}, "num_res_blocks is 1000000000, "),
        ("vae", {"latents_mean": [0.0] * 10**5}, "latents_mean has 100000 entries, expected at most 256"),
        ("transformer", {"text_len": 10**9}, "text_len is 1000000000, expected at most 65536"),
    ],
)
@pytest.mark.parametrize("layout", ["diffusers", "orbax"])
def test_sizes_beyond_any_model(theirs, tmp_path, part, changes, message, layout):
    folder = theirs / part
    if layout == "orbax":
        config = config_json(find_model(theirs).part(part).config, part)
        folder = tmp_path / "ours"
        orbax.save(folder / "params", {"a": 1.0})
        write_json(folder / "config.json", config)
    edit_json(folder / "config.json", **changes)
    assert message in refused(folder.parent if layout == "diffusers" else folder)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"num_frames": 10**9}, "1000000000 frames of 480x832 are more than 1.1e+09 pixels; give a smaller clip"),
        ({"height": 10**6, "width": 10**6, "num_frames": 1}, "1 frames of 1000000x1000000 are more than"),
        ({"num_frames": -1}, "num_frames is -1, expected at least 1"),
        ({"width": 0}, "width is 0, expected at least 1"),
        ({"fps": 1e308}, "fps is 1e+308, expected a number from 0.01 to 1000"),
        ({"fps": -1.0}, "fps is -1.0, expected a number from 0.01 to 1000"),
        ({"negative_prompt": "word " * 10**5}, "negative_prompt has 500000 characters, expected at most 10000"),
        ({"fps": 1e-9}, "fps is 1e-09, expected a number from 0.01 to 1000"),
    ],
)
def test_clips_that_nobody_can_make(tmp_path, values, message):
    (tmp_path / "vpae_jax.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as error:
        read_defaults(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'vpae_jax.json'}: {message}")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"steps": 10**12}, "steps is 1000000000000, expected at most 1000"),
        ({"guidance": 1e308}, "guidance is 1e+308, expected at most 1000"),
        (
            {"steps": 10**5, "times": [1 - i / 10**5 for i in range(10**5 + 1)]},
            "steps is 100000, expected at most 1000",
        ),
    ],
)
@pytest.mark.parametrize("layout", ["diffusers", "wan"])
def test_steps_and_guidance_that_nobody_means(tmp_path, values, message, layout):
    if layout == "wan":
        path = tmp_path / "vpae_jax.json"
        path.write_text(json.dumps({"scheduler": values}))
    else:
        path = tmp_path / "scheduler" / "scheduler_config.json"
        path.parent.mkdir()
        keys = {"steps": "_num_inference_steps", "guidance": "_guidance_scale", "times": "_times"}
        named = {keys[key]: value for key, value in values.items()}
        path.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0, **named}))
    with pytest.raises(UserError) as error:
        read_scheduler(tmp_path)
    assert str(error.value).startswith(f"{path}") and message in str(error.value) and len(str(error.value)) < 300


def test_a_converted_tokenizer_is_looked_at_before_it_is_copied(theirs, tmp_path):
    from vpae_jax.weights.layout import Contents, write_model

    path = theirs / "tokenizer" / "more.bin"
    path.touch()
    os.truncate(path, 8 * 2**30)
    with pytest.raises(UserError, match=r"more.bin: has \d+ bytes, expected a tokenizer's"):
        write_model(tmp_path / "out", Contents(find_model(theirs)))
    assert not (tmp_path / "out").exists()
    shutil.rmtree(theirs)
