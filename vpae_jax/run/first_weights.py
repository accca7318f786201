"""Initialises the weights of a method's roles on the mesh; the only place that interprets `Role.start`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np

from vpae_jax import sharding
from vpae_jax.config import Experiment
from vpae_jax.files import IN_WORKDIR, put_aside, resolve, write_text
from vpae_jax.methods.base import EMA, Method, Role
from vpae_jax.run.loras import compare_loras, lora_files, open_loras
from vpae_jax.run.workdir import read_object
from vpae_jax.runtime.processes import say
from vpae_jax.train.blueprint import Blueprint
from vpae_jax.train.checkpoint import read_state
from vpae_jax.train.newest import Moment, latest, whole_moment
from vpae_jax.train.state import places_of
from vpae_jax.types import Params, UserError
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.find import find_model, is_workdir
from vpae_jax.weights.loading import read_part
from vpae_jax.weights.locate import locate
from vpae_jax.weights.merging import Merging
from vpae_jax.weights.parts import makes_from_image
from vpae_jax.weights.settings import read_scheduler
from vpae_jax.weights.stream import Placement

START = "start.json"
# Reads weights, given their dtype and shardings.
Reader = Callable[[np.dtype, Placement], Params]


def remember(workdir: Path, moment: Moment | None) -> None:
    """Records which checkpoint of the previous phase a run starts from; None if it starts from none."""
    if moment is not None:
        write_text(workdir / START, json.dumps({"previous_step": str(moment) if moment.updates else moment.step}))


def remembered(workdir: Path) -> Moment | None:
    """Returns which checkpoint of the previous phase a run has started from. None if this was not recorded or cannot be
    read; then that phase's newest intact checkpoint is used."""
    return Moment.named(str((read_object(workdir / START) or {}).get("previous_step")))


def forget_damaged(workdir: Path) -> None:
    """Renames an unreadable file of `remember`."""
    if (file := workdir / START).exists():
        aside = put_aside(file)
        say(
            f"{file} cannot be read and was renamed to {aside.name}; if the run needs the previous phase, it uses its "
            "newest checkpoint"
        )


def resolve_model(path: str, workdir: Path) -> Path:
    """Like `files.resolve`, for a model, which may also be "tiny" or an id on the Hugging Face hub."""
    return resolve(path, workdir) if path.startswith(IN_WORKDIR) else locate(path)


def find_start(experiment: Experiment, method: Method, workdir: Path) -> ModelDirectory:
    """Finds the model directory that a run starts from.

    Raises:
      UserError: a role would start from a model with two experts, or would use a causal model on whole clips.
    """
    source = find_model(resolve_model(experiment.model.path, workdir))
    if source.boundary is not None and starts_from_transformer(method):
        one = source.parts["transformer"].files[0].parent
        raise UserError(
            f"config.model.path: {source.path} has two experts, but a run starts from one transformer; make a model "
            f"with one of them, and a base that has the same other parts: python -m vpae_jax.convert {one} DST "
            "--format=diffusers --base=MODEL"
        )
    if starts_from_transformer(method) and not _is_causal(method):
        image = makes_from_image({name: part.config for name, part in source.parts.items()})
        if read_scheduler(source.folder, image).chunks is not None:
            raise UserError(
                f"config.model.path: {source.path} is a causal model, but {experiment.name} applies it to whole clips; "
                "give the model that it was made from"
            )
    return source


def _is_causal(method: Method) -> bool:
    """Whether everything that starts from the model directory's transformer processes clips causally, in chunks."""
    frozen = any(
        role.start == "pretrained" and role.part == "transformer" and not role.trains for role in method.roles.values()
    )
    return method.student is not None and method.student.sampler.chunks is not None and not frozen


def starts_from_transformer(method: Method) -> bool:
    """Whether a role starts from the model directory's transformer."""
    return any(role.start == "pretrained" and role.part == "transformer" for role in method.roles.values())


def make_weights(
    blueprint: Blueprint,
    experiment: Experiment,
    workdir: Path,
    source: ModelDirectory | None,
    names: Iterable[str],
    moment: Moment | None = None,
    readers: Mapping[str, Reader] = MappingProxyType({}),
) -> tuple[dict[str, Params], Moment | None]:
    """Reads or draws the initial weights of some roles directly onto their devices.

    Args:
      source: the model directory, for roles that start from it.
      names: names of the roles.
      moment: which checkpoint of the previous phase; by default its newest intact one. A resumed run passes the one
        that it started from, since frozen roles are read again.
      readers: readers of pretrained parts that do not come from the model directory, by part.

    Returns:
      The weights by role, and the checkpoint of the previous phase that they start from (None if they do not).

    Raises:
      UserError: the previous phase's checkpoint is missing or damaged, lacks a role, or belongs to another model; a
        model directory given in its place does not fit; a LoRA file cannot be read, or is for another model.
    """
    roles = {name: blueprint.models.roles[name] for name in names}
    like = blueprint.held
    continued = any(role.previous(name) is not None for name, role in roles.items())
    given = previous_model(experiment, workdir) if continued else None
    start = previous_moment(experiment, workdir, moment) if continued and given is None else None
    if start is not None:
        compare_loras(experiment, workdir, blueprint.models.roles)
    result: dict[str, Params] = {}
    loras, merge = lora_files(experiment.model.lora, workdir), None
    for name, role in roles.items():
        earlier = role.previous(name)
        if earlier is not None and given is not None:
            result[name] = _read_given(given, source, name, role, like[name])
        elif earlier is not None:
            assert start is not None
            result[name] = read_previous(experiment, workdir, earlier, like[name], start)
        elif role.start == "pretrained":
            if source is None:
                raise UserError(f"role {name} starts from a model directory; set config.model.path")
            if loras and merge is None and role.part == "transformer":
                merge = open_loras(loras, source)
            read = readers.get(role.part, partial(read_pretrained, source, role.part, merge))
            result[name] = read(*_places(like[name]))
        else:
            index = list(blueprint.models.roles).index(name)
            key = jax.random.fold_in(jax.random.key(experiment.seed), 1000 + index)
            result[name] = jax.jit(blueprint.makers[name], out_shardings=places_of(like[name]))(key)
    return result, start


def read_pretrained(
    source: ModelDirectory, part: str, merge: Merging | None, dtype: np.dtype, place: Placement
) -> Params:
    """Reads a part of a model directory; LoRA files are merged into its transformer before rounding to `dtype`."""
    return read_part(source, part, dtype, place, merge if part == "transformer" else None)[1]


def previous_model(experiment: Experiment, workdir: Path) -> ModelDirectory | None:
    """Returns the model directory given in `config.previous.workdir` instead of a workdir; None if there is none."""
    folder = resolve(experiment.previous.workdir, workdir) if experiment.previous.workdir else None
    if folder is None or not folder.is_dir() or is_workdir(folder) or latest(folder) is not None:
        return None
    found = find_model(folder)
    return found if "transformer" in found.parts else None


def _read_given(given: ModelDirectory, source: ModelDirectory | None, name: str, role: Role, like: Params) -> Params:
    """Reads a role's weights from a model directory that was given instead of the previous phase."""
    where = f"config.previous.workdir: {given.path} is a model directory"
    if role.part != "transformer" or role.adapters is not None:
        what = role.part if role.adapters is None else "adapters"
        raise UserError(f"{where}, but role {name} is of kind {what}; give the workdir that trained it")
    if given.boundary is not None:
        raise UserError(f"{where} of two experts, but role {name} starts from one; convert the folder of one of them")
    if source is not None and given.part("transformer").config != source.part("transformer").config:
        raise UserError(f"{where} of another size than config.model.path, {source.path}; give one of the same size")
    return read_pretrained(given, "transformer", None, *_places(like))


def _places(like: Params) -> tuple[np.dtype, Placement]:
    """Returns the dtype of weights, and a function that returns the sharding of each."""
    leaves = {sharding.param_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(like)}
    return next(iter(leaves.values())).dtype, lambda path, _: leaves[path].sharding


def previous_moment(experiment: Experiment, workdir: Path, moment: Moment | None = None) -> Moment:
    """Returns which checkpoint of the previous phase a run starts from: its newest intact one, or `moment` if given.

    Raises:
      UserError: there is no such checkpoint (the message says how to make one), or it is damaged.
    """
    previous = experiment.previous
    if not previous.workdir:
        raise UserError("config.previous.workdir is empty, but method.init is 'previous'; give the previous phase")
    folder = resolve(previous.workdir, workdir)
    if latest(folder) is None:
        raise UserError(
            f"{experiment.name} starts from the previous phase, but there is no checkpoint in {folder}; run: "
            f"{previous.command} --workdir={folder}, or set --config.previous.workdir"
        )
    return whole_moment(folder, moment)


def read_previous(experiment: Experiment, workdir: Path, role: str, like: Params | None, moment: Moment) -> Params:
    """Reads a role's weights from the previous phase.

    Args:
      role: its name in that phase.
      like: abstract weights with shardings; None to get arrays on the host, as stored.
      moment: as returned by `previous_moment`.

    Raises:
      UserError: the previous phase has no such role, or one with other sizes.
    """
    previous = experiment.previous
    folder = resolve(previous.workdir, workdir)
    places = [("averages", f"{role}_{EMA}"), ("params", role)]
    for item, name in places if previous.weights == "ema" else places[1:]:
        state = read_state(folder, moment, (item,), None if like is None else {item: {name: like}})
        if name in state[item]:
            return state[item][name]
    raise UserError(
        f"{folder} has no {role} to start from, since another method was trained there; correct config.previous.workdir"
    )
