"""`convert --push`: models and LoRA files on a hub that answers as the Hugging Face hub does."""

import json
import os
import shutil
import subprocess
import sys

import hub_server
import huggingface_hub
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import safe_open

from vpae_jax import cli, convert
from vpae_jax.convert import main
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.train import checksums
from vpae_jax.weights import hub as hub_client
from vpae_jax.weights.loading import read_part
from vpae_jax.weights.locate import embedded_model
from vpae_jax.weights.settings import Scheduler, read_scheduler

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=:DeprecationWarning",  # of the HTTP library, which the hub's client uses so
    "ignore::FutureWarning:diffusers",
    "ignore::DeprecationWarning:diffusers",
)
NAME = "me/student"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub, and a client of it that has nothing yet."""
    with hub_server.serving() as server:
        settings = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }
        for name, value in settings.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", server.token)
        huggingface_hub.utils.disable_progress_bars()
        yield server
        huggingface_hub.utils.enable_progress_bars()
        huggingface_hub.close_session()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """What a one-step run on the tiny model leaves: a generator, scores and previews."""
    folder = tmp_path_factory.mktemp("run")
    config = {"name": "phase1", "model": {"path": "tiny"}, "method": {"name": "vpae_phase1"}, "sample_shift": 3.0}
    (folder / "config.json").write_text(json.dumps(config))
    _, params = read_part(embedded_model(), "transformer")
    changed = {**params, "proj_out": {**params["proj_out"], "bias": params["proj_out"]["bias"] + 1}}
    state = {"step": jnp.int32(3), "params": {"generator": changed}, "averages": {}}
    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        manager.save(3, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
    written = folder / "checkpoints" / "3"
    checksums.write(written, [checksums.of_process(written, 0)])
    records = [{"step": step, "held_out/t2v/kvd": 9.0 / step, "held_out_clips": 4} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "previews").mkdir()
    for name in ("step_000001.png", "step_000002.png", "step_000002.mp4"):
        (folder / "previews" / name).write_bytes(name.encode())
    return folder


def run(*arguments):
    main([str(argument) for argument in arguments])


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        cli.run(main, [str(argument) for argument in arguments])
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def frames(model):
    return load_pipeline(model)("a three moves up", seed=0, steps=1)


def test_a_student_is_pushed_and_loads_from_there(hub, workdir, tmp_path):
    run(workdir, tmp_path / "out", "--format=diffusers", f"--push={NAME}", "--private")
    repo = hub.repos[NAME]
    local = {path.relative_to(tmp_path / "out").as_posix(): path for path in (tmp_path / "out").rglob("*")}
    files = {name: path.read_bytes() for name, path in local.items() if path.is_file()}
    assert repo.private and repo.files == {".gitattributes": repo.files[".gitattributes"], **files}
    card = files["README.md"].decode()
    for line in (
        'pipeline_tag: "image-to-video"',
        'library_name: "diffusers"',
        "| sampling | euler, 1 step, guidance 1, shift 3 |",
        "| timesteps | 1000 |",
        "| held-out t2v/kvd, step 2 | 4.5 |",
        "![samples/step_000002.png](samples/step_000002.png)",
        "[samples/step_000002.mp4](samples/step_000002.mp4)",
    ):
        assert line in card.splitlines(), line
    found = frames(NAME)
    np.testing.assert_array_equal(found, frames(tmp_path / "out"))
    assert np.abs(found.astype(int) - frames("tiny").astype(int)).max() > 8
    assert load_pipeline(NAME, with_transformer=False).scheduler == Scheduler("euler", 3.0, 1, 1.0)
    assert not list((tmp_path / "cache").rglob("*.mp4"))  # what is to be looked at is not fetched


LOAD = """
import diffusers, json
pipe = diffusers.DiffusionPipeline.from_pretrained("lab/tiny")
seen = diffusers.DiffusionPipeline.load_config("lab/tiny")
print(type(pipe).__name__, seen["_sampling"]["num_inference_steps"], pipe.scheduler.config["_num_inference_steps"])
"""


def test_programs_find_the_hub_by_their_environment(hub, tmp_path):
    """Ours pushes, and Diffusers, which knows nothing of it, loads."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    convert_it = ["-m", "vpae_jax.convert", "tiny", "out", "--format=diffusers", "--push=lab/tiny"]
    for command, expected in (
        (convert_it, f"uploading out to {hub.url}/lab/tiny"),
        (["-c", LOAD], "WanImageToVideoPipeline 50 50"),
    ):
        ended = subprocess.run(
            [sys.executable, *command], env={**os.environ, **settings}, cwd=tmp_path, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        assert expected in ended.stdout
        assert "_sampling" not in ended.stderr


@pytest.mark.parametrize("form", ["diffusers", "wan"])
def test_a_lora_is_pushed_with_a_card_of_its_own(hub, workdir, tmp_path, form):
    file = tmp_path / "student.safetensors"
    run(workdir, tmp_path / "model", "--format=diffusers")
    path = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    spoil(path)
    command = [tmp_path / "model", file, f"--format={form}", "--as-lora", "--rank=2", "--base=tiny"]
    run(*command, f"--push={NAME}")
    repo = hub.repos[NAME]
    more = {"student.workflow.json"} if form == "wan" else set()
    assert repo.files.keys() == {".gitattributes", "README.md", file.name, *more}
    assert repo.files[file.name] == file.read_bytes()
    card = repo.files["README.md"].decode().splitlines()
    expected = ["| sampling | euler, 1 step, guidance 1, shift 3 |", "| rank | 2 |", "| for | "]
    expected += ["Drag `student.workflow.json`" if form == "wan" else "pipe.scheduler = FlowMatchEulerDiscrete"]
    for start in expected:
        assert any(line.startswith(start) for line in card), start
    with safe_open(file, "np") as opened:
        told = opened.metadata()
    assert json.loads(told["sampling"])["timesteps"] == [1000.0] and told["task"] == "image-to-video"
    # Another one beside it; the same one again.
    other = tmp_path / "other.safetensors"
    run(command[0], other, *command[2:], f"--push={NAME}")
    run(*command, f"--push={NAME}")
    assert {file.name, other.name} < repo.files.keys()


def spoil(path):
    """Changes one linear layer of a transformer."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    name = "blocks.0.attn1.to_q.weight"
    tensors[name] = tensors[name] + tensors[name].dtype.type(0.1)
    save_file(tensors, path)


# An upload that failed.


@pytest.mark.parametrize("where", [("PUT", "/upload/"), ("POST", "/commit/")])
def test_a_failed_upload_is_made_up_for_by_the_same_command(hub, tmp_path, capsys, monkeypatch, where):
    out, command = tmp_path / "out", ["tiny", tmp_path / "out", "--format=diffusers"]
    hub.failing = where
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    message = fails(capsys, *command, f"--push={NAME}")
    assert (
        f"--push={NAME}: the hub says 500: Internal Error; {out} is complete, and the same command uploads" in message
    )
    assert frames(out).shape == (9, 48, 48, 3)
    hub.failing = None
    monkeypatch.setattr(convert, "read_model", None)  # nothing is converted
    run(*command, "--verify", f"--push={NAME}")
    assert "vae/config.json" in hub.repos[NAME].files
    np.testing.assert_array_equal(frames(NAME), frames(out))


def test_what_another_command_has_written_is_not_pushed(hub, tmp_path, capsys):
    out = tmp_path / "out"
    run("tiny", out, "--format=diffusers")
    message = fails(capsys, "tiny", out, "--format=diffusers", "--dtype=float32", f"--push={NAME}")
    assert f"{out}: exists, and was not written by this command; remove it or choose another" in message
    (out / "README.md").unlink()
    assert "was not written by this command" in fails(capsys, "tiny", out, "--format=diffusers", f"--push={NAME}")
    assert hub.requests == []


# What is there already.


def test_a_model_takes_the_place_of_an_earlier_one(hub, tmp_path):
    run("tiny", tmp_path / "a", "--format=wan", f"--push={NAME}")
    assert "Wan2.1_VAE.pth" in hub.repos[NAME].files
    run("tiny", tmp_path / "b", "--format=diffusers", f"--push={NAME}")
    files = hub.repos[NAME].files
    assert "model_index.json" in files and "Wan2.1_VAE.pth" not in files and ".gitattributes" in files
    run("tiny", tmp_path / "c", "--format=orbax", f"--push={NAME}")
    np.testing.assert_array_equal(frames(NAME), frames("tiny"))


def test_files_of_something_else_are_left_alone(hub, tmp_path, capsys):
    hub.repos[NAME] = hub_server.Repo(files={"README.md": b"#", "b.bin": b"1", "a.bin": b"2"})
    message = fails(capsys, "tiny", tmp_path / "out", "--format=diffusers", f"--push={NAME}")
    assert f"--push={NAME}: already holds a.bin and 1 more, which the upload would mix with" in message
    hub.repos["me/model"] = hub_server.Repo(files={"model_index.json": b"{}", "vpae_jax.json": b"{}"})
    lora = ["--as-lora", "--rank=2", "--base=tiny", "--format=wan", "--push=me/model"]
    assert "already holds model_index.json" in fails(capsys, "tiny", tmp_path / "x.safetensors", *lora)
    assert list(tmp_path.iterdir()) == []
    assert hub.repos[NAME].files.keys() == {"README.md", "b.bin", "a.bin"}


# What is refused before anything is computed.


@pytest.fixture
def refused(hub, tmp_path, capsys, monkeypatch):
    """Converts, which must not happen; the message."""
    monkeypatch.setattr(convert, "read_model", None)

    def call(name=NAME, *more, form="diffusers", out="out"):
        message = fails(capsys, "tiny", tmp_path / out, f"--format={form}", f"--push={name}", *more)
        assert not (tmp_path / out).exists() and "\n" not in message
        return message

    return call


@pytest.mark.parametrize(
    "name",
    ["student", "me/", "/student", "me/a/b", "me/a b", "me/a@main", "me/-a", "me/a--b", f"me/{'a' * 97}", "me/a.git"],
)
def test_a_name_that_is_none(refused, hub, name):
    assert f"--push={name}: expected OWNER/NAME" in refused(name)
    assert hub.requests == []


def test_no_token(refused, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "not logged in; run `hf auth login`, or set HF_TOKEN" in refused()


def test_a_token_that_is_none(refused, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "the token is not valid at http://127.0.0.1" in refused()


def test_a_token_that_may_only_read(refused, hub):
    hub.role = "read"
    assert "the token of me may only read; make another at http" in refused() and hub.repos == {}


def test_no_permission(refused, hub):
    assert "no permission to write there (You don't have the rights to create" in refused("other/student")
    hub.repos["other/student"] = hub_server.Repo()
    assert "no permission to write there (Forbidden: you must use a write token" in refused("other/student")
    hub.refused = ("POST", "/preupload/")
    assert "no permission to write there" in refused()


def test_no_network(refused, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached (" in refused()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE keeps this process from the hub; unset it" in refused()


def test_options_that_do_not_go_together(refused, capsys, tmp_path):
    assert "--push: leave it out with --format=self_forcing" in refused(form="self_forcing", out="x.pt")
    message = fails(capsys, "tiny", tmp_path / "out", "--format=diffusers", "--private")
    assert "--private: only with --push=OWNER/NAME" in message


def test_hidden_files_are_not_uploaded(tmp_path):
    for name in ("a/b.json", "a/.b", ".git/config", "c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert hub_client.files_of(tmp_path) == ["a/b.json", "c.txt"]


def test_a_copy_of_it_can_be_read_back(hub, tmp_path):
    """A folder that the hub's client has fetched is a model directory like any other."""
    run("tiny", tmp_path / "out", "--format=diffusers", f"--push={NAME}")
    fetched = huggingface_hub.snapshot_download(NAME, local_dir=tmp_path / "fetched")
    shutil.rmtree(tmp_path / "fetched" / ".cache", ignore_errors=True)
    assert read_scheduler(tmp_path / "fetched") == read_scheduler(tmp_path / "out") and fetched
