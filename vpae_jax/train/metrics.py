"""Writes a run's metrics to a JSONL file, to TensorBoard, to a tracker if configured, and to the terminal.

`metrics.jsonl` is the authoritative record, from which reports are made: one object per logged step, `{"step": 10,
"generator/loss": ...}`. A restart drops the lines of steps that will be repeated, and lines that a disk error has made
unreadable. TensorBoard's files are a copy for viewing; if they cannot be written, the run continues without them.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vpae_jax.files import refused_writes, write_text
from vpae_jax.runtime import progress
from vpae_jax.runtime.processes import is_first, say
from vpae_jax.train.trackers import Tracker

JSONL = "metrics.jsonl"
# The progress bar shows the time left once this many steps have been timed.
MEASURED = 4
UNTIMED = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
TIMED = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
FLUSH_SECONDS = 30.0  # delay until numbers are visible in TensorBoard


class MetricsLog:
    """Writes a run's scalars, in the first process only.

    Args:
      workdir: the run's folder.
      start: the step that the run resumes from; later records of an interrupted run are dropped.
      steps: the last step, for the progress bar.
      tracker: creates a tracker, in the process that writes; None for no tracker.

    Raises:
      UserError: metrics.jsonl cannot be written, or the tracker cannot be started.
    """

    def __init__(self, workdir: Path, start: int, steps: int, tracker: Callable[[], Tracker] | None = None):
        self.writes, self.file, self.begun = is_first(), workdir / JSONL, set[str]()
        if not self.writes:
            return
        lines = _lines(self.file) if start else []
        if bad := lines.count(None):
            say(f"{self.file}: dropped {bad} line{'s' if bad > 1 else ''} that cannot be read")
        kept = [record for record in lines if record is not None and record["step"] <= start]
        write_text(self.file, "".join(json.dumps(record) + "\n" for record in kept))
        self.board = _Board(workdir / "tensorboard", start)
        self.tracker = None if tracker is None else tracker()
        self.steps, self.timed = steps, 0
        self.bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            bar_format=UNTIMED,
            disable=not sys.stderr.isatty(),
        )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Records a step's scalars everywhere; the terminal shows the losses. Videos only go to the tracker."""
        if not self.writes:
            return
        if self.tracker is not None:
            self.tracker.write(step, values)
        scalars = {name: value for name, value in values.items() if not isinstance(value, Path)}
        if not scalars:
            return
        with refused_writes(self.file), self.file.open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")
        self.board.write(step, scalars)
        losses = {n.removesuffix("/loss"): v for n, v in scalars.items() if n.endswith("/loss")}
        if not losses:  # scores, which are printed where they are computed
            return
        text = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            seconds = scalars.get("seconds_per_step")
            pace = f"  {seconds:.3g} s/step" if seconds else ""
            print(f"step {step}/{self.steps}  {text}{pace}", flush=True)

    def advance(self) -> None:
        """Counts a finished step."""
        if not self.writes:
            return
        self.timed += 1
        if self.timed == MEASURED:
            self.bar.bar_format = TIMED
        self.bar.update()

    @contextmanager
    def first_time(self, what: str) -> Iterator[None]:
        """Reports an operation that is slow when it first runs, because it is compiled then, and excludes it from the
        progress bar's estimate of the time per step."""
        if what in self.begun:
            yield
            return
        self.begun.add(what)
        with progress.working(what, say):
            yield
        if self.writes:
            self.bar.unpause()

    def close(self) -> None:
        if self.writes:
            self.bar.close()
            self.board.close()
            if self.tracker is not None:
                self.tracker.close()


class _Board:
    """Writes TensorBoard's files to a folder. If this fails, it prints a line and does not try again.

    It does not use the library's own writer, which has a thread that dies when the disk is full; training would then
    wait for it forever.
    """

    def __init__(self, folder: Path, start: int):
        # Imported only when a run begins, since the library imports PyTorch if that is installed.
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        self.event, self.scalar = Event, scalar
        self.folder, self.file, self.flushed = folder, None, time.monotonic()
        with self._or_without():
            folder.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
            self.file = RecordWriter(str(folder / name))
        self._write(Event(step=start, file_version="brain.Event:2"))
        self._write(Event(step=start, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._write(self.event(wall_time=time.time(), step=step, summary=self.scalar(name, value)))
        with self._or_without():
            if self.file is not None and time.monotonic() - self.flushed > FLUSH_SECONDS:
                self.file.flush()
                self.flushed = time.monotonic()

    def close(self) -> None:
        with self._or_without():
            if self.file is not None:
                self.file.close()

    def _write(self, event: Any) -> None:
        with self._or_without():
            if self.file is not None:
                self.file.write(event.SerializeToString())

    @contextmanager
    def _or_without(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            say(f"{self.folder}: cannot be written: {error.strerror}; the run continues without TensorBoard's files")
            file, self.file = self.file, None
            if file is not None:
                with suppress(OSError):
                    file.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the records of a run in order, without lines that cannot be read."""
    return [record for record in _lines(workdir / JSONL) if record is not None]


def _lines(file: Path) -> list[dict[str, Any] | None]:
    """Returns the record of each line, None for an invalid one; ignores an incomplete last line."""
    return [_record(line) for line in file.read_bytes().split(b"\n")[:-1] if line] if file.exists() else []


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None
