"""Real processes on this machine: the same training whatever their number, and none that outlives another."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from record_files import SMALL, write_folder
from running import HANGS, finish, run, started, wait_for_step, wait_until

from vpae_jax.runtime import preemption, processes
from vpae_jax.train.checkpoint import read_state
from vpae_jax.train.metrics import read_metrics
from vpae_jax.train.newest import FOLDER, Moment, latest

STEPS = 10
AGREEING = Path(__file__).with_name("agreeing.py")
CLIPS = {"one": range(8), "copy": range(8), "other": range(9)}
LONG = 100_000  # steps of a run that only a signal ends


def records(workdir: Path) -> list[dict[str, float]]:
    timing = ("seconds_per_step", "data_wait", "bad_records")
    return [{k: v for k, v in record.items() if k not in timing} for record in read_metrics(workdir)]


def weights(workdir: Path, step: Moment | None = None) -> list[np.ndarray]:
    return jax.tree.leaves(read_state(workdir, step, items=("params", "opt", "averages")))


def same_bits(one: Path, other: Path, step: Moment | None = None) -> bool:
    pairs = zip(weights(one, step), weights(other, step), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def close(one: Path, other: Path) -> None:
    for a, b in zip(records(one), records(other), strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-7)
    for a, b in zip(weights(one), weights(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """An uninterrupted run: one process with two devices."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    run(1, workdir, STEPS, "fsdp", 0, devices=2)
    return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """An uninterrupted run: two processes with a device each."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    run(2, workdir, STEPS, "fsdp", 0)
    return workdir


def test_two_processes_train_as_one_does_bit_for_bit(one, two):
    """A sum of two numbers has only one order."""
    assert len(records(one)) == STEPS
    assert records(one) == records(two)
    assert same_bits(one, two)
    assert len({record["vae/seen"] for record in records(one)}) == STEPS, "every batch is another one"


@pytest.mark.long
def test_four_processes_train_as_one_does(one, tmp_path):
    run(4, tmp_path / "fsdp", STEPS, "fsdp", 0)
    close(one, tmp_path / "fsdp")
    run(4, tmp_path / "data", STEPS, "data", 0)
    close(one, tmp_path / "data")


@pytest.mark.long
def test_a_run_continues_on_other_numbers_of_processes_and_devices(one, two, tmp_path):
    """Two processes, then one with four devices, then four."""
    folder = tmp_path / "run"
    run(2, folder, 4, "fsdp", 0)
    out = run(1, folder, 7, "data", 0, devices=4)[0][0]
    assert f"resuming from step 4 of {folder}" in out
    run(4, folder, STEPS, "fsdp", 0)
    close(one, folder)


@pytest.mark.long
def test_a_process_that_is_killed_takes_the_other_down_and_a_restart_ends_with_the_same_bits(two, tmp_path):
    folder = tmp_path / "run"
    with started(2, folder, STEPS, "fsdp", 0, TOY_HOLDS="1 at 5") as running:
        wait_until(lambda: (folder / "held").exists() and latest(folder) == Moment(4), running)
        running[1].send_signal(signal.SIGKILL)
        out, err = running[0].communicate(timeout=HANGS)
        assert running[0].returncode == 75, err
        assert running[1].communicate()[1].splitlines()[-1].startswith("error: process 1 of 2 was ended from outside")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: process 1 of 2 is gone: no heartbeat for ")
    assert lines[0].endswith("run the same command again to resume from the newest checkpoint")
    assert "Traceback" not in err
    out = run(2, folder, STEPS, "fsdp", 0)[0][0]
    assert "resuming from step 4" in out
    assert records(folder) == records(two) and same_bits(folder, two)


@pytest.mark.long
def test_the_coordinators_death_takes_the_other_down(tmp_path):
    folder = tmp_path / "run"
    with started(2, folder, LONG, "fsdp", 0.1) as running:
        wait_for_step(folder, 2, running)
        running[0].send_signal(signal.SIGKILL)
        _, err = running[1].communicate(timeout=HANGS)
    assert running[1].returncode not in (0, None)
    last = err.splitlines()[-1]
    assert last.startswith("error: process 1 of 2 ") and last.endswith("from the newest checkpoint"), err


def test_who_finds_the_coordinator_gone_before_jax_does_ends_with_the_same_line():
    """JAX, which looks more seldom, would end the process itself a moment later."""
    program = """
import jax
from vpae_jax.runtime.distributed import LastWords, Watch

class Gone:
    def key_value_set(self, key, value, allow_overwrite):
        pass
    def key_value_dir_get(self, prefix):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: Connection reset by peer")

with Watch(Gone(), 1, 2, LastWords("process 1 of 2")):
    raise RuntimeError("Gloo all-reduce failed")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 75, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: process 1 of 2 was ended from outside") and "its coordinator is gone" in line


def test_jax_has_the_private_names_that_signs_of_life_and_waits_rest_on():
    """`runtime/processes.py` takes the coordination service's client from `jax._src`: where it is moved, look there."""
    assert processes.client() is None, "a run of one process"
    kind = jax._src.lib._jax.DistributedRuntimeClient
    for name in ("key_value_set", "key_value_dir_get", "blocking_key_value_get", "wait_at_barrier"):
        assert callable(getattr(kind, name)), name


@pytest.mark.long
def test_a_process_that_hangs_takes_the_other_down(tmp_path):
    folder = tmp_path / "run"
    with started(2, folder, LONG, "fsdp", 0.1) as running:
        wait_for_step(folder, 2, running)
        running[1].send_signal(signal.SIGSTOP)
        _, err = running[0].communicate(timeout=HANGS)
    assert running[0].returncode == 75
    assert err.splitlines()[-1].startswith("error: process 1 of 2 is gone: no heartbeat for "), err


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 2])
def test_sigterm_to_one_saves_and_ends_all_well(count, tmp_path):
    folder = tmp_path / "run"
    with started(count, folder, LONG, "fsdp", 0.05, devices=2 // count) as running:
        wait_for_step(folder, 3, running)
        running[-1].send_signal(signal.SIGTERM)
        out = finish(running, 0)[0][0]
    step = latest(folder).step
    assert out.splitlines()[-1] == f"ended at step {step} of {LONG}"
    assert records(folder)[-1]["step"] == step
    # It goes on as if nothing had happened.
    whole = tmp_path / "whole"
    run(1, folder, step + 3, "fsdp", 0, devices=2)
    run(1, whole, step + 3, "fsdp", 0, devices=2)
    assert records(folder) == records(whole) and same_bits(folder, whole)


@pytest.mark.long
def test_a_second_sigterm_ends_at_once(tmp_path):
    folder = tmp_path / "run"
    with started(1, folder, LONG, "fsdp", 0, TOY_HOLDS="0 at 2") as running:
        wait_until((folder / "held").exists, running)
        sent, deadline = [], time.monotonic() + HANGS
        while running[0].poll() is None:  # the first ones count as one: a scheduler may send it to parent and child
            assert time.monotonic() < deadline
            running[0].send_signal(signal.SIGTERM)
            sent.append(time.monotonic())
            time.sleep(0.1)
        assert running[0].returncode == -signal.SIGTERM
        assert sent[-1] - sent[0] > preemption.SAME_SECONDS
    assert latest(folder) is None


@pytest.mark.parametrize("index", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_process_that_waits_in_vain_says_so(index, tmp_path):
    with started(2, tmp_path, STEPS, "fsdp", 0, only=(index,), TOY_TIMEOUT="2") as running:
        _, err = finish(running, 2)[0]
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: process {index} of 2: waited 2 s"), err
    assert list(tmp_path.iterdir()) == []


def test_one_that_fails_alone_takes_the_other_down_with_its_reason(tmp_path):
    with started(2, tmp_path / "run", LONG, "fsdp", 0.1, TOY_FAILS="1 at 3") as running:
        written = [process.communicate(timeout=HANGS) for process in running]
    assert [process.returncode for process in running] == [75, 2]
    assert written[1][1].splitlines() == ["error: the toy is broken"]
    last = written[0][1].splitlines()[-1]
    assert last.startswith("error: process 1 of 2 failed (the toy is broken); process 0 stops too; "), written[0][1]


def test_processes_go_back_to_the_same_whole_checkpoint(two, tmp_path):
    """The newest one is damaged in a file that one of them has written, and the other one looks at."""
    folder = tmp_path / "run"
    shutil.copytree(two, folder)
    newest = folder / FOLDER / str(STEPS)
    for number in range(2):
        assert list(newest.glob(f"state/ocdbt.process_{number}/d/*")), "both have written"
    path = max(newest.glob("state/ocdbt.process_1/d/*"), key=lambda path: path.stat().st_size)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    out, err = zip(*run(2, folder, STEPS, "fsdp", 0), strict=True)
    assert out[0].count("is damaged (state/ocdbt.process_1/d/") == 1 and "the run goes back to step 8" in out[0]
    assert "resuming from step 8" in out[0] and "damaged" not in out[1]
    assert not any("Traceback" in text for text in err)
    assert records(folder) == records(two) and same_bits(folder, two)
    assert (folder / FOLDER / f"damaged-{STEPS}").is_dir()


PHASE1 = ("-m", "vpae_jax.main", "--config=configs/phase1.py")


def stopped(running: list[subprocess.Popen]) -> list[str]:
    """The only line that each process has written to stderr before it ended as bad input does."""
    lines = [err.splitlines() for _, err in finish(running, 2)]
    assert all(len(some) == 1 for some in lines), lines
    return [line for (line,) in lines]


@pytest.mark.long
def test_processes_of_other_configs_end_at_once_with_the_same_line(tmp_path):
    own = {0: ["--config.steps=100"], 1: ["--config.steps=70", "--config.log_every=7"]}
    begun = time.monotonic()
    with started(2, f"--workdir={tmp_path / 'run'}", program=PHASE1, own=own) as running:
        first, second = stopped(running)
    assert (
        first
        == second
        == (
            "error: the processes of this run differ: config.steps is 100 in process 0, 70 in process 1 (and 1 more "
            "difference); start all of them with the same command and code"
        )
    )
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - begun < 120, "most of it is Python's start"


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        pytest.param(
            {2: ["log_every=7"]}, "config.log_every is 10 in processes 0 and 1, 7 in process 2", marks=pytest.mark.long
        ),
        ({0: ["version=0.0.9"]}, "the version of vpae_jax is 0.0.9 in process 0, 0.1.0 in processes 1 and 2"),
    ],
    ids=["config", "code"],
)
def test_the_one_of_three_that_differs_is_named(own, expected):
    with started(3, program=(str(AGREEING),), own=own) as running:
        lines = stopped(running)
    assert len(set(lines)) == 1 and f"differ: {expected}; start" in lines[0], lines


def test_processes_of_other_clips_end_at_once(tmp_path):
    """Where clips lie is a host's own, which they are is not."""
    folders = [write_folder(tmp_path / name, [[(n, SMALL) for n in some]]) for name, some in CLIPS.items()]
    own = {index: [f"records={folder}"] for index, folder in enumerate(folders)}
    with started(2, program=(str(AGREEING),), own={0: own[0], 1: own[1]}) as running:
        assert [process.stdout.readline() for process in running] == ["agreed\n", "agreed\n"]
    with started(2, program=(str(AGREEING),), own={0: own[0], 1: own[2]}) as running:
        lines = stopped(running)
    assert "differ: the digest of config.data.records is " in lines[0] and lines[0] == lines[1]
