"""A workdir lets one run in at a time, and always the same config."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vpae_jax.config import Experiment, parse
from vpae_jax.configs import phase1
from vpae_jax.run import experiment, workdir
from vpae_jax.run.workdir import FREE, FREE_DATA, LOCK, Lock, claim, read_run, require_config, write_config
from vpae_jax.types import UserError

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from vpae_jax.run.workdir import Lock
with Lock(Path(sys.argv[1])) as lock:
    lock.take()
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a workdir."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_in_a_workdir_is_told_who_works_there(holder, tmp_path):
    before = (tmp_path / LOCK).read_text()
    with pytest.raises(UserError) as caught:
        experiment.run(parse(phase1.get_config()), tmp_path)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}: in use by another run: process {holder.pid} on {socket.gethostname()} since ")
    assert f"according to {tmp_path / LOCK}" in line and "\n" not in line
    assert [path.name for path in tmp_path.iterdir()] == [LOCK] and (tmp_path / LOCK).read_text() == before


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None], ids=["killed", "terminated", "ended"])
def test_the_lock_ends_with_its_process(end, holder, tmp_path):
    if end is None:
        holder.stdin.close()
    else:
        holder.send_signal(end)
    holder.wait()
    with Lock(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")


def test_one_run_after_the_other_has_the_lock(tmp_path):
    for _ in range(2):
        with Lock(tmp_path) as lock:
            assert lock.take() == lock.take() == (tmp_path / LOCK).read_text()


def test_a_folder_that_is_not_there_is_made_when_the_lock_is_taken(tmp_path):
    with Lock(tmp_path / "run") as lock:
        assert not (tmp_path / "run").exists()
        lock.take()
        with Lock(tmp_path / "other"), pytest.raises(UserError, match="in use by another run"):
            Lock(tmp_path / "run").take()
    assert not (tmp_path / "other").exists()


def test_a_file_system_without_locks_lets_a_run_in_and_says_so(tmp_path, monkeypatch, capsys):
    def refused(descriptor, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(workdir.fcntl, "flock", refused)
    with Lock(tmp_path) as lock:
        assert lock.take().startswith(f"process {os.getpid()}")
    said = capsys.readouterr().out
    assert said.startswith(
        f"{tmp_path / LOCK}: cannot be locked here (Operation not supported); make sure that no other"
    )
    assert said.count("\n") == 1


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run/run.lock: cannot be written: Not a directory"):
        Lock(tmp_path / "file" / "run").take()


def config(**changes) -> Experiment:
    return dataclasses.replace(parse(phase1.get_config()), **changes)


def tie(folder: Path, given: Experiment) -> None:
    with Lock(folder) as lock:
        claim(given, folder, lock)


def test_a_workdir_belongs_to_one_config(tmp_path):
    tie(tmp_path, config())
    tie(tmp_path, config(steps=7))
    for check in (tie, require_config):
        with pytest.raises(UserError, match=r"belongs to another config: sample_shift is 1.0 there, 2.0 here; choose"):
            check(tmp_path, config(sample_shift=2.0))
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 7


def test_single_keys_may_be_free_within_a_part(tmp_path):
    data = config().data
    tie(tmp_path, config())
    tie(tmp_path, config(data=dataclasses.replace(data, workers=3)))
    with pytest.raises(UserError, match=r"data.seed is 0 there, 1 here"):
        tie(tmp_path, config(data=dataclasses.replace(data, seed=1)))


def test_a_workdir_of_a_version_whose_guard_had_more_keys_goes_on(tmp_path):
    """And without the ones that have come since."""
    tie(tmp_path, config())
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    guard = {**written["guard"], "clips": 128, "every": 200}
    older = {**{key: value for key, value in written.items() if not key.startswith("score_")}, "guard": guard}
    assert len(older) < len(written)
    file.write_text(json.dumps(older))
    assert read_run(tmp_path).guard == guard
    tie(tmp_path, config(score_every=100))
    found = json.loads(file.read_text())
    assert found["guard"] == written["guard"] and found["score_every"] == 100


def test_free_keys_are_keys(tmp_path):
    known = dataclasses.asdict(config())
    assert all(key in known for key in FREE)
    assert all(key.partition(".")[2] in known["data"] for key in FREE_DATA)


@pytest.mark.parametrize("damage", [b"", b'{"steps": 1', b'{"ste\xffps": 1}', b"\0" * 100, b"[]", b"7"])
def test_a_config_that_cannot_be_read_is_put_aside(damage, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes(damage)
    require_config(tmp_path, config())
    assert (tmp_path / "config.json").read_bytes() == damage, "a look changes nothing"
    tie(tmp_path, config())
    assert (tmp_path / "damaged-config.json").read_bytes() == damage
    assert json.loads((tmp_path / "config.json").read_text())["name"] == "phase1"
    said = capsys.readouterr().out
    name = "damaged-config.json; the run continues with the given config"
    assert said == f"{tmp_path}/config.json cannot be read and was renamed to {name}\n"


def test_a_config_is_written_as_it_was(tmp_path):
    write_config(tmp_path, config())
    require_config(tmp_path, config())
    before = (tmp_path / "config.json").read_bytes()
    write_config(tmp_path, config())
    assert (tmp_path / "config.json").read_bytes() == before
