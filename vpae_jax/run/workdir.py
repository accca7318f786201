"""A run's folder, which is used by one run at a time, and always with the same config.

`run.lock` names the process that uses it. The lock itself is a `flock`, which ends with the process in any case; the
file remains. On a file system without locks between hosts, a second host could get in.
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
from vpae_jax.runtime.processes import broadcast_from_0, first_alone, is_first, say
from vpae_jax.train.checkpoint import CONFIG_FILE
from vpae_jax.types import UserError
from vpae_jax.weights.filenames import read_json

LOCK = "run.lock"
# Settings that may change between runs in one workdir: how long and how often, but not what is computed. The location
# of records may change, since a checkpoint's data position identifies them.
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
    """The parts of a run's config that other programs need, whichever version has written it.

    Attributes:
      name, model, method, data, guard, sample_shift, sample_guidance: as in `config.Experiment`, as plain values.
      whole: the whole config.
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
        """The path of the model that the run started from. Raises `UserError` if it is missing."""
        if not isinstance(path := self.model.get("path"), str):
            raise UserError(f"the run's {CONFIG_FILE}: model.path is {path!r}, expected a model; give it with --base")
        return path

    @property
    def lora(self) -> str:
        """The LoRA files that were merged into that model, "" for none. Raises `UserError` if this is not text."""
        if not isinstance(names := self.model.get("lora", ""), str):
            raise UserError(f"the run's {CONFIG_FILE}: model.lora is {names!r}, expected FILE or FILE:STRENGTH")
        return names


def read_run(workdir: Path) -> PastRun:
    """Reads the config of a run. Raises `UserError` if there was no run, or its config cannot be read."""
    file = workdir / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{workdir} contains no run ({file.name} is missing); train the phase first")
    found = read_json(file)
    known = {f.name: found[f.name] for f in dataclasses.fields(PastRun) if f.name in found}
    return build(PastRun, {**known, "whole": found}, str(file))


class Lock:
    """Keeps other runs out of a workdir; held by the first process. As a context manager, it takes the lock immediately
    if the workdir already exists.

    Args:
      workdir: the run's folder.
    """

    def __init__(self, workdir: Path):
        self.workdir, self.file, self._descriptor = workdir, workdir / LOCK, None

    def take(self) -> str:
        """Takes the lock, unless already held, and creates the workdir. Returns a description of the holder.

        Raises:
          UserError: another run uses the workdir, or the file cannot be written.
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
                    f"{self.file}: cannot be locked here ({error.strerror}); make sure that no other run uses "
                    f"{self.workdir}"
                )
                return
            holder = os.pread(descriptor, 1000, 0).decode("utf-8", "replace") or "an unknown process"
            raise UserError(
                f"{self.workdir}: in use by another run: {holder}, according to {self.file}; stop it, wait until it "
                "ends, or choose another --workdir"
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
    """Creates the workdir and binds it to this run and its config. All processes must call this.

    Raises:
      UserError: another run uses the workdir, it is bound to another config, or the processes do not share it.
    """

    def tie() -> None:
        if is_first():
            broadcast_from_0("lock", lock.take())
            require_config(workdir, experiment)
            write_config(workdir, experiment)
        elif _text(lock.file) != broadcast_from_0("lock", None):
            raise UserError(
                f"{workdir}: files written there by process 0 are not visible here; choose a --workdir that all hosts "
                "share"
            )

    first_alone("workdir", tie)


def require_config(workdir: Path, experiment: Experiment, free: Iterable[str] = FREE + FREE_DATA) -> None:
    """Raises `UserError` if a workdir belongs to another config, naming the first key that differs.

    Args:
      free: keys, or whole groups of keys, that may change between runs in one workdir.
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
    """Binds the workdir to a config. An existing file that is unreadable, because of a disk error, is renamed."""
    file = workdir / CONFIG_FILE
    if file.exists() and read_object(file) is None:
        say(f"{file} cannot be read and was renamed to {put_aside(file).name}; the run continues with the given config")
    write_text(file, json.dumps(dataclasses.asdict(experiment), indent=1))


def read_object(file: Path) -> dict[str, Any] | None:
    """Reads a JSON object that a run has written to its workdir; None if it is missing or unreadable."""
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
