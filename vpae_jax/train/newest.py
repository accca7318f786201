"""Which checkpoint of a workdir is read: the newest whole one."""

from __future__ import annotations

import warnings
from pathlib import Path

import jax

from vpae_jax.runtime.processes import as_first_says, first_decides, is_first
from vpae_jax.train import checksums
from vpae_jax.types import Note, UserError

FOLDER = "checkpoints"


def steps_in(folder: Path) -> list[int]:
    """Of the checkpoints in a folder, be they whole or damaged, in order. A folder that is called otherwise is none."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def latest_step(workdir: Path) -> int | None:
    """The step of a run's newest checkpoint, be it whole or damaged; None when it has none."""
    return max(steps_in(workdir / FOLDER), default=None)


def whole_step(workdir: Path, step: int | None = None) -> int:
    """The step of a run's newest whole checkpoint; newer ones that are damaged are a `Note`. All processes call this,
    and each looks at its share of the files.

    Args:
      workdir: the run's folder, which may be another's: nothing is changed there.
      step: which checkpoint, where no other will do.

    Raises:
      UserError: no checkpoint, none that is whole, or not the one that is wanted.
    """
    folder, newest = (workdir / FOLDER).absolute(), latest_step(workdir)
    if newest is None:
        raise UserError(f"no checkpoint in {workdir}")
    if step is None:
        found, faults = newest_whole(folder)
        assert found is not None
        for damaged, fault in faults.items() if is_first() else ():
            message = f"{folder / str(damaged)} is damaged ({fault}); the checkpoint of step {found} takes its place"
            warnings.warn(message, Note, stacklevel=2)
        return found
    if step not in steps_in(folder):
        raise UserError(f"no checkpoint of step {step} in {workdir}, the newest is of step {newest}")
    fault = checksums.fault(folder / str(step), jax.process_index(), jax.process_count())
    if fault is not None:
        raise UserError(f"{folder / str(step)} is damaged ({fault}), and needed; copy it here again")
    return step


def newest_whole(folder: Path) -> tuple[int | None, dict[int, str]]:
    """The step of the newest whole checkpoint, and what is wrong with newer ones; the same on all processes, each of
    which looks at its share of the files.

    Raises:
      UserError: there are some, but none is whole.
    """
    faults: dict[int, str] = {}
    for step in reversed(as_first_says(f"checkpoints in {folder}", steps_in(folder))):
        own = checksums.fault(folder / str(step), jax.process_index(), jax.process_count())
        fault = first_decides(f"{folder}/{step} is whole", own, lambda found: next(filter(None, found), None))
        if fault is None:
            return step, faults
        faults[step] = fault
    if faults:
        reasons = ", ".join(f"{step} ({fault})" for step, fault in faults.items())
        raise UserError(
            f"{folder}: no checkpoint is whole: {reasons}; copy a whole one here, or remove the folder to train anew"
        )
    return None, faults
