"""A training on records that is killed at any moment continues with the batches that it had not seen."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from record_files import SMALL, WIDE, write_folder
from train_on_records import main

from vpae_jax.train.checkpoint import read_state
from vpae_jax.train.metrics import read_metrics

PROGRAM = Path(__file__).with_name("train_on_records.py")
ROOT = PROGRAM.parents[2]
HANGS = 600  # seconds after which a test gives up on what should have happened, however slow the machine


def start(*arguments) -> subprocess.Popen:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, **variables}, stderr=subprocess.PIPE, text=True)


def seen(workdir: Path) -> list[dict[str, float]]:
    timing = ("seconds_per_step", "data_wait", "bad_records")
    return [{k: v for k, v in record.items() if k not in timing} for record in read_metrics(workdir)]


@pytest.fixture
def folder(tmp_path):
    """Two shapes, and one damaged record."""
    clips = [(n, WIDE if n % 3 == 0 else SMALL) for n in range(30)]
    folder = write_folder(tmp_path / "records", [clips[:15], clips[15:]])
    path = next((folder / "shards").glob("00001-2x4x6*"))
    raw = bytearray(path.read_bytes())
    raw[3000] ^= 1
    path.write_bytes(raw)
    return folder


@pytest.mark.parametrize("kills", [1, pytest.param(30, marks=pytest.mark.long)])
def test_the_batches_of_a_killed_training_are_those_of_an_uninterrupted_one(kills, folder, tmp_path, capfd):
    rng = random.Random(kills)
    workdir, done = tmp_path / "killed", 0
    steps = 5 * kills
    for _ in range(kills):
        process = start(folder, workdir, steps, 0.02)
        deadline = time.monotonic() + HANGS
        while not (records := read_metrics(workdir)) or records[-1]["step"] <= done:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.communicate()
        done = max([record["step"] for record in read_metrics(workdir)])
        if done >= steps - 5:  # something is to be left for the last run
            steps += 20
    process = start(folder, workdir, steps, 0)
    assert process.wait(HANGS) == 0, process.communicate()[1]
    assert "bad record: " in process.communicate()[1]
    main([str(folder), str(tmp_path / "whole"), str(steps), "0"])
    assert len(seen(workdir)) == steps and seen(workdir) == seen(tmp_path / "whole")
    assert len({record["generator/square"] for record in seen(workdir)}) > steps / 2, "batches differ"
    states = [
        jax.tree.leaves(read_state(w, items=("params", "opt", "averages"))) for w in (workdir, tmp_path / "whole")
    ]
    assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(*states, strict=True))
