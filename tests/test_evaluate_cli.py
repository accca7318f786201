"""`python -m vpae_jax.evaluate`: scores, samples and a page from model directories; one line for bad input."""

import json
from functools import partial

import numpy as np
import pytest

from vpae_jax import evaluate
from vpae_jax.tasks.digits.scores import METRICS


@pytest.fixture
def run(program):
    return partial(program, evaluate.main)


def test_compares_models_and_leaves_everything_behind(run, tmp_path):
    output = tmp_path / "out"
    options = {"model": "tiny", "steps": 1, "guidance": 1, "count": 16, "devices": 1, "output": output}
    code, text, error = run("--compare=a friend=tiny:2:3.0", **options)
    assert not code, error
    assert {path.name for path in output.iterdir()} == {"clips", "metrics.json", "report.html", "samples"}
    found = json.loads((output / "metrics.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert [(name, row["evaluations"]) for name, row in rows.items()] == [
        ("teacher", 1),
        ("a friend", 4),
    ]
    names = {metric.name for metric in METRICS}
    for row in rows.values():
        assert set(row["i2v"]) == names
        assert set(row["t2v"]) == names - {"psnr_first"}
        assert np.isfinite([*row["t2v"].values(), *row["i2v"].values()]).all()
    assert set(found["real"]["i2v"]) == names - {"diversity"}
    assert rows["teacher"]["t2v"]["kvd"] != rows["a friend"]["t2v"]["kvd"]
    assert len(list((output / "samples").iterdir())) == 3 * 2 * 2
    assert "a friend" in text and "kvd" in text
    assert "a friend" in (output / "report.html").read_text()


@pytest.mark.parametrize(
    ("more", "options", "message"),
    [
        ((), {"count": 3}, "count is 3: scores need at least 16 clips"),
        ((), {"model": "nowhere"}, "nowhere: no such folder"),
        ((), {"steps": 0}, "steps is 0, expected at least 1"),
        ((), {"steps": "4,0"}, "steps is 0, expected at least 1"),
        ((), {"steps": "4,1"}, "steps is 4,1, but this model is not causal"),
        (("--compare=x=tiny:4,1:1",), {}, "steps is 4,1, but this model is not causal"),
        ((), {"guidance": 0.5}, "guidance is 0.5, expected at least 1"),
        ((), {"batch": 0}, "--batch=0"),
        ((), {"images": "x"}, "--images holds the first frames of --prompts=FILE; give both, or leave it out"),
        (("--run=x=nowhere",), {}, "nowhere contains no run"),
        ((), {"phase1": "nowhere"}, "nowhere contains no run"),
        ((), {"task": "video"}, "no phase was trained on records; give some with --records=DIR"),
        ((), {"task": "digits", "records": "x"}, "--task=digits renders its clips; leave --records out"),
        (("--compare=teacher=tiny:1:1",), {}, "two rows are named 'teacher'"),
        (("--compare=x=tiny:1:1:magic",), {}, "solver is 'magic'"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, more, options, message):
    output = tmp_path / "out"
    code, _, error = run(*more, **{"count": 16, "output": output, **options})
    assert code == 2
    assert error.count("\n") == 1
    assert error.startswith("error: ") and message in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("decision", "names"),
    [
        ({"kept": True, "reason": "it fell"}, ["phase 2", "phase 2, four steps"]),
        ({"kept": False, "reason": "it rose"}, ["start of phase 2", "start of phase 2, four steps"]),
        ({}, ["phase 2", "phase 2, four steps"]),
    ],
)
def test_what_a_phase_leaves_that_was_turned_down_is_called_what_it_is(tmp_path, decision, names):
    (tmp_path / "config.json").write_text(json.dumps({"guard": {"enabled": True}}))
    (tmp_path / "guard.json").write_text(json.dumps({"scores": {}, **decision}))
    given = evaluate.parser().parse_args([f"--phase2={tmp_path}", "--output=out"])
    rows = evaluate.entries(given)
    assert [row.name for row in rows] == ["teacher", "teacher, one step", *names]
    assert evaluate.read_run("phase 2", tmp_path).note == (f"Guard: {decision['reason']}." if decision else "")
    given = evaluate.parser().parse_args([f"--run=mine={tmp_path}:4:1", "--output=out"])
    assert [row.name for row in evaluate.entries(given)][2:] == [names[0].replace("phase 2", "mine")]
