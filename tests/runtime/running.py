"""Starts programs as several processes, and ends what they leave."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from vpae_jax.train.metrics import read_metrics

HANGS = 500  # seconds after which a test gives up on what should have happened, however slow the machine
ROOT = Path(__file__).parents[2]
TOY = Path(__file__).with_name("toy.py")
OUTSIDE = ("SLURM_", "JAX_COORDINATOR", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "XLA_FLAGS")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """What a process is started with: `devices` virtual ones, and compiled programs kept between tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OUTSIDE)}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests")}
    return {**kept, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": paths, **cache, **more}


@contextmanager
def started(
    count: int,
    *arguments: object,
    devices: int = 1,
    only: tuple[int, ...] = (),
    program: Sequence[str] = (str(TOY),),
    own: Mapping[int, Sequence[object]] = MappingProxyType({}),
    **more: str,
) -> Iterator[list[subprocess.Popen]]:
    """`count` processes of toy.py, or those of them that `only` names, which are killed in the end.

    Args:
      program: another one, as Python is given it.
      own: arguments of single processes, after those of all.
    """
    port = free_port()
    running = []
    try:
        for index in only or range(count):
            where = {}
            if count > 1:
                where = {
                    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(index),
                }
            command = [sys.executable, *program, *map(str, (*arguments, *own.get(index, ())))]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            running.append(subprocess.Popen(command, env=environment(devices, **where, **more), cwd=ROOT, **pipes))
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def finish(running: list[subprocess.Popen], status: int = 0, seconds: float = HANGS) -> list[tuple[str, str]]:
    """Waits for processes, which must all end with `status`; returns what each wrote to stdout and stderr."""
    written = [process.communicate(timeout=seconds) for process in running]
    for process, (_, err) in zip(running, written, strict=True):
        assert process.returncode == status, f"status {process.returncode}\n{err[-3000:]}"
    return written


def run(count: int, *arguments: object, devices: int = 1) -> list[tuple[str, str]]:
    with started(count, *arguments, devices=devices) as running:
        return finish(running)


def wait_until(happened: Callable[[], bool], running: list[subprocess.Popen]) -> None:
    """Waits for something that processes do before they end."""
    deadline = time.monotonic() + HANGS
    while not happened():
        assert time.monotonic() < deadline
        for process in running:
            assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def wait_for_step(workdir: Path, step: int, running: list[subprocess.Popen]) -> None:
    wait_until(lambda: any(record["step"] >= step for record in read_metrics(workdir)), running)
