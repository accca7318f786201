"""Experiment trackers: copies of a run's metrics and previews in Weights & Biases or Trackio.

Both are optional packages with the same interface. A run in a workdir is a single run in the tracker, even if it is
interrupted; its id is stored in `tracker.json`.
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
            f"config.tracker is {kind!r}, but the package {kind} is not installed; run pip install 'vpae_jax[{kind}]', "
            "or leave it out"
        )


class Tracker:
    """A run in a tracker.

    Accounts and servers are configured as usual for the package: `WANDB_MODE=offline`, `WANDB_PROJECT`, `TRACKIO_DIR`
    and so on have their usual effect.

    Args:
      kind: the package, which must be installed.
      workdir: the run's folder, in which W&B's files are stored, too.
      name: name of the run.
      config: config of the run.

    Raises:
      UserError: the package cannot start a run; the message includes its reason.
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
            raise UserError(f"config.tracker is 'wandb', which cannot start a run: {reason}") from error

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Records a step's scalars, and videos given by their files."""
        package = self._package
        shown = {
            name: package.Video(str(value), format="mp4") if isinstance(value, Path) else value
            for name, value in values.items()
        }
        self._run.log(shown, step=step)

    def close(self) -> None:
        self._run.finish()


def _id(kind: str, file: Path) -> str:
    """Returns the run's id, which is stored in the workdir; a new one if the file cannot be read."""
    try:
        found = dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        found = {}
    if not isinstance(found.get(kind), str):
        found[kind] = uuid.uuid4().hex[:8]
        write_text(file, json.dumps(found) + "\n")
    return found[kind]
