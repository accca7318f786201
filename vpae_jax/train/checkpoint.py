"""Checkpoints: the whole train state and the data iterator's position, written by Orbax.

All processes write, each the shards that it holds, while training goes on. Neither the devices nor the number of
processes matters to who reads it.

A run looks for its start in this order:

    1. its own workdir's newest checkpoint (a restart continues);
    2. the previous phase's newest checkpoint (`config.previous`);
    3. the model directory (`config.model.path`);
    4. random weights (roles that start "fresh").
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from vpae_jax.files import write_text
from vpae_jax.runtime import processes
from vpae_jax.sharding import param_path
from vpae_jax.train.state import TrainState
from vpae_jax.types import Params, UserError

CONFIG_FILE = "config.json"
FOLDER = "checkpoints"


class Checkpoints:
    """A workdir's checkpoints.

    Args:
      workdir: the run's folder; checkpoints go to its `checkpoints/`.
      keep: how many are kept; older ones are removed once a newer one is complete.
    """

    def __init__(self, workdir: Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager((workdir / FOLDER).absolute(), options=options)

    def save(self, state: TrainState, data: Any) -> None:
        """Writes the state (at its own step) and the data iterator's position; complete or not there at all.

        Returns when the state is copied, and may be given up; writing goes on, and is waited for at the end. What went
        wrong with it is raised by the next call.
        """
        step = int(state.step)
        position = json.loads(json.dumps(data.get_state()))
        args = ocp.args.Composite(state=ocp.args.StandardSave(_plain(state)), data=ocp.args.JsonSave(position))
        self.manager.save(step, args=args, force=True)

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def restore(self, like: TrainState, data: Any) -> tuple[TrainState, Any]:
        """The newest checkpoint, in the shapes and shardings of `like`, which may be no more than these; the iterator
        continues after its last batch."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like, _abstract_key_data))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        restored = self.manager.restore(self.latest(), args=args)
        data.set_state(restored["data"])
        return _state(restored["state"]), data

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        # Completing a checkpoint takes all processes. After an error one of them may be gone; it would be waited for.
        if error is None or isinstance(error, UserError) or processes.client() is None:
            self.manager.close()


def latest_step(workdir: Path) -> int | None:
    """The step of a run's newest checkpoint; None when it has none."""
    folder = workdir / FOLDER
    # Orbax renames a folder to its bare number when it is complete. Its own manager would have to be opened by all
    # processes together.
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=None)


def read_state(
    workdir: Path,
    step: int | None = None,
    items: tuple[str, ...] = ("step", "params", "averages"),
    like: Mapping[str, Mapping[str, Params]] | None = None,
) -> dict[str, Any]:
    """What a run's checkpoint holds, as nested dicts of numpy arrays, whatever devices it was written on.

    Args:
      workdir: the run's folder.
      step: which checkpoint; the newest by default.
      items: of "step", "key", "params", "opt", "averages".
      like: of "params" and "averages", shapes with places of what is wanted, by name. They then hold these alone, as
        far as they are there, on their devices.

    Raises:
      UserError: when the workdir has no such checkpoint, or one of other shapes.
    """
    folder, newest = (workdir / FOLDER).absolute(), latest_step(workdir)
    if newest is None:
        raise UserError(f"no checkpoint in {workdir}")
    step = newest if step is None else step
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(folder, item_handlers=handlers) as manager:
        if step not in manager.all_steps():
            raise UserError(f"no checkpoint of step {step} in {workdir}, the newest is of step {newest}")
        tree = manager.item_metadata(step)["state"].tree
        wanted = {item: tree[item] for item in items}
        how: Any = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        for item in like or ():
            held = {role: places for role, places in (like or {})[item].items() if role in tree[item]}
            wanted[item] = {role: tree[item][role] for role in held}
            how[item] = {role: _into(wanted[item][role], places, folder, role) for role, places in held.items()}
        restore = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
        return manager.restore(step, args=ocp.args.Composite(state=restore))["state"]


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


def guard_config(workdir: Path, config: dict[str, Any], free: tuple[str, ...]) -> None:
    """Ties a workdir to one config: the first run writes it, a later one must agree.

    Args:
      config: the config as plain JSON values.
      free: keys, or whole parts, that may change between runs (how long, how often); all else decides the weights.

    Raises:
      UserError: naming the first key that differs.
    """
    file = workdir / CONFIG_FILE
    if file.exists():
        found = _flatten(json.loads(file.read_text()))
        given = _flatten(json.loads(json.dumps(config)))
        for key in sorted(set(found) | set(given)):
            if not {key, key.split(".")[0]} & set(free) and found.get(key) != given.get(key):
                raise UserError(
                    f"{workdir} belongs to another config: {key} is {found.get(key)!r} there, {given.get(key)!r} here; "
                    "choose another --workdir, or the same config"
                )
    if processes.is_first():
        write_text(file, json.dumps(config, indent=1))


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


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for name, sub in tree.items() for k, v in _flatten(sub, f"{prefix}{name}.").items()}
