import functools

import jax
import pytest
from encoding_runs import COUNT, add_bad_videos, call, make_videos
from manifests import CAPTIONS

from vpae_jax import encode
from vpae_jax.inference.loading import load_pipeline

LOADED = functools.cache(load_pipeline)


@pytest.fixture
def videos(tmp_path):
    """A folder with files v0.mp4 ... v9.mp4."""
    root = tmp_path / "videos"
    root.mkdir()
    for number in range(len(CAPTIONS)):
        (root / f"v{number}.mp4").write_bytes(b"no video")
    return root


@pytest.fixture
def one_device(monkeypatch):
    """As on a user's machine; `test_encoding` has several."""
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)


@pytest.fixture
def loaded(monkeypatch):
    """Loads a model; each is loaded and compiled once for all runs of the program."""
    monkeypatch.setattr(encode, "load_pipeline", LOADED)
    return LOADED


@pytest.fixture
def run(capsys, one_device, loaded):
    """Runs the program in this process (`encoding_runs.call`)."""
    return lambda **arguments: call(capsys, **arguments)


@pytest.fixture(scope="session")
def real_videos(tmp_path_factory):
    """Some that become clips, with captions beside them, and some that do not; none is to be changed."""
    folder = make_videos(tmp_path_factory.mktemp("some") / "videos", COUNT)
    add_bad_videos(folder)
    return folder
