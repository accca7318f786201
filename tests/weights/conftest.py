"""Folders of random weights in both layouts, which no test may change."""

import shutil

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
