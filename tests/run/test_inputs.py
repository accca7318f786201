"""What a run trains on: folders of videos, folders of records, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import phase1
from vpae_jax.config import parse
from vpae_jax.inference.pipeline import load_pipeline
from vpae_jax.media import write_video
from vpae_jax.run import experiment
from vpae_jax.run.inputs import open_records
from vpae_jax.tasks.digits.clips import MovingDigits
from vpae_jax.train.metrics import read_metrics
from vpae_jax.types import UserError

COUNT = 6
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def run(experiment_, workdir):
    """On one device: eight would only compile longer."""
    experiment.run(experiment_, workdir, jax.devices()[:1])


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Real files: moving digits at another size and rate than the model's, with captions beside them."""
    folder = tmp_path_factory.mktemp("videos")
    clips = MovingDigits("train", COUNT, frames=37, resolution=64)
    for i in range(COUNT):
        write_video(folder / f"{i}.mp4", 255 - clips[i]["video"], 16.0)  # mostly black ones are refused
        (folder / f"{i}.txt").write_text(clips[i]["caption"])
    (folder / "broken.mp4").write_bytes(b"not a video")
    (folder / "broken.txt").write_text("a three")
    return folder


def config(**data):
    result = phase1.get_config()
    # Of test_experiment.py's batch size, so that its compiled programs serve here too.
    result.steps, result.batch_size, result.log_every, result.checkpoint_every, result.sample_every = 2, 8, 1, 2, 0
    result.method.fake_updates = 1
    for name, value in data.items():
        result.data[name] = str(value)
    return result


@pytest.fixture(scope="module")
def workdir(videos, tmp_path_factory):
    """A run on the folder of videos."""
    workdir = tmp_path_factory.mktemp("runs") / "phase1"
    given = config(videos=videos)
    given.sample_every = 2
    run(parse(given), workdir)
    return workdir


def test_a_folder_of_videos_is_encoded_once_and_trained_on(workdir, videos):
    (records,) = (workdir.parent / "data").iterdir()
    index = json.loads((records / "index.json").read_text())
    assert index["count"] == COUNT * 2  # clips of 9 frames at 8 a second, from 37 at 16
    assert sum(index["rejects"].values()) == 1 and (records / "summary.html").is_file()
    assert [r["step"] for r in read_metrics(workdir) if "generator/loss" in r] == [1, 2]
    assert (workdir / "model" / "transformer").is_dir()
    assert sorted(path.name for path in (workdir / "previews").glob("*.png")) == ["step_000000.png", "step_000002.png"]
    before = (records / "index.json").stat().st_mtime_ns
    run(parse(config(videos=videos)), workdir.parent / "again")
    assert [path.name for path in (workdir.parent / "data").iterdir()] == [records.name]
    assert (records / "index.json").stat().st_mtime_ns == before


def test_records_are_opened_with_their_weights(workdir):
    (records,) = (workdir.parent / "data").iterdir()
    pipeline = load_pipeline("tiny", with_transformer=False)
    given = parse(config(records=f"{records}=0.75,{records}=0.25"))
    found = open_records(given, workdir, pipeline)
    assert [weight for _, weight in found] == [0.75, 0.25]
    ((one, weight),) = open_records(parse(config(records=records)), workdir, pipeline)
    assert weight == len(one) == COUNT * 2
    other = dataclasses.replace(pipeline, defaults=dataclasses.replace(pipeline.defaults, negative_prompt="a blur"))
    with pytest.raises(UserError, match="was encoded with other encoders than those of tiny; encode its clips again"):
        open_records(given, workdir, other)
    with pytest.raises(UserError, match="nowhere holds no encoded clips"):
        open_records(parse(config(records=workdir / "nowhere")), workdir, pipeline)


def test_training_on_records_sees_only_their_clips(workdir, tmp_path):
    (records,) = (workdir.parent / "data").iterdir()
    run(parse(config(records=records)), tmp_path / "phase1")
    steps = [r for r in read_metrics(tmp_path / "phase1") if "generator/loss" in r]
    assert len(steps) == 2 and all(np.isfinite(r["generator/loss"]) for r in steps)
    assert not (tmp_path / "data").exists()


def test_the_guard_says_that_it_does_not_know_other_clips(workdir, tmp_path, capsys):
    (records,) = (workdir.parent / "data").iterdir()
    given = config(records=records)
    given.guard.enabled = True
    run(parse(given), tmp_path / "phase1")
    assert "guard: off, since it scores digits alone" in capsys.readouterr().out
