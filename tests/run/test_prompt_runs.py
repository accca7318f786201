"""Runs on prompts alone, of a text-to-video and of an image-to-video model: from a file of prompts to a student."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import random_model
from PIL import Image

from vpae_jax import encode, evaluate
from vpae_jax.config import parse
from vpae_jax.configs import dmd2, phase1, phase2
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.run import experiment
from vpae_jax.train.metrics import read_metrics
from vpae_jax.types import UserError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
COUNT, HEIGHT, WIDTH = 12, 48, 64
ALONE = {"adversarial_weight": 0.0, "disc_weight": 0.0}


@pytest.fixture(scope="module")
def t2v(tmp_path_factory):
    """A model directory, and records of prompts for it."""
    return model_and_records(tmp_path_factory.mktemp("t2v"), image=False)


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    """The same for image-to-video, each prompt with a first frame."""
    return model_and_records(tmp_path_factory.mktemp("i2v"), image=True)


def model_and_records(root, image):
    random_model.pipeline(root / "model", image)
    defaults = {"num_frames": 9, "height": HEIGHT, "width": WIDTH, "fps": 8.0, "negative_prompt": ""}
    (root / "model" / "vpae_jax.json").write_text(json.dumps(defaults))
    (root / "prompts.txt").write_text("".join(f"a {word} moves up\n" for word in ("three", "four", "one", "two") * 3))
    given = [f"--prompts={root / 'prompts.txt'}", f"--model={root / 'model'}", f"--output={root / 'records'}"]
    if image:
        (root / "images").mkdir()
        for number in range(1, COUNT + 1):
            pixels = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
            Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        given.append(f"--images={root / 'images'}")
    encode.main([*given, "--dtype=float32", "--batch=4"])
    return root / "model", root / "records"


def config(module, given, **method):
    """Two steps, in parts."""
    made = module.get_config()
    made.model.path, made.data.records = map(str, given)
    made.steps, made.batch_size, made.accumulation = 2, 4, 2
    made.log_every, made.checkpoint_every, made.sample_every, made.sample_steps = 1, 2, 2, 2
    for name, value in method.items():
        made.method[name] = value
    return parse(made)


def run(module, given, workdir, devices, **method):
    """Returns the steps' metrics."""
    experiment.run(config(module, given, **method), workdir, jax.devices()[:devices])
    steps = [record for record in read_metrics(workdir) if "generator/loss" in record]
    assert [record["step"] for record in steps] == [1, 2]
    assert all(np.isfinite(value) for record in steps for value in record.values())
    assert "generator/dmd_gap" in steps[0] and not any(name.endswith("x0_mean_drift") for name in steps[0])
    assert load_pipeline(workdir / "model").scheduler.guidance == 1
    previews = [path.name for path in sorted((workdir / "previews").glob("*.png"))]
    assert previews == ["step_000000.png", "step_000002.png"]
    return steps


@pytest.fixture(scope="module")
def primed(t2v, tmp_path_factory):
    """A phase one on prompts for text-to-video."""
    workdir = tmp_path_factory.mktemp("runs") / "phase1"
    run(phase1, t2v, workdir, 2, input="pure_noise", fake_rank=4)
    return workdir


@pytest.mark.long
def test_text_to_video(primed, t2v, tmp_path, capsys):
    """Phase one, and distribution matching from its student, which would be guarded if there were clips."""
    sheet = np.asarray(Image.open(primed / "previews" / "step_000002.png"))
    assert sheet.shape[0] == 3 * (HEIGHT + 1) - 1, "teacher, generator and its average, and no data"
    given = config(dmd2, t2v, init="previous", steps=1, **ALONE)
    given = dataclasses.replace(given, previous=dataclasses.replace(given.previous, workdir=str(primed)))
    experiment.run(given, tmp_path / "dmd2", jax.devices()[:2])
    said = capsys.readouterr().out
    assert (
        f"scores and guard: off, because {t2v[1]} contains prompts alone, without real clips to compare with; give "
        in said
    )
    assert not (tmp_path / "dmd2" / "guard.json").exists()
    with pytest.raises(
        UserError, match=r"^.*/records contains prompts alone, .* or in --records of python -m vpae_jax"
    ):
        evaluate.main([f"--model={t2v[0]}", f"--phase1={primed}", f"--output={tmp_path / 'report'}"])
    assert not (tmp_path / "report").exists()


@pytest.mark.long
def test_image_to_video(i2v, tmp_path):
    """Distribution matching, with first frames and without."""
    run(dmd2, i2v, tmp_path / "dmd2", 1, steps=2, **ALONE)


def test_what_needs_clips_is_refused_before_anything_is_written(t2v, tmp_path):
    for module, method in ((phase1, {"input": "noised_real"}), (phase2, {"init": "pretrained", "disc_warmup": 0})):
        with pytest.raises(UserError, match=f"trains on real clips.* but {t2v[1]} contains prompts alone; "):
            run(module, t2v, tmp_path / "run", 1, **method)
        assert not (tmp_path / "run").exists()
