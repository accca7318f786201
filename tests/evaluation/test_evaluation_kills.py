"""An evaluation that is killed, and then shared by two processes, makes no clip twice and ends."""

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
CLIPS, ROWS = 16, 2


def start(log, **options) -> subprocess.Popen:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [f"--{name}={value}" for name, value in options.items()]
    with log.open("a") as file:
        command = [sys.executable, "-m", "vpae_jax.evaluate", *words]
        environment = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def made(output) -> dict[Path, tuple[int, int]]:
    """The latents that are there, with what tells whether they were written again."""
    found = (output / "clips").glob("*/*.latents.npz")
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


@pytest.mark.long
def test_no_clip_is_made_twice(models, prompts, tmp_path):
    output, log = tmp_path / "out", tmp_path / "log"
    options = {"model": models["t2v"], "prompts": prompts[0], "batch": 2, "output": output}
    killed = start(log, **options)
    end = time.monotonic() + WAIT
    while len(made(output)) < 4:
        assert killed.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = made(output)
    assert 4 <= len(before) < ROWS * CLIPS and not (output / "metrics.json").exists()
    both = [start(log, **options, process_id=index, num_processes=2) for index in range(2)]
    try:
        for process in both:
            assert process.wait(WAIT) == 0, log.read_text()
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert before.items() <= made(output).items() and len(made(output)) == ROWS * CLIPS
    found = json.loads((output / "metrics.json").read_text())
    assert [row["evaluations"] for row in found["rows"]] == [2, 1] and (output / "report.html").is_file()
    left = {path.name for path in output.rglob("*") if path.name.startswith((".", "damaged")) or path.suffix == ".lock"}
    assert not left
