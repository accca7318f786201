"""Folders of random weights in both layouts, which no test may change."""

import original_wan
import pytest
import random_model


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
