"""What a run trains on: folders of videos, folders of records, and what is refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from vpae_jax import encode, tasks
from vpae_jax.config import parse
from vpae_jax.configs import phase1, phase2, vae
from vpae_jax.flow.sampler import ONE_STEP
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.media import write_video
from vpae_jax.run import experiment
from vpae_jax.run.scoring import Scorer
from vpae_jax.tasks.base import TooFew
from vpae_jax.tasks.digits.clips import MovingDigits
from vpae_jax.tasks.video.sources import open_sources
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
    given.sample_steps = 2
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
    found = open_sources(given.data, workdir, pipeline, "tiny")
    assert [weight for _, weight in found] == [0.75, 0.25]
    ((one, weight),) = open_sources(parse(config(records=records)).data, workdir, pipeline, "tiny")
    assert weight == len(one) == COUNT * 2
    other = dataclasses.replace(pipeline, defaults=dataclasses.replace(pipeline.defaults, negative_prompt="a blur"))
    with pytest.raises(UserError, match="was encoded with other encoders than those of tiny; encode its clips again"):
        open_sources(given.data, workdir, other, "tiny")
    with pytest.raises(UserError, match="nowhere contains no encoded clips"):
        open_sources(parse(config(records=workdir / "nowhere")).data, workdir, pipeline, "tiny")


def test_training_on_records_sees_only_their_clips(workdir, tmp_path):
    (records,) = (workdir.parent / "data").iterdir()
    run(parse(config(records=records)), tmp_path / "phase1")
    steps = [r for r in read_metrics(tmp_path / "phase1") if "generator/loss" in r]
    assert len(steps) == 2 and all(np.isfinite(r["generator/loss"]) for r in steps)
    assert not (tmp_path / "data").exists()


@pytest.mark.long
def test_a_phase_on_records_is_guarded_by_clips_that_it_holds_out(workdir, videos, tmp_path, capsys):
    """Of 12 clips too few are held out; with a folder of their own for judging there are enough."""
    (records,) = (workdir.parent / "data").iterdir()
    given = phase2.get_config()
    given.steps, given.batch_size, given.log_every, given.checkpoint_every, given.sample_every = 2, 8, 1, 2, 0
    given.method.disc_warmup, given.previous.workdir, given.data.records = 0, str(workdir), str(records)
    given.optimizers.generator.learning_rate, given.method.ema = 0.3, 0.1  # ruins it
    few, pipeline = parse(given), load_pipeline("tiny", with_transformer=False)
    task = tasks.open_task(few.data, tmp_path, "tiny", few.method)
    with pytest.raises(TooFew, match=r"^2 held-out clips of one size are too few"):
        Scorer(task, pipeline, tmp_path, few.score_clips, ONE_STEP)
    assert "held out: 2 of 12 clips" in capsys.readouterr().out
    more = tmp_path / "more"
    clips = MovingDigits("eval", 10, frames=37, resolution=64)
    more.mkdir()
    for i in range(10):
        write_video(more / f"{i}.mp4", 255 - clips[i]["video"], 16.0)
        (more / f"{i}.txt").write_text(clips[i]["caption"])
    encode.main([f"--videos={more}", "--clips_per_video=2", "--workers=1", f"--output={tmp_path / 'judged'}"])
    given.data.held_out_records = str(tmp_path / "judged")
    run(parse(given), tmp_path / "judged_by")
    said = capsys.readouterr().out
    assert "the weights that it started from are kept" in said
    found = json.loads((tmp_path / "judged_by" / "guard.json").read_text())
    assert found["task"] == "video" and not found["kept"] and found["after"] > found["before"]
    names = ("kvd", "sharpness", "motion", "still", "diversity", "color_drift", "latent_mean", "latent_std")
    assert {f"{mode}/{name}" for mode in ("t2v", "i2v") for name in names} < set(found["scores"]["2"])
    assert set(found["real"]) >= set(found["scores"]["2"])


def test_pixels_are_trained_on_digits_alone(workdir, tmp_path):
    (records,) = (workdir.parent / "data").iterdir()
    given = vae.get_config()
    given.data.records = str(records)
    with pytest.raises(UserError, match=r"method autoencoder only trains on rendered digits; leave config.data.rec"):
        run(parse(given), tmp_path / "vae")
    assert not (tmp_path / "vae").exists()


def test_videos_are_listed_before_anything_is_loaded(videos, tmp_path):
    """A missing folder is refused at once, and processes that see other files differ."""
    with pytest.raises(
        UserError, match=f"{tmp_path}/none: no such folder; give the folder .* --config.data.videos=FOL"
    ):
        tasks.digests(parse(config(videos=tmp_path / "none")).data, tmp_path)
    given = parse(config(videos=videos)).data
    seen = tasks.digests(given, tmp_path)
    assert seen.keys() == {"config.data.videos"} and tasks.digests(given, tmp_path) == seen
    shutil.copytree(videos, tmp_path / "videos")
    assert tasks.digests(dataclasses.replace(given, videos=str(tmp_path / "videos")), tmp_path) == seen
    (tmp_path / "videos" / "0.txt").write_text("another caption")
    assert tasks.digests(dataclasses.replace(given, videos=str(tmp_path / "videos")), tmp_path) != seen
