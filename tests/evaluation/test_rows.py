"""Rows of an evaluation: what the flags name, what they are asked for, and what is said of each."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from vpae_jax.evaluation.rows import Entry, parse_entry, parse_lora, parse_run
from vpae_jax.types import UserError
from vpae_jax.weights.extraction import extract
from vpae_jax.weights.find import find_model
from vpae_jax.weights.loading import read_part
from vpae_jax.weights.lora import write_lora
from vpae_jax.weights.writing import from_tree


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=b", Entry("a", "b")),
        ("a=b:1:1", Entry("a", "b", 1, 1.0)),
        ("a=b:4,1:1", Entry("a", "b", (4, 1), 1.0)),
        ("my model=runs/x/model:4:2.5:unipc", Entry("my model", "runs/x/model", 4, 2.5, "unipc")),
    ],
)
def test_parse_entry(text, expected):
    assert parse_entry(text) == expected


@pytest.mark.parametrize("text", ["b:1:1", "a=b:1", "a=b:one:1", "a=b:1,2,3:1", "a=b:1:1:euler:2"])
def test_parse_entry_refuses(text):
    with pytest.raises(UserError, match="expected NAME=DIR, NAME=DIR:STEPS:GUIDANCE or "):
        parse_entry(text)


def test_a_run_is_its_model_and_a_lora_file_a_change_of_one(tmp_path):
    assert parse_run("a=runs/x:4:1") == (Entry("a", "runs/x/model", 4, 1.0), Path("runs/x"))
    with pytest.raises(UserError, match=r"^--run='runs/x': expected NAME=WORKDIR, NAME=WORKDIR:STEPS:GUIDANCE or"):
        parse_run("runs/x")
    file = tmp_path / "lora.safetensors"
    file.touch()
    assert parse_lora(f"a={file}:1:1", "tiny") == Entry("a", "tiny", 1, 1.0, None, file)
    with pytest.raises(UserError, match=r"nothing.safetensors: no such file"):
        parse_lora(f"a={tmp_path / 'nothing.safetensors'}", "tiny")


def test_a_row_is_sampled_as_its_folder_says_where_the_flags_do_not():
    tiny = find_model("tiny")
    own = Entry("a", "tiny").sampler(tiny)
    assert (own.steps, own.guidance, own.evaluations) == (50, 4.0, 100)
    assert Entry("a", "tiny", 4, 1.0).sampler(tiny).evaluations == 4


@pytest.fixture(scope="module")
def workdir(models, tmp_path_factory):
    """What a run leaves: its student, its config and its curves."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(models["t2v"], folder / "model")
    (folder / "config.json").write_text(json.dumps({"name": "kd", "seed": 17, "guard": {"enabled": False}}))
    lines = [{"step": step, "generator/loss": 1 / step} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def lora(models, tmp_path_factory):
    """A LoRA file that changes every layer."""
    config, params = read_part(models["t2v"], "transformer")
    draw = np.random.default_rng(0).standard_normal
    changed = jax.tree.map(lambda x: np.asarray(x) + 0.1 * draw(x.shape, np.float32), params)
    teacher, student = (from_tree("transformer", config, tree) for tree in (params, changed))
    file = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    write_lora(file, extract(student, teacher, 4).lora, "diffusers")
    return file


@pytest.fixture(scope="module")
def whole(run, workdir, lora, tmp_path_factory):
    output = tmp_path_factory.mktemp("rows") / "out"
    run(output, f"--run=my run={workdir}", f"--lora=changed={lora}:2:1")
    return output


def test_the_first_row_stands_for_real_clips_where_prompts_have_none(rows, whole):
    found = json.loads((whole / "metrics.json").read_text())
    assert found["real"] is None and found["clips_a_half"] == 8
    first, naive, same, changed = rows(whole).values()
    assert [row["name"] for row in (first, naive, same, changed)] == [
        "teacher",
        "teacher, one step",
        "my run",
        "changed",
    ]
    for row in (naive, same, changed):
        assert row["t2v"].keys() == first["t2v"].keys() | {"kvd"} and "kvd" in row["intervals"]["t2v"]
    assert "kvd" not in first["t2v"] and [first["t2v"][name] for name in ("sharpness", "motion")] == pytest.approx(
        [1, 1]
    )
    assert same["t2v"]["latent_mean"] == 0 and same["t2v"]["kvd"] < min(naive["t2v"]["kvd"], changed["t2v"]["kvd"])
    assert changed["t2v"]["latent_mean"] > 0 and changed["lora"].endswith("lora.safetensors")


def test_where_the_time_goes_is_told_of_every_row(rows, whole):
    for row in rows(whole).values():
        assert row["times"].keys() >= {
            f"{stage}_seconds"
            for stage in ("text", "network", "evaluation", "decode", "transfer", "write", "first_call", "whole")
        }
        assert row["times"]["network_seconds"] == pytest.approx(row["evaluations"] * row["times"]["evaluation_seconds"])
        assert row["times"]["peak_memory_bytes"] > 2**26


def test_the_report_shows_the_run(whole):
    page = (whole / "report.html").read_text()
    assert "my run" in page and "Where the time goes" in page
    assert "a three moves up" in page


def test_first_frames_that_are_given(run, rows, models, prompts, tmp_path):
    run(tmp_path / "out", model=models["i2v"], images=prompts[1], steps=1, guidance=1)
    (found,) = rows(tmp_path / "out").values()
    assert found.keys() >= {"i2v"} and "t2v" not in found
    assert 0 < found["i2v"]["psnr_first"] < 60 and len(found["curves"]["i2v"]["color_distance"]) == 5
    assert found["times"].keys() >= {"image_seconds", "first_frame_seconds"}


def test_an_image_to_video_model_makes_prompts_without_pictures_from_text(run, rows, models, tmp_path):
    run(tmp_path / "out", model=models["i2v"], steps=1, guidance=1, count=8)
    (found,) = rows(tmp_path / "out").values()
    assert "t2v" in found and "i2v" not in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"records": "x"}, r"^--records and --prompts both choose what to evaluate on; leave one of them out"),
        ({"task": "video"}, r"^--task and --prompts both choose what to evaluate on"),
        ({"images": "given"}, r"^--images: .* is a text-to-video model; leave it out"),
        ({"devices": 9}, r"^--devices=9: this process has 8; give a number from 1 to 8"),
        ({"num_processes": 2}, r"^--process_id and --num_processes: give both, or neither"),
    ],
)
def test_what_cannot_be_asked_for(run, prompts, tmp_path, options, message):
    if options.get("images"):
        options = {"images": prompts[1]}
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", **options)
    assert not (tmp_path / "out" / "clips").exists()


def test_a_row_is_made_in_two_batches_so_that_its_time_is_known(run, rows, tmp_path):
    """Where no size of a batch was asked for."""
    run(tmp_path / "out", steps=1, guidance=1, batch=None)
    (found,) = rows(tmp_path / "out").values()
    assert found["times"].keys() >= {"network_seconds", "decode_seconds", "whole_seconds", "first_call_seconds"}
