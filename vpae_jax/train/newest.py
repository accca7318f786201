"""Selects the checkpoint of a workdir to read: the newest intact one."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import NamedTuple

import jax

from vpae_jax.runtime.processes import broadcast_from_0, first_decides, is_first
from vpae_jax.train import checksums
from vpae_jax.types import Note, UserError

FOLDER = "checkpoints"


class Moment(NamedTuple):
    """The progress of a run, and the name of its checkpoint: "50", or "50+3" in the middle of a step.

    Attributes:
      step: completed steps.
      updates: updates done in the next step, counting repeats.
    """

    step: int
    updates: int = 0

    def __str__(self) -> str:
        return f"{self.step}+{self.updates}" if self.updates else str(self.step)

    @staticmethod
    def named(name: str) -> Moment | None:
        """Parses the name of a checkpoint; returns None for any other name."""
        found = re.fullmatch(r"(0|[1-9]\d*)(?:\+([1-9]\d*))?", name, re.ASCII)
        return None if found is None else Moment(int(found[1]), int(found[2] or 0))


def moments_in(folder: Path) -> list[Moment]:
    """Returns the moments of all checkpoints in a folder, intact or damaged, in order. Other folders are ignored."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(filter(None, map(Moment.named, names)))


def latest(workdir: Path) -> Moment | None:
    """Returns the moment of a run's newest checkpoint, intact or damaged; None if it has none."""
    return max(moments_in(workdir / FOLDER), default=None)


def whole_moment(workdir: Path, wanted: Moment | None = None) -> Moment:
    """Returns the moment of a run's newest intact checkpoint; newer ones that are damaged are reported as a `Note`. All
    processes must call this; each checks its share of the files.

    Args:
      workdir: the run's folder, possibly of another run; nothing is changed there.
      wanted: a specific checkpoint, if no other is acceptable.

    Raises:
      UserError: there is no checkpoint, none is intact, or the wanted one is not.
    """
    folder, newest = (workdir / FOLDER).absolute(), latest(workdir)
    if newest is None:
        raise UserError(f"no checkpoint in {workdir}")
    if wanted is None:
        found, faults = newest_whole(folder)
        assert found is not None
        for damaged, fault in faults.items() if is_first() else ():
            message = f"{folder / str(damaged)} is damaged ({fault}); the checkpoint of step {found} is used instead"
            warnings.warn(message, Note, stacklevel=2)
        return found
    if wanted not in moments_in(folder):
        raise UserError(f"no checkpoint of step {wanted} in {workdir}, the newest is of step {newest}")
    fault = checksums.fault(folder / str(wanted), jax.process_index(), jax.process_count())
    if fault is not None:
        raise UserError(f"{folder / str(wanted)} is damaged ({fault}), but required; copy it here again")
    return wanted


def newest_whole(folder: Path) -> tuple[Moment | None, dict[Moment, str]]:
    """Returns the moment of the newest intact checkpoint, and what is wrong with newer ones. The result is the same in
    all processes; each checks its share of the files.

    Raises:
      UserError: there are checkpoints, but none is intact.
    """
    faults: dict[Moment, str] = {}
    names = broadcast_from_0(f"checkpoints in {folder}", [str(moment) for moment in moments_in(folder)])
    for moment in filter(None, map(Moment.named, reversed(names))):
        own = checksums.fault(folder / str(moment), jax.process_index(), jax.process_count())
        fault = first_decides(f"{folder}/{moment} is whole", own, lambda found: next(filter(None, found), None))
        if fault is None:
            return moment, faults
        faults[moment] = fault
    if faults:
        reasons = ", ".join(f"{step} ({fault})" for step, fault in faults.items())
        raise UserError(
            f"{folder}: no checkpoint is intact: {reasons}; copy an intact one here, or remove the folder to start over"
        )
    return None, faults
