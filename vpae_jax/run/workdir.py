"""A run's folder: one run at a time, and always the same config.

`run.lock` says which process works there. The lock itself is the system's (`flock`): it ends with the process, however
that ends, and the file stays. File systems that know no locks between hosts let a second host in.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from vpae_jax.config import Experiment, build
from vpae_jax.encoding.identity import differences
from vpae_jax.files import put_aside, refused_writes, write_text
from vpae_jax.runtime.processes import as_first_says, first_alone, is_first, say
from vpae_jax.train.checkpoint import CONFIG_FILE
from vpae_jax.types import UserError
from vpae_jax.weights.filenames import read_json

LOCK = "run.lock"
# What may differ between two runs in one workdir: how long and how often, never what is computed. Where records lie
# may; a checkpoint's position says which they are.
FREE = (
    "steps",
    "accumulation",
    "mesh",
    "log_every",
    "sample_every",
    "sample_steps",
    "score_every",
    "score_clips",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep",
    "guard",
    "tracker",
    "profile",
)
FREE_DATA = ("data.folder", "data.records", "data.videos", "data.workers", "data.max_bad", "data.held_out_records")


@dataclass(frozen=True)
class PastRun:
    """What others read of a run's config, whichever version has written it.

    Attributes:
      name, model, method, data, guard, sample_shift, sample_guidance: as `config.Experiment` has them, as plain values.
      whole: all of it.
    """

    name: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
    method: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    guard: Mapping[str, Any] = field(default_factory=dict)
    sample_shift: float = 1.0
    sample_guidance: float = 1.0
    whole: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model_path(self) -> str:
        """What it calls the model that it started from. Raises `UserError` where it does not say."""
        if not isinstance(path := self.model.get("path"), str):
            raise UserError(f"the run's {CONFIG_FILE}: model.path is {path!r}, expected a model; name it with --base")
        return path

    @property
    def lora(self) -> str:
        """The LoRA files that were merged into it, "" for none. Raises `UserError` where that is no text."""
        if not isinstance(names := self.model.get("lora", ""), str):
            raise UserError(f"the run's {CONFIG_FILE}: model.lora is {names!r}, expected FILE or FILE:STRENGTH")
        return names


def read_run(workdir: Path) -> PastRun:
    """The config of a run. Raises `UserError` when there was no run, or its config cannot be read."""
    file = workdir / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{workdir} holds no run ({file.name} is missing); train the phase first")
    found = read_json(file)
    known = {f.name: found[f.name] for f in dataclasses.fields(PastRun) if f.name in found}
    return build(PastRun, {**known, "whole": found}, str(file))


class Lock:
    """Keeps other runs out of a workdir; of several processes, the first one does. A context manager, which takes it
    at once where the workdir is there already.

    Args:
      workdir: the run's folder.
    """

    def __init__(self, workdir: Path):
        self.workdir, self.file, self._descriptor = workdir, workdir / LOCK, None

    def take(self) -> str:
        """Takes the lock, if it is not held yet; who holds it. Makes the workdir.

        Raises:
          UserError: another run works there, or the file cannot be written.
        """
        if self._descriptor is not None:
            return os.pread(self._descriptor, 1000, 0).decode()
        holder = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S %z')}"
        with refused_writes(self.file), ExitStack() as stack:
            self.workdir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, descriptor)
            self._lock(descriptor)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode(), 0)
            os.fsync(descriptor)
            stack.pop_all()
        self._descriptor = descriptor
        return holder

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                say(
                    f"{self.file}: cannot be locked here ({error.strerror}); see to it that no other run uses "
                    f"{self.workdir}"
                )
                return
            holder = os.pread(descriptor, 1000, 0).decode("utf-8", "replace") or "a process that does not say so"
            raise UserError(
                f"{self.workdir}: another run works there: {holder}, says {self.file}; end it, wait for its end, or "
                "choose another --workdir"
            ) from error

    def __enter__(self) -> Lock:
        if is_first() and self.workdir.is_dir():
            self.take()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def claim(experiment: Experiment, workdir: Path, lock: Lock) -> None:
    """Makes the workdir and ties it to this run and its config. All processes call this.

    Raises:
      UserError: another run works there, it is tied to another config, or the processes do not share it.
    """

    def tie() -> None:
        if is_first():
            as_first_says("lock", lock.take())
            require_config(workdir, experiment)
            write_config(workdir, experiment)
        elif _text(lock.file) != as_first_says("lock", None):
            raise UserError(
                f"{workdir}: what process 0 wrote there is not seen here; choose a --workdir that all hosts share"
            )

    first_alone("workdir", tie)


def require_config(workdir: Path, experiment: Experiment, free: Iterable[str] = FREE + FREE_DATA) -> None:
    """Raises `UserError` for a workdir that belongs to another config, naming the first key that differs.

    Args:
      free: keys, or whole parts, that may change between runs in one workdir.
    """
    found = read_object(workdir / CONFIG_FILE)
    given = json.loads(json.dumps(dataclasses.asdict(experiment)))
    if found is None:
        return
    for key in free:
        for config in (found, given):
            _drop(config, key.split("."))
    if (differing := next(differences(found, given), None)) is not None:
        raise UserError(
            f"{workdir} belongs to another config: {differing}; choose another --workdir, or the same config"
        )


def write_config(workdir: Path, experiment: Experiment) -> None:
    """Ties the workdir to a config. One that a fault of the disk has made unreadable is put aside."""
    file = workdir / CONFIG_FILE
    if file.exists() and read_object(file) is None:
        say(f"{file} cannot be read, and is now called {put_aside(file).name}; the run goes on with the config given")
    write_text(file, json.dumps(dataclasses.asdict(experiment), indent=1))


def read_object(file: Path) -> dict[str, Any] | None:
    """A JSON object that a run has left in its workdir; None when there is none that can be read."""
    if not file.exists():
        return None
    try:
        return read_json(file)
    except UserError:
        return None


def _drop(config: dict[str, Any], keys: list[str]) -> None:
    *parts, last = keys
    inner: Any = config
    for part in parts:
        inner = inner.get(part) if isinstance(inner, Mapping) else None
    if isinstance(inner, dict):
        inner.pop(last, None)


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.is_file() else ""
