"""`python -m vpae_jax.evaluate --suite=...`: clips and a manifest from a checkout, scores from results."""

import fcntl
import json
import shutil
import subprocess
from functools import partial

import av
import numpy as np
import pytest
import suite_checkouts
from test_suite_scores import I2V, results

from vpae_jax import evaluate
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.media import read_image, write_video
from vpae_jax.runtime.progress import Pace
from vpae_jax.suites.export import prepare
from vpae_jax.suites.prompts import SUITES, read_prompts
from vpae_jax.types import UserError


@pytest.fixture
def run(program):
    return partial(program, evaluate.main)


@pytest.fixture(scope="module")
def pipes(models):
    return {name: load_pipeline(folder) for name, folder in models.items()}


def frames(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def shows(path, made, crf):
    """Whether a video is what is written of frames."""
    expected = path.parents[2] / "expected.mp4"
    write_video(expected, made, 8.0, crf)
    return path.read_bytes() == expected.read_bytes()


def names(output):
    return sorted(path.name for path in (output / "videos").iterdir())


def listed(output):
    return {clip["file"]: clip for clip in json.loads((output / "manifest.json").read_text())["clips"]}


def test_vbench(run, models, pipes, checkout, tmp_path):
    output = tmp_path / "out"
    options = {"suite": "vbench", "checkout": checkout, "model": models["t2v"], "output": output}
    code, text, error = run(**options, samples=1)
    assert not code, error
    assert {path.name for path in output.iterdir()} == {"manifest.json", "videos"}
    assert names(output) == ["a four-0.mp4", "a one-0.mp4", "a three-0.mp4", "a two, up-0.mp4"]
    assert shows(output / "videos" / "a two, up-0.mp4", pipes["t2v"]("a two moves up", seed=100_000), crf=14)
    found = json.loads((output / "manifest.json").read_text())
    assert found["clips"][1] == {
        "file": "videos/a two, up-0.mp4",
        "prompt": "a two, up",
        "augmented_prompt": "a two moves up",
        "seed": 100_000,
        "image": None,
        "crop": None,
        "dimensions": ["subject_consistency", "dynamic_degree", "motion_smoothness"],
    }
    assert found["sampler"]["solver"] == "euler" and len(found["sampler"]["times"]) == 3
    assert found["clip"] == {"num_frames": 5, "height": 32, "width": 32, "fps": 8.0, "crf": 14}
    assert len(found["weights"]) == 16 and found["checkout"]["commit"] is None
    assert len(found["checkout"]["files"]) == 2
    assert "4 of 4 clips; " in text and " s per clip; 0:00:00 left" in text
    assert f"cd {checkout}\n" in text and f"static_filter.py --videos_path {output / 'videos'}" in text
    flickering = "python evaluate.py --videos_path {} --output_path {} --dimension temporal_flickering"
    assert flickering.format(output / "filtered" / "filtered_videos", output / "results") in text
    assert f"--suite=vbench --suite-results=NAME={output / 'results'}" in text

    # More samples of one dimension are added, and nothing is made again.
    before = {name: (output / "videos" / name).stat() for name in names(output)}
    code, text, error = run(**options, samples=2, dimensions="color")
    assert not code, error
    assert set(names(output)) == {*before, "a four-1.mp4"}
    assert before == {name: (output / "videos" / name).stat() for name in before}
    assert set(listed(output)) == {f"videos/{name}" for name in names(output)}
    assert "1 of 1" not in text and "for d in" not in text and "--dimension color\n" in text

    # Of another sampler they would be other clips.
    code, _, error = run(**options, samples=1, steps=1)
    assert code == 2 and error.count("\n") == 1
    assert f"{output} holds clips of another export: sampler.times is [1.0, " in error
    (output / "manifest.json").write_text("[]")
    code, _, error = run(**options, samples=1)
    assert code == 2 and "manifest.json is damaged; choose another --output" in error
    (output / "manifest.json").unlink()
    code, _, error = run(**options, samples=1)
    assert code == 2 and f"{output / 'videos'} holds files, but {output / 'manifest.json'} is missing" in error


def test_vbench_i2v(run, models, pipes, checkout, tmp_path):
    output = tmp_path / "out"
    options = {"suite": "vbench_i2v", "checkout": checkout, "model": models["i2v"], "output": output, "samples": 1}
    code, text, error = run(**options, dimensions="camera_motion,i2v_subject", process_id=1, num_processes=2)
    assert not code, error
    assert names(output) == ["a five, camera static-0.mp4", "a seven-0.mp4"]
    assert "this process has done its share; 2 of 4 clips remain for other processes" in text
    code, text, error = run(**options, dimensions="camera_motion,i2v_subject", process_id=0, num_processes=2)
    assert not code, error
    assert len(names(output)) == 4 and "evaluate_i2v.py" in text and " --ratio 1-1 " in text
    folder = checkout / "vbench2_beta_i2v/data/crop/1-1"
    made = pipes["i2v"]("a seven", read_image(folder / "a seven.jpg"), seed=400_000, height=32, width=32)
    assert shows(output / "videos" / "a seven-0.mp4", made, crf=10)
    clip = listed(output)["videos/a seven-0.mp4"]
    assert (clip["image"], clip["crop"], clip["augmented_prompt"]) == ("a seven.jpg", "1-1", None)
    assert json.loads((output / "manifest.json").read_text())["clip"]["crf"] == 10


def test_vbench2_in_a_git_checkout(run, models, checkout, tmp_path):
    own, output = shutil.copytree(checkout, tmp_path / "own"), tmp_path / "it's"
    git = ["git", "-C", str(own), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    options = {"checkout": own, "model": models["t2v"], "output": output, "samples": 1}
    code, text, error = run(suite="vbench2", dimensions="Complex_Plot", **options)
    assert not code, error
    assert names(output) == [f"{suite_checkouts.LONG[:180]}-0.mp4"]
    assert json.loads((output / "manifest.json").read_text())["checkout"]["commit"] == commit
    assert f"cd {own / 'VBench-2.0'}\n" in text and "it'\"'\"'s/videos'" in text


def test_what_others_make_or_have_left(run, models, checkout, tmp_path):
    output = tmp_path / "out"
    options = {"suite": "vbench", "checkout": checkout, "model": models["t2v"], "output": output, "samples": 1}
    (unfinished := output / "unfinished").mkdir(parents=True)
    with (unfinished / "00001-000.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, text, error = run(**options)
        assert not code, error
        assert "a two, up-0.mp4" not in names(output) and len(names(output)) == 3
        assert "1 of 4 clips remain for other processes" in text and "evaluate.py" not in text
    for name in ("00001-000.mp4", "00002-000.mp4", "00002-000.lock"):  # of killed processes
        (unfinished / name).write_bytes(b"half")
    code, text, error = run(**options)
    assert not code, error
    assert len(names(output)) == 4 and not unfinished.exists()
    assert frames(output / "videos" / "a two, up-0.mp4").shape == (5, 32, 32, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "vbench3"}, "invalid choice: 'vbench3'"),
        ({"checkout": "nowhere"}, "VBench_full_info.json: no such file; --checkout=nowhere must be a clone"),
        ({"samples": 0}, "--samples=0: expected 1 to 1000 videos"),
        ({"dimensions": "colour"}, "--dimensions: VBench has no dimension 'colour'"),
        ({"dimensions": ""}, "--dimensions: VBench has no dimension ''"),
        ({"model": "nowhere"}, "nowhere: no such folder"),
        ({"suite": "vbench_i2v"}, "is a text-to-video model, but VBench-I2V gives first frames"),
        ({"height": 33}, "height is 33, expected a multiple of 16"),
        ({"num_frames": 4}, "num_frames is 4, expected 1 + a multiple of 4"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"guidance": 0.5}, "guidance is 0.5, expected at least 1"),
        ({"process_id": 2}, "--process_id and --num_processes: give both, or neither"),
        ({"suite-results": "a=b"}, "--checkout is for making clips; leave it out with --suite-results"),
    ],
)
def test_bad_input_is_one_line(run, models, checkout, tmp_path, options, message):
    output = tmp_path / "out"
    given = {"suite": "vbench", "checkout": checkout, "model": models["t2v"], "output": output, **options}
    code, _, error = run(**given)
    assert code == 2
    assert error.count("\n") == 1
    assert error.startswith("error: ") and message in error
    assert not output.exists()


def test_a_shape_or_a_flag_that_is_missing(run, models, checkout, tmp_path):
    options = {"suite": "vbench_i2v", "output": tmp_path / "out"}
    code, _, error = run(**options, checkout=checkout, model=models["i2v"], width=64)
    assert code == 2 and "clips of 32x64 (height x width), but VBench-I2V's images are 1-1, " in error
    code, _, error = run(**options, checkout=checkout)
    assert code == 2 and "--model is missing: give --checkout and --model" in error
    code, _, error = run("--suite-results=a=b", output=tmp_path)
    assert code == 2 and "the following arguments are required: --suite" in error
    (tmp_path / "file").touch()
    code, _, error = run(suite="vbench", output=tmp_path / "file")
    assert code == 2 and "is a file; name a folder" in error


def test_a_prompt_that_is_too_long_ends_it_before_the_first_clip(run, models, checkout, tmp_path):
    lines = ["a one"] * 4 + ["a one moves up and down " * 8]
    (mine := tmp_path / "mine.txt").write_text("\n".join([lines[4], *lines[:4]]))
    options = {"suite": "vbench", "checkout": checkout, "model": models["t2v"], "output": tmp_path / "out"}
    code, _, error = run(**options, augmented=mine, samples=1)
    assert code == 2 and "prompt too long: " in error and not names(tmp_path / "out")


def test_names_that_a_file_system_refuses(checkout, tmp_path):
    own = shutil.copytree(checkout, tmp_path / "own")
    info = own / SUITES["vbench"].info
    info.write_text(json.dumps([{"prompt_en": text, "dimension": ["color"]} for text in ("x" * 250, "a", "A")]))
    long, *both = (clip for p in read_prompts(SUITES["vbench"], own, "none", samples=1) for clip in p.clips)
    with pytest.raises(UserError, match=r"cannot hold a file named 'xxx+-0.mp4' \(File name too long\); the suite"):
        prepare(tmp_path / "out", [long])
    prepare(tmp_path / "out", both)
    (tmp_path / "out" / "UNFINISHED").mkdir()  # as if names of both cases were one
    with pytest.raises(UserError, match=r"'a-0.mp4' and 'A-0.mp4' are the same file there"):
        prepare(tmp_path / "out", both)


def test_time_left():
    pace = Pace(11)
    pace.done, pace.first, pace.begun = 3, 1, 100.0
    assert pace.line(120.0) == "3 of 11 clips; 10 s per clip; 0:01:20 left"
    pace.total = 1003
    assert pace.line(120.0).endswith("2:46:40 left")


def test_results(run, tmp_path):
    less = {name: [0.5, []] for name in I2V if name != "camera_motion"}
    rows = [
        f"--suite-results={name}={results(tmp_path / name, name, found)}"
        for name, found in (("teacher", {name: [score, []] for name, score in I2V.items()}), ("a student", less))
    ]
    code, text, error = run(*rows, suite="vbench_i2v", output=tmp_path / "out")
    assert not code, error
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    teacher, student = found["rows"]
    assert teacher["name"] == "teacher" and teacher["dimensions"] == I2V
    assert teacher["total"] == pytest.approx(0.8698062645, abs=1e-10)
    assert teacher["normalised"]["dynamic_degree"] == 0.5 and teacher["plain_mean"] == pytest.approx(0.8071591892)
    assert student["missing"] == ["camera_motion"] and student["plain_mean"] is None
    assert "86.98" in text and "80.72" in text
    assert "a student: no result for camera_motion: each counts as a score of 0, as in the suite's own scripts" in text
    for bad, message in (("x", "expected NAME=FILE or NAME=FOLDER"), (rows[0][16:], "two rows are named 'teacher'")):
        code, _, error = run(*rows, f"--suite-results={bad}", suite="vbench_i2v", output=tmp_path / "out")
        assert code == 2 and message in error
