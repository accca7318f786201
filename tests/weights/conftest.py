"""Folders of random weights in both layouts, which no test may change."""

import shutil

import lora_models
import original_wan
import pytest
import random_model
import torch


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory):
    """An image-to-video model as Wan's authors release it, of float32 weights."""
    folder = tmp_path_factory.mktemp("wan")
    original_wan.save_folder(folder, image=True)
    return folder


@pytest.fixture(scope="session")
def diffusers_folder(tmp_path_factory):
    """An image-to-video pipeline that diffusers and transformers saved."""
    folder = tmp_path_factory.mktemp("diffusers")
    random_model.pipeline(folder, image=True)
    return folder


@pytest.fixture
def wan(wan_folder, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(wan_folder, tmp_path / "model")


@pytest.fixture
def theirs(diffusers_folder, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(diffusers_folder, tmp_path / "model")


@pytest.fixture(scope="module")
def wide():
    """A transformer of one head of Wan's 128 channels, whose sizes need no config.json."""
    torch.manual_seed(0)
    sizes = {"dim": 128, "ffn_dim": 16, "freq_dim": 8, "num_heads": 1, "num_layers": 2, "text_dim": 8}
    return dict(original_wan.Transformer(**sizes).state_dict())


@pytest.fixture(scope="session")
def t2v(tmp_path_factory):
    """A text-to-video pipeline, and a student that differs everywhere (`lora_models`)."""
    return lora_models.model(tmp_path_factory.mktemp("t2v"), image=False)


@pytest.fixture(scope="session")
def i2v(tmp_path_factory):
    """The same of image-to-video."""
    return lora_models.model(tmp_path_factory.mktemp("i2v"), image=True)


@pytest.fixture(params=["t2v", "i2v"])
def made(request):
    """Both, one after the other."""
    return request.getfixturevalue(request.param)
