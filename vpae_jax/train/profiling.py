"""A profile of some steps of a training, for XProf or TensorBoard."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import jax

from vpae_jax.runtime.processes import say
from vpae_jax.types import UserError

FOLDER = "profile"


@dataclass(frozen=True)
class Window:
    """Steps that are profiled, counted from 1, both ends included."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> Window | None:
        """`config.profile`, "FROM:TO"; None for an empty one. Raises `UserError` for any other text."""
        if not text:
            return None
        found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
        if found is None or int(found[1]) > int(found[2]):
            raise UserError(f"profile is {text!r}, expected FROM:TO, two steps from 1 on, such as 10:12")
        return cls(int(found[1]), int(found[2]))


class Profiler:
    """Traces the steps of a window into a workdir's `profile/`: every process those of its own devices.

    Args:
      window: None traces nothing.
    """

    def __init__(self, window: Window | None, workdir: Path) -> None:
        self.window, self.folder, self.running = window, workdir / FOLDER, False

    def update(self, name: str, step: int) -> AbstractContextManager[object]:
        """Around an update of a step: begins the trace with the window's first one that runs."""
        if self.window is None or not self.window.first <= step <= self.window.last:
            return nullcontext()
        if not self.running:
            jax.profiler.start_trace(self.folder)
            self.running = True
        return jax.profiler.StepTraceAnnotation(name, step_num=step)

    def after(self, step: int) -> None:
        """After a step, whose updates have ended: writes the trace if it was the window's last."""
        if self.window is not None and step == self.window.last:
            self.close()

    def close(self) -> None:
        """Writes a trace that is running, as of a run that stops within its window."""
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
            say(f"profile: {self.folder} (pip install xprof && xprof {self.folder})")
