"""Numbers and previews of a run in trackers that are really installed, without their servers."""

import json
import os
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
import wandb

from vpae_jax.media import write_video
from vpae_jax.train import trackers
from vpae_jax.train.metrics import MetricsLog, read_metrics
from vpae_jax.train.trackers import Tracker
from vpae_jax.types import UserError


@pytest.fixture
def video(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    write_video(tmp_path / "preview.mp4", frames, 8.0)
    return tmp_path / "preview.mp4"


def record(workdir, kind, video, start=0):
    """A run that goes on from a step, for one step."""
    log = MetricsLog(
        workdir, start, 10, lambda: Tracker(kind, workdir, "phase2", {"steps": 10, "model": {"path": "x"}})
    )
    log.write(start + 1, {"generator/loss": 0.5, "previews": video})
    log.close()
    if kind == "wandb":
        wandb.teardown()  # as at the end of a process
    return json.loads((workdir / "tracker.json").read_text())[kind]


@pytest.mark.filterwarnings("default")  # of the package itself
def test_wandb_gets_numbers_and_videos(tmp_path, video, monkeypatch):
    """And an interrupted run goes on as the same one."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    name = record(tmp_path, "wandb", video)
    assert record(tmp_path, "wandb", video, 5) == name
    runs = sorted(tmp_path.glob(f"wandb/offline-run-*-{name}"))
    assert len(runs) == 2
    for run in runs:
        (shown,) = run.glob("files/media/videos/*.mp4")
        assert shown.read_bytes() == video.read_bytes()
        written = (run / f"run-{name}.wandb").read_bytes()
        assert b"generator/loss" in written and shown.name.encode() in written
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 6]
    assert "previews" not in read_metrics(tmp_path)[0]


@pytest.mark.long
def test_trackio_gets_numbers_and_videos(tmp_path, video):
    """In a process of its own, since the package asks for its folder when it is imported. It is not among the tests'
    own packages: it holds Pillow below 13, whose older releases cannot read a TIFF in YCbCr (tests/test_media.py)."""
    pytest.importorskip("trackio")
    script = "import sys; from pathlib import Path; from test_trackers import record\n"
    script += "record(Path('.'), 'trackio', Path(sys.argv[1]))"
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script, str(video)], check=True, env=environment, cwd=tmp_path)
    (database,) = tmp_path.rglob("*.db")
    with sqlite3.connect(database) as found:
        ((step, metrics),) = found.execute("SELECT step, metrics FROM metrics").fetchall()
    assert step == 1 and json.loads(metrics)["generator/loss"] == 0.5
    (shown,) = tmp_path.rglob("media/**/*.mp4")
    assert shown.read_bytes() == video.read_bytes()


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    trackers.require("none")
    trackers.require("wandb")
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    trackers.require("none")
    with pytest.raises(UserError, match=r"config.tracker is 'wandb', but .* pip install 'vpae_jax\[wandb\]'"):
        trackers.require("wandb")


@pytest.mark.filterwarnings("default")
def test_a_tracker_that_cannot_begin_is_one_line(tmp_path, monkeypatch):
    """Without an account."""
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match=r"config\.tracker is 'wandb', which cannot start a run: ") as error:
        Tracker("wandb", tmp_path, "phase2", {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\xff{", b"[1]", b'{"wandb": 3}'])
def test_an_id_that_cannot_be_read_is_a_new_one(tmp_path, content):
    file = tmp_path / "tracker.json"
    file.write_bytes(content)
    found = trackers._id("wandb", file)
    assert len(found) == 8 and trackers._id("wandb", file) == found
