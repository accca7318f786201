"""Checkpoints: the whole train state and the data iterator's position, written by Orbax.

    checkpoints/200, checkpoints/300   complete, named after their step, with checksums of all files (`checksums.py`)
    checkpoints/300+2                  the same, in the middle of step 301 after two of its updates
    checkpoints/unfinished             being written or removed; useless once its run has ended
    checkpoints/damaged-300            a damaged checkpoint that was renamed

All processes write their own shards while training continues. A checkpoint can be read on any devices and by any number
of processes. Nothing is read before its checksums have been verified.

A run looks for its start in this order:

    1. its own workdir's newest whole checkpoint (a restart continues);
    2. the previous phase's newest whole checkpoint (`config.previous`);
    3. the model directory (`config.model.path`);
    4. random weights (roles that start "fresh").
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from vpae_jax.files import put_aside, refused_writes
from vpae_jax.runtime import processes
from vpae_jax.runtime.processes import first_decides, is_first, say
from vpae_jax.sharding import param_path
from vpae_jax.train import checksums
from vpae_jax.train.async_writer import AsyncWriter, remove_what_is_written
from vpae_jax.train.newest import FOLDER, Moment, moments_in, newest_whole, whole_moment
from vpae_jax.train.state import TrainState
from vpae_jax.types import Params, UserError

CONFIG_FILE = "config.json"
UNFINISHED = "unfinished"


class Checkpoints:
    """The checkpoints of the run that trains in a workdir; all of its processes must call each method.

    As a context manager, it finally waits for the checkpoint that is being written.

    Args:
      workdir: the run's folder; checkpoints are written to `checkpoints/` in it.
      keep: number of checkpoints to keep; older ones are removed once a newer one is complete.

    Raises:
      UserError: a partial checkpoint of a killed run cannot be removed.
    """

    def __init__(self, workdir: Path, keep: int = 2):
        self.folder, self.keep = (workdir / FOLDER).absolute(), keep
        self.writer = AsyncWriter(
            state=ocp.StandardCheckpointHandler(), data=ocp.JsonCheckpointHandler(), metrics=ocp.JsonCheckpointHandler()
        )
        self.thread, self.entered = ThreadPoolExecutor(1, "checkpoint"), ExitStack()
        self.saving: Future[None] | None = None
        if is_first() and (self.folder / UNFINISHED).exists():
            with refused_writes(self.folder):
                shutil.rmtree(self.folder / UNFINISHED)

    def save(
        self,
        state: TrainState,
        position: Mapping[str, Any],
        updates: int = 0,
        metrics: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Writes the state (at its own step) and the data iterator's position, atomically.

        First waits for the previous save. Returns when the state has been copied, so that its buffers may be reused;
        writing continues in the background.

        Args:
          updates: number of updates done in the current, unfinished step, counting repeats.
          metrics: metrics reported by these updates.

        Raises:
          UserError: this or the previous checkpoint cannot be written.
        """
        self.wait()
        moment, unfinished = Moment(int(state.step), updates), self.folder / UNFINISHED
        items = {"state": ocp.args.StandardSave(_plain(state)), "data": ocp.args.JsonSave(dict(position))}
        if updates:
            items["metrics"] = ocp.args.JsonSave(dict(metrics))
        with refused_writes(self.folder):
            if is_first():
                unfinished.mkdir(parents=True, exist_ok=True)
            self.writer.save(unfinished / str(moment), **items)
        self.saving = self.thread.submit(self._finish, moment)

    def check(self) -> None:
        """Raises `UserError` if the last checkpoint is known to have failed."""
        if self.saving is not None and self.saving.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the last checkpoint is complete. Raises `UserError` if it could not be written."""
        saving, self.saving = self.saving, None
        if saving is not None:
            saving.result()

    def latest(self) -> Moment | None:
        """Returns the moment of the last checkpoint, after waiting for it to be complete; None if there is none."""
        self.wait()
        return max(moments_in(self.folder), default=None)

    def newest(self) -> Moment | None:
        """Returns the moment of the newest intact checkpoint, and renames newer ones that are damaged; None if there is
        no checkpoint.

        Raises:
          UserError: there are checkpoints, but none is intact.
        """
        found, faults = newest_whole(self.folder)
        for damaged, fault in faults.items() if is_first() else ():
            path = self.folder / str(damaged)
            aside = put_aside(path)
            say(f"{path} is damaged ({fault}) and was renamed to {aside.name}; the run goes back to step {found}")
        return found

    def restore(self, moment: Moment, like: TrainState) -> tuple[TrainState, dict[str, Any], dict[str, float]]:
        """Restores a checkpoint.

        Args:
          moment: which checkpoint.
          like: a state with the required shapes and shardings; it may be abstract.

        Returns:
          The state, the data iterator's position, and the metrics reported by the updates of an unfinished step.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like, _abstract_key_data))
        items = {"state": ocp.args.StandardRestore(abstract), "data": ocp.args.JsonRestore()}
        if moment.updates:
            items["metrics"] = ocp.args.JsonRestore()
        found = self.writer.restore(self.folder / str(moment), **items)
        return _state(found["state"]), found["data"], found["metrics"] if moment.updates else {}

    def __enter__(self) -> Checkpoints:
        self.entered.enter_context(self.writer)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self.entered:
            # Completing a checkpoint needs all processes. After an error, one may be gone, and this would wait for it.
            if error is None or isinstance(error, UserError) or processes.client() is None:
                self._close()

    def _close(self) -> None:
        try:
            self.wait()
        finally:
            self.writer.close()
            self.thread.shutdown()
            if is_first() and (self.writer.failed or (self.folder / UNFINISHED).exists()):
                remove_what_is_written(self.folder / UNFINISHED)

    def _finish(self, moment: Moment) -> None:
        """Computes checksums of what was written, then renames the checkpoint. Runs in a thread, in all processes."""
        with refused_writes(self.folder):
            self.writer.finish()
            own = checksums.of_process(self.folder / UNFINISHED / str(moment), jax.process_index())
            first_decides(f"{self.folder}/{moment} is written", own, partial(self._complete, moment))

    def _complete(self, moment: Moment, sums: list[checksums.Sums]) -> None:
        unfinished = self.folder / UNFINISHED
        checksums.write(unfinished / str(moment), sums)
        (unfinished / str(moment)).rename(self.folder / str(moment))
        for old in moments_in(self.folder)[: -self.keep]:
            (self.folder / str(old)).rename(unfinished / str(old))
        shutil.rmtree(unfinished, ignore_errors=True)  # files that another host still reads are removed next time


def read_state(
    workdir: Path,
    moment: Moment | None = None,
    items: tuple[str, ...] = ("step", "params", "averages"),
    like: Mapping[str, Mapping[str, Params]] | None = None,
) -> dict[str, Any]:
    """Reads a run's checkpoint as nested dicts of numpy arrays, whatever devices it was written on.

    Args:
      workdir: the run's folder.
      moment: which checkpoint, as returned by `whole_moment`; by default this is called here.
      items: a selection of "step", "key", "params", "opt", "averages".
      like: for "params" and "averages", abstract arrays with shardings, by name. Only these are then read, as far as
        they exist, directly onto their devices.

    Raises:
      UserError: as `whole_moment`, or the checkpoint has other shapes.
    """
    moment = whole_moment(workdir) if moment is None else moment
    folder = (workdir / FOLDER).absolute() / str(moment) / "state"
    handler = ocp.PyTreeCheckpointHandler()
    # The checkpointer's own `metadata` would warn of a file that is not needed.
    tree = handler.metadata(folder).tree  # pyright: ignore[reportArgumentType]
    with ocp.Checkpointer(handler) as reader:
        wanted = {item: tree[item] for item in items}
        how: Any = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        for item in like or ():
            held = {role: places for role, places in (like or {})[item].items() if role in tree[item]}
            wanted[item] = {role: tree[item][role] for role in held}
            how[item] = {role: _into(wanted[item][role], places, folder, role) for role, places in held.items()}
        return reader.restore(folder, args=ocp.args.PyTreeRestore(wanted, how, partial_restore=True))


def _into(stored: Any, places: Params, folder: Path, role: str) -> Any:
    """Returns how to restore one role's weights onto their devices. Raises `UserError` if they have other shapes."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        return {param_path(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    found, expected = shapes(stored), shapes(places)
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise UserError(
                f"{folder}: {role} parameter {name} has shape {found.get(name)}, expected {expected.get(name)}; give "
                "the sizes that it was trained with (config.model.preset, config.model.path, config.method.generator, "
                "ranks, config.networks)"
            )
    return jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype), places)


def _plain(state: TrainState, key_data: Callable[[Any], Any] = jax.random.key_data) -> dict[str, Any]:
    return {
        "step": state.step,
        "key": key_data(state.key),
        "params": state.params,
        "opt": state.opt,
        "averages": state.averages,
    }


def _abstract_key_data(key: Any) -> jax.ShapeDtypeStruct:
    data = jax.eval_shape(jax.random.key_data, key)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)


def _state(plain: dict[str, Any]) -> TrainState:
    return TrainState(**{**plain, "key": jax.random.wrap_key_data(plain["key"])})
