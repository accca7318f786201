"""Checkpoints: the whole train state and the data iterator's position, written by Orbax.

    checkpoints/200, checkpoints/300   complete, each called by its step, with checksums of all files (`checksums.py`)
    checkpoints/300+2                  the same in the middle of step 301, after two of its updates
    checkpoints/unfinished             what is being written or removed; worth nothing once its run has ended
    checkpoints/damaged-300            not what was written, and put aside

All processes write, each the shards that it holds, while training goes on. Neither the devices nor the number of
processes matters to who reads it. Nothing is read whose checksums were not compared.

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
    """A workdir's checkpoints, for the run that trains there; all of its processes call each method.

    As a context manager it waits in the end for the checkpoint that is being written.

    Args:
      workdir: the run's folder; checkpoints go to its `checkpoints/`.
      keep: how many are kept; older ones are removed once a newer one is complete.

    Raises:
      UserError: what a killed run has left half-written cannot be removed.
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
        """Writes the state (at its own step) and the data iterator's position; complete or not there at all.

        Returns when the state is copied, and may be given up; writing goes on. Waits for the one before.

        Args:
          updates: what is done of the step that is under way, each repeat counted.
          metrics: what these updates reported.

        Raises:
          UserError: this one, or the one before, cannot be written.
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
        """Raises `UserError` when the last checkpoint could not be written, as far as that is known."""
        if self.saving is not None and self.saving.done():
            self.wait()

    def wait(self) -> None:
        """Returns when the last checkpoint is complete. Raises `UserError` when it could not be written."""
        saving, self.saving = self.saving, None
        if saving is not None:
            saving.result()

    def latest(self) -> Moment | None:
        """What the last complete checkpoint is of, which is waited for; None if there is none."""
        self.wait()
        return max(moments_in(self.folder), default=None)

    def newest(self) -> Moment | None:
        """What the newest whole checkpoint is of; damaged ones that are newer are put aside. None if there is none.

        Raises:
          UserError: none of them is whole.
        """
        found, faults = newest_whole(self.folder)
        for damaged, fault in faults.items() if is_first() else ():
            path = self.folder / str(damaged)
            aside = put_aside(path)
            say(f"{path} is damaged ({fault}), and now called {aside.name}; the run goes back to step {found}")
        return found

    def restore(self, moment: Moment, like: TrainState) -> tuple[TrainState, dict[str, Any], dict[str, float]]:
        """A checkpoint: its state, in the shapes and shardings of `like`, which may be no more than these; the data
        iterator's position; and what the updates of the step that was under way reported."""
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
            # Completing a checkpoint takes all processes. After an error one may be gone; it would be waited for.
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
        """Sums what is written; then the checkpoint gets its name. In a thread of its own, on all processes."""
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
        shutil.rmtree(unfinished, ignore_errors=True)  # what another host still reads goes the next time


def read_state(
    workdir: Path,
    moment: Moment | None = None,
    items: tuple[str, ...] = ("step", "params", "averages"),
    like: Mapping[str, Mapping[str, Params]] | None = None,
) -> dict[str, Any]:
    """What a run's checkpoint holds, as nested dicts of numpy arrays, whatever devices it was written on.

    Args:
      workdir: the run's folder.
      moment: which checkpoint, as `whole_moment` has given it; by default that is asked.
      items: of "step", "key", "params", "opt", "averages".
      like: of "params" and "averages", shapes with places of what is wanted, by name. They then hold these alone, as
        far as they are there, on their devices.

    Raises:
      UserError: as `whole_moment`, or for a checkpoint of other shapes.
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
    """How to restore one role's weights into their places. Raises `UserError` when they have other shapes."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        return {param_path(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    found, expected = shapes(stored), shapes(places)
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise UserError(
                f"{folder}: {role} parameter {name} has shape {found.get(name)}, expected {expected.get(name)}; it was "
                "trained with other sizes (config.model.preset, config.model.path, config.method.generator, ranks, "
                "config.networks)"
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
