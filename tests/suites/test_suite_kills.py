"""An export that is killed, or that several processes share, ends with the frames of one that was let alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WAIT = 500  # seconds, on a machine that does much else
# Says which clips are made, and of what frames: now and then x264 gives the same frames other bytes.
TOLD = """
import hashlib
import vpae_jax.suites.export as export
inner = export._make
def told(pipeline, recipe, clip, part):
    print("making", clip.file, flush=True)
    inner(pipeline, recipe, clip, part)
export._make = told
write = export.write_video
def hashed(part, frames, fps, crf):
    write(part, frames, fps, crf)
    print("frames", part.stem, hashlib.sha256(frames.tobytes()).hexdigest(), flush=True)
export.write_video = hashed
from vpae_jax import cli, evaluate
cli.run(evaluate.main)
"""


def start(log, **options) -> subprocess.Popen:
    """Starts an export, which says in a file what it does."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [f"--{name}={value}" for name, value in options.items()]
    environment = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    with log.open("a") as file:
        command = [sys.executable, "-c", TOLD, *words]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def videos(output) -> dict[str, bytes]:
    folder = output / "videos"
    found = folder.iterdir() if folder.is_dir() else ()
    return {path.name: path.read_bytes() for path in found}


def wait_until(true) -> None:
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def ended(*processes, log) -> None:
    """Waits for processes, and ends those that outlast a failing one."""
    try:
        for process in processes:
            assert process.wait(WAIT) == 0, log.read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()


def frames(*logs) -> set[str]:
    """What each clip shows, to the bit."""
    return {line for log in logs for line in log.read_text().splitlines() if line.startswith("frames ")}


def made(log) -> list[str]:
    return [line.removeprefix("making ") for line in log.read_text().splitlines() if line.startswith("making ")]


@pytest.fixture
def options(models, checkout):
    given = {"suite": "vbench_i2v", "checkout": checkout, "model": models["i2v"], "samples": 3}
    return {**given, "dimensions": "camera_motion,i2v_subject,i2v_background"}


@pytest.mark.long
def test_two_kills_lose_and_double_nothing(options, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "killed"
    for run, more in enumerate((0, 2, None)):  # killed in its first clip, in its third, and not at all
        before, log = set(videos(output)), tmp_path / f"log {run}"
        process = start(log, **options, output=output)
        if more is None:
            ended(process, log=log)
        else:
            wait_until(lambda: process.poll() is not None or len(made(log)) > more)  # noqa: B023
            process.send_signal(signal.SIGKILL)
            assert process.wait(WAIT) == -signal.SIGKILL, log.read_text()
        making = made(log)
        assert len(making) == len(set(making)) and not before & set(making), "a clip that was there is made again"
        assert set(videos(output)) - before >= set(making[:-1])
    assert len(before) >= 2
    ended(start(tmp_path / "other", **options, output=whole), log=tmp_path / "other")
    assert set(videos(output)) == set(videos(whole)) and len(videos(whole)) == 15
    assert frames(*(tmp_path / f"log {run}" for run in range(3))) == frames(tmp_path / "other")
    assert (output / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()
    assert sorted(path.name for path in output.iterdir()) == ["manifest.json", "videos"]


@pytest.mark.long
def test_two_processes_make_each_clip_once(options, tmp_path):
    """Two that share the work, and a third that was started by mistake."""
    whole, output = tmp_path / "whole", tmp_path / "shared"
    logs = [tmp_path / f"log {i}" for i in range(3)]
    places = [{"process_id": i, "num_processes": 2} for i in (0, 1, 0)]
    processes = [start(log, **options, **place, output=output) for log, place in zip(logs, places, strict=True)]
    ended(*processes, log=logs[0])
    making = [name for log in logs for name in made(log)]
    assert len(making) == 15 == len(set(making))
    ended(start(tmp_path / "other", **options, output=whole), log=tmp_path / "other")
    assert set(videos(output)) == set(videos(whole))
    assert frames(*logs) == frames(tmp_path / "other")
    assert len(json.loads((output / "manifest.json").read_text())["clips"]) == 15
    assert sorted(path.name for path in output.iterdir()) == ["manifest.json", "videos"]
