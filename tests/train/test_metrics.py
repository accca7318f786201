"""Numbers of a run on disk, and what becomes of them when the disk fails."""

import io
import json
import sys

import pytest
from full_disk import limited
from tensorboard_events import events, scalars

from vpae_jax.train import metrics
from vpae_jax.train.metrics import MetricsLog, read_metrics
from vpae_jax.types import UserError

MANY = {name: 1.0 for name in "abcdefghijklmnopqrst"}  # which take more room in TensorBoard's files than in JSON


def logged(workdir, start, *steps):
    log = MetricsLog(workdir, start, 10)
    for step in steps:
        log.write(step, {"a/loss": 1.0 / step})
    log.close()


def steps(workdir):
    return [record["step"] for record in read_metrics(workdir)]


@pytest.fixture
def workdir(tmp_path):
    logged(tmp_path, 0, 1, 2, 3, 4)
    return tmp_path


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda raw: raw[:-5], [1, 2, 3]),
        (lambda raw: raw[:-1], [1, 2, 3]),
        (lambda raw: raw.replace(b'"step": 2', b'"st\xffp": 2'), [1, 3, 4]),
        (lambda raw: raw.replace(b'"step": 2', b'"step": x'), [1, 3, 4]),
        (lambda raw: raw.replace(b'{"step": 2', b"[" * 100_000), [1, 3, 4]),
        (lambda raw: raw.replace(b'"step": 2', b'"stop": 2'), [1, 3, 4]),
        (lambda raw: raw[:40] + bytes(len(raw) - 41) + b"\n", [1]),
        (lambda raw: bytes(len(raw)), []),
        (lambda raw: b"", []),
        (lambda raw: b"7\n[]\n\n" + raw, [1, 2, 3, 4]),
    ],
    ids=[
        "half a line",
        "no line end",
        "garbage",
        "no JSON",
        "too deep",
        "no step",
        "zeros",
        "all zeros",
        "empty",
        "other",
    ],
)
def test_lines_that_cannot_be_read_are_left_out_and_the_run_goes_on(workdir, damage, left):
    file = workdir / "metrics.jsonl"
    file.write_bytes(damage(file.read_bytes()))
    assert steps(workdir) == left
    logged(workdir, 3, 4, 5)
    assert steps(workdir) == [*(step for step in left if step <= 3), 4, 5]
    for line in file.read_text().splitlines():
        json.loads(line)


def test_how_many_lines_are_lost_is_said(workdir, capsys):
    file = workdir / "metrics.jsonl"
    file.write_bytes(b"\xff\n" + file.read_bytes() + b'{"step": 5')
    logged(workdir, 4)
    assert capsys.readouterr().out == f"{file}: dropped 1 line that cannot be read\n"


def test_tensorboards_files_hold_the_same(workdir):
    assert events(workdir)[0].file_version == "brain.Event:2"
    assert scalars(workdir) == [(step, "a/loss", pytest.approx(1 / step)) for step in (1, 2, 3, 4)]


def test_without_room_for_tensorboard_a_run_goes_on(tmp_path, capsys):
    (tmp_path / "tensorboard").touch()
    logged(tmp_path, 0, 1, 2)
    assert steps(tmp_path) == [1, 2]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"{tmp_path}/tensorboard: cannot be written: File exists; the run continues without TensorBoard's files"
    )
    assert [line.split("/")[0] for line in lines[1:]] == ["step 1", "step 2"]


def test_a_disk_that_gets_full_ends_tensorboard_first_and_then_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "FLUSH_SECONDS", -1.0)
    log, step = MetricsLog(tmp_path, 0, 100), 0
    with (
        limited(3000),
        pytest.raises(UserError, match=rf"^{tmp_path}/metrics.jsonl: cannot be written: File too large; make room"),
    ):
        while True:
            step += 1
            log.write(step, MANY)
    log.close()
    said = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("step ")]
    assert said == [
        f"{tmp_path}/tensorboard: cannot be written: File too large; the run continues without TensorBoard's files"
    ]
    assert step > 5 and steps(tmp_path) == list(range(1, step))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_tells_what_time_is_left_once_steps_have_been_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    log = MetricsLog(tmp_path, 0, 100)
    log.bar.mininterval = 0
    shown = []
    for step in range(1, 8):
        log.write(step, {"generator/loss": 0.5})
        log.advance()
        shown.append(sys.stderr.getvalue().split("\r")[-1])
    log.close()
    assert all(f"{step}/100" in line and "generator 0.5" in line for step, line in enumerate(shown, 1))
    assert not any("<" in line for line in shown[: metrics.MEASURED - 1])
    assert all("<" in line for line in shown[metrics.MEASURED - 1 :])


def test_what_is_compiled_is_no_part_of_the_time_that_steps_take(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    log, now = MetricsLog(tmp_path, 0, 100), [0.0]
    monkeypatch.setattr(log.bar, "_time", lambda: now[0])
    log.bar.start_t = log.bar.last_print_t = 0.0
    log.bar.mininterval = 0
    with log.first_time("compiling"):
        now[0] += 1000
    for _ in range(5):
        now[0] += 2
        log.advance()
    elapsed, rate = log.bar.format_dict["elapsed"], log.bar.format_dict["rate"]
    log.close()
    assert elapsed == pytest.approx(10) and rate == pytest.approx(0.5)


def test_scores_make_no_line_without_losses(tmp_path, capsys):
    log = MetricsLog(tmp_path, 0, 100)
    log.write(3, {"held_out/t2v/kvd": 5.0})
    log.write(4, {"generator/loss": 0.25, "seconds_per_step": 0.0})
    log.write(5, {"generator/loss": 0.125, "seconds_per_step": 1.5})
    log.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 4/100  generator 0.25",
        "step 5/100  generator 0.125  1.5 s/step",
    ]
    assert steps(tmp_path) == [3, 4, 5]
