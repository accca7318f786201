"""Tasks that end their worker, by what a file is called; the worker imports this module by its name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np

from vpae_jax.encoding import worker_tasks


def look(path: Path):
    if "abort" in path.name:
        os.abort()
    if "exit" in path.name:
        os._exit(3)
    if "hang" in path.name:
        time.sleep(1000)
    return worker_tasks.look(path)


def read(out, path: Path, start: float, fps: float):
    if "raise" in path.name:
        raise ValueError("what nobody\nhas expected")
    if "stop" in path.name:
        os.kill(os.getpid(), signal.SIGSTOP)
    return worker_tasks.read(out, path, start, fps)


def fill(out: np.ndarray, value: int) -> int:
    out[:] = value
    return os.getpid()


def hang(begun: Path) -> None:
    begun.touch()
    time.sleep(1000)


def modules() -> set[str]:
    import sys

    return set(sys.modules)
