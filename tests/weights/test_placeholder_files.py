"""What lies in the place of a file is named for what it is; one part that cannot be read leaves the others."""

import shutil
import warnings

import pytest
import torch.distributed.checkpoint as dcp
from finding import opened, refused
from folders import PARTS, edit_json, same, values, write
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from vpae_jax.convert import read_model
from vpae_jax.types import UserError
from vpae_jax.weights.find import find_model
from vpae_jax.weights.spiece import check_files

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 135\n"
IMPOSTORS = {
    "GGUF\3\0\0\0": "is a GGUF file, whose weights are quantised; fetch safetensors",
    POINTER.decode(): "is a Git LFS pointer, not the file itself; run `git lfs pull`",
    "\n<!doctype HTML>\n<html>": "is a web page (HTML)",
    "<html lang='en'>": "is a web page (HTML)",
    "<!-- x -->\n<!DOCTYPE html>": "is a web page (HTML)",
    "<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>": "is XML, which stores send",
    "\x1f\u008b\x08": "is an archive; unpack it",
    "\u0093NUMPY\1\0": "is a NumPy array",
}


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "json"])
@pytest.mark.parametrize("content", IMPOSTORS)
def test_what_is_no_file_of_weights_is_named(tmp_path, content, suffix):
    path = tmp_path / f"m.{suffix}"
    path.write_bytes(content.encode("latin-1") + bytes(300))
    assert refused(path).startswith(f"{path}: {IMPOSTORS[content]}")
    assert "fetch it again" not in refused(path)


def test_a_distributed_checkpoint_is_named_with_what_makes_one_file_of_it(tmp_path, wide):
    """Which is then read."""
    folder = tmp_path / "run" / "step_100"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of a process that is alone
        dcp.save({"model": wide}, checkpoint_id=folder)
        (file,) = folder.glob("*.distcp")
        for given in (folder, folder.parent, file):
            with pytest.raises(UserError) as error:
                read_model(str(given), None)
            line = f"{file}: is part of a PyTorch distributed checkpoint; merge its folder into one file first, with `"
            assert str(error.value).startswith(line)
            assert f"format_utils dcp_to_torch {folder} FILE.pt`" in str(error.value)
        (tmp_path / "whole").mkdir()
        dcp_to_torch_save(folder, tmp_path / "whole" / "x.pt")
    found = values(tmp_path / "whole" / "x.pt", "transformer")
    assert same(found, values(write(tmp_path / "plain" / "x.pt", wide), "transformer"))


def test_weights_are_seen_whatever_letters_their_suffix_has(theirs):
    part = theirs / "vae" / "diffusion_pytorch_model.safetensors"
    part.rename(part.with_suffix(".SAFETENSORS"))
    assert set(find_model(theirs).parts) == set(PARTS)


def test_a_zip_that_is_no_checkpoint(tmp_path):
    shutil.make_archive(str(tmp_path / "m"), "zip", tmp_path)
    assert "is a zip archive without a PyTorch checkpoint; unpack it" in refused(tmp_path / "m.zip")


@pytest.mark.parametrize("name", ["model_index.json", "vpae_jax.json", "transformer/config.json"])
def test_placeholders_of_json(theirs, name):
    (theirs / name).write_bytes(POINTER)
    assert refused(theirs).startswith(f"{theirs / name}: is a Git LFS pointer")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "spiece.model"])
def test_placeholders_of_a_tokenizer(theirs, name):
    (theirs / "tokenizer" / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=f"{name}: is a Git LFS pointer"):
        check_files(theirs / "tokenizer")


@pytest.mark.parametrize(
    "part, file",
    [
        ("vae", "diffusion_pytorch_model.safetensors"),
        ("vae", "config.json"),
        ("image_encoder", "model.safetensors"),
        ("transformer", "diffusion_pytorch_model.safetensors"),
    ],
)
def test_one_part_that_cannot_be_read_leaves_the_others(theirs, part, file):
    (theirs / part / file).write_bytes(POINTER)
    model = find_model(theirs)
    assert set(model.parts) == set(PARTS) - {part} and set(model.unreadable) == {part}
    for other in model.parts:
        opened(theirs, other)
    line = f"{theirs / part / file}: is a Git LFS pointer"
    assert refused(theirs, part).startswith(line)
    with pytest.raises(UserError) as error:
        model.require_whole()
    assert str(error.value).startswith(line)


def test_a_part_twice_leaves_the_others(wan):
    shutil.copy(wan / "Wan2.1_VAE.pth", wan / "b.pth")
    (wan / "Wan2.1_VAE.pth").rename(wan / "a.pth")
    assert set(find_model(wan).parts) == set(PARTS) - {"vae"}
    assert "both hold the vae" in refused(wan, "vae")


def test_a_config_is_doubted_only_where_there_is_one(tmp_path, wide):
    path = write(tmp_path / "x.safetensors", {**wide, "vace.weight": wide["head.head.bias"]})
    assert refused(path, "transformer").endswith("tensor 'vace.weight' of shape [64] is unknown to this architecture")
    sizes = {"dim": 128, "ffn_dim": 16, "freq_dim": 8, "num_heads": 1, "num_layers": 2, "text_dim": 8, "in_dim": 16}
    edit_json(tmp_path / "config.json", _class_name="WanModel", **sizes)
    assert refused(path, "transformer").endswith("; does config.json belong to these weights?")
