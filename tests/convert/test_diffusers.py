"""Parts of model directories: read as diffusers and transformers write them, written so that they load them."""

import json
import shutil
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_model
import torch
import transformers
from safetensors.numpy import load_file, save_file

from vpae_jax.convert.diffusers import build, load_part, read_part, replacing, write_part
from vpae_jax.types import UserError

CLASSES = {
    "transformer": diffusers.WanTransformer3DModel,
    "vae": diffusers.AutoencoderKLWan,
    "text_encoder": transformers.UMT5EncoderModel,
    "image_encoder": transformers.CLIPVisionModel,
}
STEMS = dict.fromkeys(("transformer", "vae"), "diffusion_pytorch_model") | dict.fromkeys(
    ("text_encoder", "image_encoder"), "model"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    random_model.pipeline(folder, image=True)
    return folder


@pytest.fixture
def copy(source, tmp_path):
    """A part's folder that a test may spoil."""

    def make(part):
        shutil.copytree(source / part, tmp_path / "model" / part)
        return tmp_path / "model"

    return make


def bits(folder, part):
    tensors = load_file(folder / part / f"{STEMS[part]}.safetensors")
    return {k.removeprefix("vision_model."): (str(v.dtype), v.shape, v.tobytes()) for k, v in tensors.items()}


def edit_config(folder, part, **changes):
    path = folder / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, part, change):
    path = folder / part / f"{STEMS[part]}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("part", CLASSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_equal_to_the_byte(source, tmp_path, part, dtype):
    original = source
    if dtype == "bfloat16":
        model = CLASSES[part].from_pretrained(source / part, torch_dtype=torch.bfloat16)
        # Diffusers keeps some of the transformer's tensors in float32 on loading; store every one in bfloat16.
        model.to(torch.bfloat16).save_pretrained(tmp_path / "original" / part)
        original = tmp_path / "original"
    config, params = read_part(original, part, None)
    write_part(tmp_path, part, config, params)
    assert bits(tmp_path, part) == bits(original, part)
    assert {kind for kind, _, _ in bits(tmp_path, part).values()} == {dtype}


@pytest.mark.parametrize("part", CLASSES)
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_from_pretrained_reads_what_was_written(source, tmp_path, part, shard_bytes):
    write_part(tmp_path, part, *read_part(source, part), shard_bytes=shard_bytes)
    assert (len(list((tmp_path / part).glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)
    model, info = CLASSES[part].from_pretrained(tmp_path / part, output_loading_info=True)
    assert not any(info.values()), info
    expected = CLASSES[part].from_pretrained(source / part)
    assert model.config.to_dict() if part in ("text_encoder", "image_encoder") else dict(model.config)
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert ours[next(iter(ours))].dtype == torch.float32


def test_shards_of_other_libraries_are_read(source, tmp_path):
    model = transformers.UMT5EncoderModel.from_pretrained(source / "text_encoder")
    model.save_pretrained(tmp_path / "text_encoder", max_shard_size="20KB")
    assert (tmp_path / "text_encoder" / "model.safetensors.index.json").is_file()
    _, params = read_part(tmp_path, "text_encoder")
    _, whole = read_part(source, "text_encoder")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, whole))


def test_weights_are_cast_and_placed(source):
    seen = {}

    def place(path, value):
        seen[path] = value.dtype
        return jnp.asarray(value)

    config, params = read_part(source, "transformer", jnp.bfloat16, place)
    assert set(seen.values()) == {np.dtype(jnp.bfloat16)} and "blocks/attn1/to_q/kernel" in seen
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert build("transformer", config, params, jnp.bfloat16).dtype == jnp.bfloat16
    assert load_part(source, "transformer").config == config


def test_written_dtype(source, tmp_path):
    write_part(tmp_path, "vae", *read_part(source, "vae"), dtype=jnp.bfloat16)
    assert {kind for kind, _, _ in bits(tmp_path, "vae").values()} == {"bfloat16"}


@pytest.mark.parametrize("same", [True, False])
def test_a_repeated_embedding_must_be_the_same(copy, same):
    folder = copy("text_encoder")

    def repeat(tensors):
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"] + (0 if same else 1)

    edit_weights(folder, "text_encoder", repeat)
    if same:
        read_part(folder, "text_encoder")
    else:
        with pytest.raises(UserError, match=r"'encoder.embed_tokens.weight' differs from 'shared.weight'"):
            read_part(folder, "text_encoder")


def test_an_embedding_may_have_its_other_name(copy, source):
    folder = copy("text_encoder")
    edit_weights(folder, "text_encoder", lambda t: t.update({"encoder.embed_tokens.weight": t.pop("shared.weight")}))
    found, expected = (read_part(f, "text_encoder")[1]["shared"]["embedding"] for f in (folder, source))
    np.testing.assert_array_equal(found, expected)


def assert_same(folder, source, part):
    """The part is read from both folders to the same config and weights."""
    (config, found), (other, expected) = read_part(folder, part), read_part(source, part)
    assert config == other
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_unused_tensors_are_skipped(copy, source):
    folder = copy("transformer")
    edit_weights(
        folder, "transformer", lambda t: t.update({"blocks.0.attn2.norm_added_q.weight": np.ones(24, np.float32)})
    )
    assert_same(folder, source, "transformer")
    folder = copy("image_encoder")
    edit_weights(
        folder,
        "image_encoder",
        lambda t: t.update({"vision_model.embeddings.position_ids": np.arange(17)[None]}),
    )
    assert_same(folder, source, "image_encoder")


TENSOR = "blocks.1.attn1.to_q.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(TENSOR), f"transformer: tensor '{TENSOR}' of shape [24, 24] is missing"),
        (
            lambda t: t.update({TENSOR: np.zeros((24, 23), np.float32)}),
            f"diffusion_pytorch_model.safetensors: tensor '{TENSOR}' has shape [24, 23], expected [24, 24]",
        ),
        (
            lambda t: t.update({"blocks.2.norm2.weight": np.zeros(24, np.float32)}),
            "diffusion_pytorch_model.safetensors: tensor 'blocks.2.norm2.weight' of shape [24] is unknown",
        ),
    ],
    ids=["missing", "misshapen", "unknown"],
)
def test_spoilt_weights_are_one_line(copy, change, message):
    folder = copy("transformer")
    edit_weights(folder, "transformer", change)
    with pytest.raises(UserError) as error:
        read_part(folder, "transformer")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 7, 3000, -1])
def test_a_truncated_file_is_one_line(copy, keep):
    folder = copy("vae")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"diffusion_pytorch_model.safetensors: truncated or not a safetensors file"):
        read_part(folder, "vae")


def test_a_tensor_in_two_shards_is_refused(source, tmp_path):
    write_part(tmp_path, "text_encoder", *read_part(source, "text_encoder"), shard_bytes=20_000)
    first, second = sorted((tmp_path / "text_encoder").glob("*.safetensors"))[:2]
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file({**load_file(second), name: tensors[name]}, second)
    with pytest.raises(UserError, match=f"{second.name}: tensor '{name}' is also in .*{first.name}; remove one"):
        read_part(tmp_path, "text_encoder")
    second.unlink()
    with pytest.raises(UserError, match=f"{second.name}: no such file; the weights are incomplete"):
        read_part(tmp_path, "text_encoder")


@pytest.mark.parametrize(
    "part, changes, message",
    [
        ("transformer", {"num_layer": 3}, r"config.json.num_layer: unknown key; did you mean 'num_layers'"),
        ("transformer", {"num_layers": "3"}, r"config.json.num_layers: expected int, found '3'"),
        ("transformer", {"_class_name": "FluxTransformer2DModel"}, r"expected 'WanTransformer3DModel'"),
        ("transformer", {"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
        ("vae", {"is_residual": True}, "is_residual is True"),
        ("text_encoder", {"dense_act_fn": "relu"}, "dense_act_fn is 'relu', only 'gelu_new' is supported"),
        ("text_encoder", {"model_type": "t5"}, "model_type is 't5', expected 'umt5'"),
        ("image_encoder", {"hidden_act": "tanh"}, "config.json: CLIP: hidden_act is 'tanh'"),
    ],
)
def test_an_unsupported_config_is_one_line(copy, part, changes, message):
    folder = copy(part)
    edit_config(folder, part, **changes)
    with pytest.raises(UserError, match=message) as error:
        read_part(folder, part)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_private_keys_of_a_config_are_ignored(copy, source):
    folder = copy("transformer")
    edit_config(folder, "transformer", _name_or_path="elsewhere", _new={"a": 1})
    assert_same(folder, source, "transformer")


def test_missing_files_are_one_line(copy, tmp_path):
    with pytest.raises(UserError, match="no vae/ folder"):
        read_part(tmp_path, "vae")
    folder = copy("vae")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="no such file; the weights are incomplete"):
        read_part(folder, "vae")
    (folder / "vae" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: not valid JSON"):
        read_part(folder, "vae")


def test_a_failed_write_leaves_the_old_part(source, copy):
    folder = copy("image_encoder")
    before = bits(folder, "image_encoder")
    config, params = read_part(source, "image_encoder")
    params["layers"]["fc2"]["kernel"] = "not an array"
    with pytest.raises((AttributeError, TypeError, ValueError)):
        write_part(folder, "image_encoder", config, params)
    assert bits(folder, "image_encoder") == before
    assert [path.name for path in folder.iterdir()] == ["image_encoder"]


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_failed_rename_leaves_the_old_folder(tmp_path, monkeypatch, fails_at):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("old")
    rename, calls = Path.rename, []

    def failing(self, target):
        calls.append(target)
        if len(calls) == fails_at:
            raise OSError("no space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no space left"), replacing(folder) as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and (folder / "weights").read_text() == "old"
    with replacing(folder) as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and (folder / "weights").read_text() == "new"
