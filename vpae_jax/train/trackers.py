"""Experiment trackers: a copy of a run's numbers and previews in Weights & Biases or Trackio.

Both are optional packages with one interface. A run in a workdir is one run of the tracker, however often it is
interrupted: its id stands in `tracker.json`.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from vpae_jax.files import write_text
from vpae_jax.types import UserError

Kind = Literal["none", "wandb", "trackio"]
FILE = "tracker.json"
PROJECT = "vpae_jax"


def require(kind: Kind) -> None:
    """Raises `UserError` for a tracker whose package is not installed."""
    if kind != "none" and find_spec(kind) is None:
        raise UserError(
            f"config.tracker is {kind!r}, but the package {kind} is not installed; pip install 'vpae_jax[{kind}]', or "
            "leave it out"
        )


class Tracker:
    """A run of a tracker.

    What its package says of accounts and servers is its own: `WANDB_MODE=offline`, `WANDB_PROJECT`, `TRACKIO_DIR` and
    the like do what they do elsewhere.

    Args:
      kind: of a package that is installed.
      workdir: the run's folder, in which W&B's own files are kept.
      name: of the run.
      config: of the run.

    Raises:
      UserError: the package cannot begin a run, for which its own reason is given.
    """

    def __init__(self, kind: Literal["wandb", "trackio"], workdir: Path, name: str, config: Mapping[str, Any]) -> None:
        self._package, project = import_module(kind), os.environ.get("WANDB_PROJECT", PROJECT)
        known, name = _id(kind, workdir / FILE), f"{name} {workdir.name}"
        if kind == "trackio":
            given = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
            self._run = self._package.init(
                project=project, name=f"{name} {known}", config=dict(config), resume="allow", **given
            )
            return
        try:
            self._run = self._package.init(
                project=project, name=name, id=known, resume="allow", dir=str(workdir), config=dict(config)
            )
        except self._package.errors.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(f"config.tracker is 'wandb', which cannot begin a run: {reason}") from error

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Records numbers, and videos by their files, of a step."""
        package = self._package
        shown = {
            name: package.Video(str(value), format="mp4") if isinstance(value, Path) else value
            for name, value in values.items()
        }
        self._run.log(shown, step=step)

    def close(self) -> None:
        self._run.finish()


def _id(kind: str, file: Path) -> str:
    """The run's id, kept in the workdir; a new one where the file cannot be read."""
    try:
        found = dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        found = {}
    if not isinstance(found.get(kind), str):
        found[kind] = uuid.uuid4().hex[:8]
        write_text(file, json.dumps(found) + "\n")
    return found[kind]
