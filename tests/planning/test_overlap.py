"""What the flag for TPUs does to a sharded block, by libtpu's own compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def collectives(*arguments: str) -> dict[str, dict[str, int]]:
    command = [sys.executable, str(Path(__file__).with_name("overlap.py")), "v5p:2x2x1", *arguments]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
def test_exchanges_run_beside_other_work_with_the_flag_and_none_does_without():
    bare, flagged = collectives("--bare"), collectives()
    assert bare["all-to-all"] == {"synchronous": 5, "asynchronous": 0}
    assert flagged["all-to-all"] == {"synchronous": 0, "asynchronous": 5}
    # Nothing in the environment makes gathers asynchronous that every libtpu takes.
    assert bare["all-gather"] == flagged["all-gather"] == {"synchronous": 4, "asynchronous": 0}
