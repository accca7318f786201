"""Both phases on the embedded model, from config to a directory that Diffusers loads."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpae_jax import cli, convert, tasks
from vpae_jax.config import parse
from vpae_jax.configs import encoders, phase1, phase2, teacher, vae
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.media import read_image
from vpae_jax.methods import make_method
from vpae_jax.run import experiment, previews
from vpae_jax.run.first_weights import previous_moment, read_previous, remember, remembered
from vpae_jax.tasks.digits.clips import MovingDigits
from vpae_jax.train.checkpoint import read_state
from vpae_jax.train.metrics import read_metrics
from vpae_jax.train.newest import FOLDER, Moment
from vpae_jax.types import Note, UserError

ROOT = Path(__file__).parents[2]
PHASES = ("phase1", "phase2")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def run(config, folder, devices=1):
    """On few devices: eight would only compile longer."""
    experiment.run(config, folder, jax.devices()[:devices])


def small(module, **changes):
    """A config that runs two steps on few clips."""
    config = module.get_config()
    config.steps, config.checkpoint_every, config.log_every, config.sample_every = 2, 1, 1, 2
    config.sample_steps = 2
    config.batch_size, config.data.clips, config.score_clips, config.score_every = 8, 16, 8, 0
    for name, value in changes.items():
        config[name] = value
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A folder in which both phases were run, the second on another number of devices."""
    folder = tmp_path_factory.mktemp("runs")
    run(parse(small(phase1)), folder / "phase1")
    config = small(phase2, sample_every=0)
    config.method.disc_warmup = 0
    run(parse(config), folder / "phase2", devices=2)
    return folder


@pytest.mark.parametrize(
    "phase, trained", [("phase1", {"generator", "fake_score"}), ("phase2", {"generator", "heads"})]
)
def test_a_phase_trains_its_roles_and_nothing_else(workdir, phase, trained):
    state = read_state(workdir / phase, items=("step", "params", "opt", "averages"))
    assert int(state["step"]) == 2
    assert set(state["params"]) == set(state["opt"]) == trained
    assert set(state["averages"]) == {"generator_ema"}
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state["params"]))
    records = read_metrics(workdir / phase)
    steps = [r for r in records if "generator/loss" in r]
    assert [r["step"] for r in steps] == [1, 2]
    for role in trained:
        assert {f"{role}/grad_norm", f"{role}/update_norm", f"{role}/param_norm"} <= set(steps[0])


def test_term_gradients_and_drift_are_recorded(workdir):
    names = set(read_metrics(workdir / "phase2")[1])
    assert {"generator/adv_grad", "generator/csds_grad", "generator/adv_csds_ratio", "heads/accuracy"} <= names
    assert {"generator/x0_mean_drift", "generator/x0_std_ratio"} <= names
    assert "generator/dmd_grad" in read_metrics(workdir / "phase1")[1]


def test_the_adapters_are_the_only_trained_part_of_the_fake_score(workdir):
    adapters = read_state(workdir / "phase1")["params"]["fake_score"]
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(adapters)}
    assert names == {"lora_a", "lora_b"}


def test_phase_two_starts_from_phase_ones_average(workdir):
    guard = json.loads((workdir / "phase2" / "guard.json").read_text())
    assert set(guard["scores"]) == {"0", "2"}
    scored = {phase: [r["step"] for r in read_metrics(workdir / phase) if "held_out_clips" in r] for phase in PHASES}
    assert scored == {"phase1": [], "phase2": [0, 2]}, "what the guard needs, and no more"
    assert json.loads((workdir / "phase2" / "start.json").read_text()) == {"previous_step": 2}
    start = read_state(workdir / "phase1")["averages"]["generator_ema"]
    end = read_state(workdir / "phase2")["params"]["generator"]
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (start, end)), strict=True)]
    # Two steps of Adam move no weight by more than twice its step size.
    assert 0 < max(moved) <= 2.1 * phase2.get_config().optimizers.generator.learning_rate


def test_previews_show_data_teacher_generator_and_average(workdir):
    folder = workdir / "phase1" / "previews"
    assert {p.name for p in folder.iterdir()} == {
        f"step_{step:06d}.{kind}" for step in (0, 2) for kind in ("mp4", "png")
    }
    rows = [read_image(folder / f"step_{step:06d}.png") for step in (0, 2)]
    rows = np.stack([[sheet[top : top + 48] for top in range(0, len(sheet), 49)] for sheet in rows])
    assert rows.shape[:2] == (2, 4), "data, teacher, generator, average"
    clip = MovingDigits("eval", 2 * previews.CLIPS, 7)[0]["video"]
    np.testing.assert_array_equal(rows[0, 0, :, :48], clip[0])
    np.testing.assert_array_equal(rows[0, :2], rows[1, :2], err_msg="data and teacher stay")
    np.testing.assert_array_equal(rows[0, 2], rows[0, 3], err_msg="the average starts at the weights")
    assert (rows[1, 2] != rows[0, 2]).any() and (rows[1, 2] != rows[1, 3]).any()
    assert not (workdir / "phase2" / "previews").exists(), "none were asked for"


def test_the_student_in_diffusers_makes_the_same_clip_in_one_step(workdir):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    folder = workdir / "phase2" / "model"
    pipe = load_pipeline(folder)
    condition = pipe.condition(["a three moves up"], np.zeros((1, 48, 48, 3), np.uint8))
    noise = jax.random.normal(jax.random.key(0), pipe.latent_shape(1))
    ours = pipe.sample(noise, condition)
    theirs = diffusers.WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").eval()

    def first(x):
        return torch.from_numpy(np.array(jnp.moveaxis(x, -1, 1)))

    text = torch.zeros(1, 512, condition.text.shape[-1])
    text[:, : condition.text.shape[1]] = torch.from_numpy(np.array(condition.text))
    with torch.no_grad():
        v = theirs(
            torch.cat([first(noise), first(condition.frames)], 1),
            torch.tensor([1000.0]),
            text,
            torch.from_numpy(np.array(condition.image)),
            return_dict=False,
        )[0]
    np.testing.assert_allclose(np.array(first(noise) - v), np.array(first(ours)), atol=1e-4)


def test_a_failed_phase_exports_the_weights_it_started_from(workdir, tmp_path):
    config = small(phase2, sample_every=0)
    config.previous.workdir = str(workdir / "phase1")
    config.method.disc_warmup = 0
    config.optimizers.generator.learning_rate = 0.3  # ruins the generator, and its average with it
    config.method.ema = 0.1
    run(parse(config), tmp_path / "phase2", devices=2)
    decided = json.loads((tmp_path / "phase2" / "guard.json").read_text())
    assert not decided["kept"] and decided["after"] > decided["before"] > decided["floor"]
    assert decided["reason"].endswith("the weights that it started from are kept")
    assert {"t2v/kvd", "i2v/psnr_first", "t2v/diversity"} <= set(decided["scores"]["2"])
    student = load_pipeline(tmp_path / "phase2" / "model")
    start = load_pipeline(workdir / "phase1" / "model")
    for prompt in ("a three moves up",):
        np.testing.assert_array_equal(student(prompt, seed=3), start(prompt, seed=3))


def test_a_failed_phase_goes_back_to_the_very_step_that_it_started_from(workdir):
    experiment_ = parse(small(phase2))
    for step in (Moment(1), Moment(2)):
        expected = read_state(workdir / "phase1", step)["averages"]["generator_ema"]
        like = jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), expected)
        assert previous_moment(experiment_, workdir / "phase2", step) == step
        found = read_previous(experiment_, workdir / "phase2", "generator", like, step)
        assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True))
    with pytest.raises(UserError, match=r"no checkpoint of step 7 in .*, the newest is of step 2"):
        previous_moment(experiment_, workdir / "phase2", Moment(7))


def test_a_start_within_a_step_is_remembered(tmp_path):
    assert remembered(tmp_path) is None
    for moment, kept in ((Moment(2), 2), (Moment(2, 3), "2+3")):
        remember(tmp_path, moment)
        assert json.loads((tmp_path / "start.json").read_text()) == {"previous_step": kept}
        assert remembered(tmp_path) == moment


def test_a_phase_starts_from_the_newest_whole_checkpoint_of_the_one_before(workdir, tmp_path):
    shutil.copytree(workdir / "phase1" / FOLDER, tmp_path / "phase1" / FOLDER)
    newest = tmp_path / "phase1" / FOLDER / "2"
    (newest / "state" / "manifest.ocdbt").write_bytes(b"")
    experiment_ = parse(small(phase2))
    with pytest.warns(Note, match=r"/checkpoints/2 is damaged \(state/manifest.ocdbt has 0 bytes.*of step 1 is used"):
        assert previous_moment(experiment_, tmp_path / "phase2") == Moment(1)
    assert newest.is_dir(), "another run's folder is left alone"
    with pytest.raises(UserError, match=r"phase1/checkpoints/2 is damaged .*, but required; copy it here again"):
        previous_moment(experiment_, tmp_path / "phase2", Moment(2))


def test_convert_reads_the_newest_whole_checkpoint(workdir, tmp_path, capsys):
    run_ = Path(shutil.copytree(workdir / "phase1", tmp_path / "phase1"))
    cli.run(convert.main, [str(run_), str(tmp_path / "whole"), "--format=diffusers"])
    shutil.rmtree(run_ / FOLDER / "2" / "state")
    cli.run(convert.main, [str(run_), str(tmp_path / "older"), "--format=diffusers"])
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert any("checkpoints/2 is damaged (" in note and "of step 1 is used instead" in note for note in notes), notes
    files = [tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors" for name in ("whole", "older")]
    assert files[0].read_bytes() != files[1].read_bytes()
    shutil.rmtree(run_ / FOLDER / "1" / "state")
    with pytest.raises(SystemExit) as caught:
        cli.run(convert.main, [str(run_), str(tmp_path / "none"), "--format=diffusers"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert caught.value.code == 2 and "no checkpoint is intact: 2 (" in line and not (tmp_path / "none").exists()


@pytest.mark.long
def test_a_run_killed_while_it_scored_is_finished_later_without_the_phase_before(workdir, tmp_path):
    """All steps are done and in a checkpoint; only the last score and the model directory are missing."""
    shutil.copytree(workdir / "phase2", tmp_path / "phase2")
    shutil.rmtree(tmp_path / "phase2" / "model")
    whole = json.loads((tmp_path / "phase2" / "guard.json").read_text())
    (tmp_path / "phase2" / "guard.json").unlink()
    first, *others = read_metrics(workdir / "phase2")
    worse = {n: v + 1e6 if n.startswith("held_out/") else v for n, v in first.items()}  # so the last weights are kept
    kept = [worse, *(record for record in others if "held_out_clips" not in record)]
    file = tmp_path / "phase2" / "metrics.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in kept))
    config = small(phase2)
    config.method.disc_warmup = 0
    run(parse(config), tmp_path / "phase2", devices=2)
    found = json.loads((tmp_path / "phase2" / "guard.json").read_text())
    assert found["kept"] and found["scores"].keys() == whole["scores"].keys()
    assert [r["step"] for r in read_metrics(tmp_path / "phase2") if "held_out_clips" in r] == [0, 2]
    assert load_pipeline(tmp_path / "phase2" / "model").takes_image


def test_why_there_is_no_guard_is_said_in_a_line(tmp_path, capsys):
    config = small(phase1)

    def made():
        parsed = parse(config)
        task = tasks.open_task(parsed.data, tmp_path, "tiny", parsed.method)
        return experiment.make_scorer(parsed, make_method(parsed.method), None, tmp_path, task, None)

    assert made() == (None, None)
    line = capsys.readouterr().out
    assert line.startswith("guard: off, because the student starts from a teacher") and line.count("\n") == 1
    config.guard.enabled = False
    assert made() == (None, None)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 17}, r"config.batch_size is 17, but config.data.clips is 16"),
        ({"steps": 50}, r"config.steps is 50, but the generator is only trained from step 50 on"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_anything_is_written(tmp_path, change, message):
    config = small(phase2, **change)
    config.method.disc_warmup = 50 if "steps" in change else 0
    with pytest.raises(UserError, match=message):
        run(parse(config), tmp_path / "phase2")
    assert list(tmp_path.iterdir()) == []


def test_a_phase_without_the_one_before_is_told_how_to_make_it(tmp_path):
    config = small(phase2)
    config.method.disc_warmup = 0
    with pytest.raises(
        UserError, match=r"no checkpoint in .*phase1; run: python -m vpae_jax.main --config=configs/phase1"
    ):
        run(parse(config), tmp_path / "phase2")
    config.previous.workdir = ""
    with pytest.raises(UserError, match=r"config.previous.workdir is empty"):
        run(parse(config), tmp_path / "phase2")
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_of_another_config_is_refused_and_left_alone(workdir):
    before = {p: p.stat().st_mtime_ns for p in (workdir / "phase1").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"belongs to another config: method.fake_updates is 2 there, 3 here"):
        config = small(phase1)
        config.method.fake_updates = 3
        run(parse(config), workdir / "phase1")
    assert before == {p: p.stat().st_mtime_ns for p in (workdir / "phase1").rglob("*") if p.is_file()}


@pytest.mark.long
def test_the_three_trainings_behind_the_tiny_model_hand_a_directory_on(tmp_path):
    for module in (vae, encoders, teacher):
        config = small(module, sample_every=0)
        config.data.clips = 1024 if module is not teacher else 16
        run(parse(config), tmp_path / config.name)
    made = load_pipeline(tmp_path / "teacher" / "model")
    assert made("a three moves up", steps=2, guidance=2.0).shape == (9, 48, 48, 3)
    first, second = (load_pipeline(tmp_path / name / "model") for name in ("vae", "encoders"))
    trained, *handed_on = (np.asarray(p.vae.decoder.conv_in.kernel[...]) for p in (first, second, made))
    for kernel in handed_on:
        np.testing.assert_array_equal(kernel, trained)


@pytest.mark.long
def test_a_killed_phase_ends_with_the_same_bits(workdir, tmp_path):
    """kill -9 in the middle, twice; the same command again, to the same weights."""
    options = [
        *("--config.steps=12", "--config.checkpoint_every=3", "--config.log_every=1", "--config.sample_every=0"),
        *("--config.batch_size=8", "--config.data.clips=16", "--config.guard.enabled=False"),
        "--config.method.disc_warmup=2",
        f"--config.previous.workdir={workdir / 'phase1'}",
    ]

    def command(name):
        arguments = ["--config=configs/phase2.py", *options, f"--workdir={tmp_path / name}"]
        return [sys.executable, "-m", "vpae_jax.main", *arguments]

    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run(command("whole"), cwd=ROOT, env=environment, check=True, capture_output=True)
    for step in (4, 8):
        process = subprocess.Popen(command("cut"), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        while not any(r["step"] >= step for r in read_metrics(tmp_path / "cut")):
            assert process.poll() is None, "ended before it was killed"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command("cut"), cwd=ROOT, env=environment, check=True, capture_output=True)
    whole, cut = (read_state(tmp_path / name, items=("params", "averages", "opt")) for name in ("whole", "cut"))
    for name in ("params", "averages", "opt"):
        for a, b in zip(jax.tree.leaves(whole[name]), jax.tree.leaves(cut[name]), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
