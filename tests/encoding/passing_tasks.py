"""Tasks that fail for reasons that may pass, by what a file is called; each try notes how many ran beside it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vpae_jax.encoding import worker_tasks
from vpae_jax.encoding.decoding import Unreadable


def look(path: Path):
    with _noted(path, "look") as first:
        if "looking" in path.name and first:
            os.kill(os.getpid(), signal.SIGKILL)  # as a system without memory does
        return worker_tasks.look(path)


def read(out, path: Path, start: float, fps: float):
    with _noted(path, f"read-{start}") as first:
        if "reading" in path.name and first:
            os.kill(os.getpid(), signal.SIGKILL)
        if "broken" in path.name and (first or "for good" in path.name):
            return Unreadable("unreadable", "cannot be read: input/output error", passing=True)
        return worker_tasks.read(out, path, start, fps)


@contextmanager
def _noted(path: Path, task: str) -> Iterator[bool]:
    """Says whether it is the first try."""
    running = path.parent / f"{os.getpid()}.running"
    beside = len([other for other in path.parent.glob("*.running") if _lives(other)])
    notes = path.parent / f"{path.stem}.{task}.tries"
    first = not notes.exists()
    with notes.open("a") as file:
        file.write(f"{beside}\n")
    running.touch()
    try:
        time.sleep(0.05)
        yield first
    finally:
        running.unlink()


def _lives(running: Path) -> bool:
    return Path("/proc", running.stem).exists()


def tries(folder: Path) -> dict[str, list[list[int]]]:
    """Of each video, of each task, how many ran beside each try."""
    found: dict[str, list[list[int]]] = {}
    for notes in sorted(folder.glob("*.tries")):
        found.setdefault(notes.name.partition(".")[0], []).append([int(line) for line in notes.read_text().split()])
    return found
