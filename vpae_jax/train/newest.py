"""Which checkpoint of a workdir is read: the newest whole one."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import NamedTuple

import jax

from vpae_jax.runtime.processes import as_first_says, first_decides, is_first
from vpae_jax.train import checksums
from vpae_jax.types import Note, UserError

FOLDER = "checkpoints"


class Moment(NamedTuple):
    """How far a run is, and what its checkpoint of that is called: "50", or "50+3" in the middle of a step.

    Attributes:
      step: completed steps.
      updates: what is done of the next one: so many updates, each repeat counted.
    """

    step: int
    updates: int = 0

    def __str__(self) -> str:
        return f"{self.step}+{self.updates}" if self.updates else str(self.step)

    @staticmethod
    def named(name: str) -> Moment | None:
        """What a checkpoint of this name is of; None for what is called otherwise."""
        found = re.fullmatch(r"(0|[1-9]\d*)(?:\+([1-9]\d*))?", name, re.ASCII)
        return None if found is None else Moment(int(found[1]), int(found[2] or 0))


def moments_in(folder: Path) -> list[Moment]:
    """Of the checkpoints in a folder, be they whole or damaged, in order. A folder that is called otherwise is none."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(filter(None, map(Moment.named, names)))


def latest(workdir: Path) -> Moment | None:
    """What a run's newest checkpoint is of, be it whole or damaged; None when it has none."""
    return max(moments_in(workdir / FOLDER), default=None)


def whole_moment(workdir: Path, wanted: Moment | None = None) -> Moment:
    """What a run's newest whole checkpoint is of; newer ones that are damaged are a `Note`. All processes call this,
    and each looks at its share of the files.

    Args:
      workdir: the run's folder, which may be another's: nothing is changed there.
      wanted: which checkpoint, where no other will do.

    Raises:
      UserError: no checkpoint, none that is whole, or not the one that is wanted.
    """
    folder, newest = (workdir / FOLDER).absolute(), latest(workdir)
    if newest is None:
        raise UserError(f"no checkpoint in {workdir}")
    if wanted is None:
        found, faults = newest_whole(folder)
        assert found is not None
        for damaged, fault in faults.items() if is_first() else ():
            message = f"{folder / str(damaged)} is damaged ({fault}); the checkpoint of step {found} takes its place"
            warnings.warn(message, Note, stacklevel=2)
        return found
    if wanted not in moments_in(folder):
        raise UserError(f"no checkpoint of step {wanted} in {workdir}, the newest is of step {newest}")
    fault = checksums.fault(folder / str(wanted), jax.process_index(), jax.process_count())
    if fault is not None:
        raise UserError(f"{folder / str(wanted)} is damaged ({fault}), and needed; copy it here again")
    return wanted


def newest_whole(folder: Path) -> tuple[Moment | None, dict[Moment, str]]:
    """What the newest whole checkpoint is of, and what is wrong with newer ones; the same on all processes, each of
    which looks at its share of the files.

    Raises:
      UserError: there are some, but none is whole.
    """
    faults: dict[Moment, str] = {}
    names = as_first_says(f"checkpoints in {folder}", [str(moment) for moment in moments_in(folder)])
    for moment in filter(None, map(Moment.named, reversed(names))):
        own = checksums.fault(folder / str(moment), jax.process_index(), jax.process_count())
        fault = first_decides(f"{folder}/{moment} is whole", own, lambda found: next(filter(None, found), None))
        if fault is None:
            return moment, faults
        faults[moment] = fault
    if faults:
        reasons = ", ".join(f"{step} ({fault})" for step, fault in faults.items())
        raise UserError(
            f"{folder}: no checkpoint is whole: {reasons}; copy a whole one here, or remove the folder to train anew"
        )
    return None, faults
