"""From a method's roles to weights on the mesh: the only place that decides where a role starts (`Role.start`)."""

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
# Reads weights, given their dtype and where each lies.
Reader = Callable[[np.dtype, Placement], Params]


def remember(workdir: Path, moment: Moment | None) -> None:
    """Writes down which checkpoint of the phase before a run starts from; None for a run that starts from none."""
    if moment is not None:
        write_text(workdir / START, json.dumps({"previous_step": str(moment) if moment.updates else moment.step}))


def remembered(workdir: Path) -> Moment | None:
    """Which checkpoint of the phase before a run has started from; None where it is not written down, or cannot be
    read. Then that phase's newest whole one is meant."""
    return Moment.named(str((read_object(workdir / START) or {}).get("previous_step")))


def forget_damaged(workdir: Path) -> None:
    """Puts the file aside that does not say any more which step a run has started from."""
    if (file := workdir / START).exists():
        aside = put_aside(file)
        say(
            f"{file} cannot be read, and is now called {aside.name}; where the run needs the phase before, it takes "
            "its newest checkpoint"
        )


def resolve_model(path: str, workdir: Path) -> Path:
    """`files.resolve` for a model, which may be "tiny" or an id of the Hugging Face hub, too."""
    return resolve(path, workdir) if path.startswith(IN_WORKDIR) else locate(path)


def find_start(experiment: Experiment, method: Method, workdir: Path) -> ModelDirectory:
    """The model directory of a run.

    Raises:
      UserError: one of two experts, where a role would start from it, or a causal model, where a role would see whole
        clips with it.
    """
    source = find_model(resolve_model(experiment.model.path, workdir))
    if source.boundary is not None and starts_from_transformer(method):
        one = source.parts["transformer"].files[0].parent
        raise UserError(
            f"config.model.path: {source.path} has two experts, and a run starts from one transformer; make a model "
            f"with one of them, on another whose other parts are the same: python -m vpae_jax.convert {one} DST "
            "--format=diffusers --base=MODEL"
        )
    if starts_from_transformer(method) and not _is_causal(method):
        image = makes_from_image({name: part.config for name, part in source.parts.items()})
        if read_scheduler(source.folder, image).chunks is not None:
            raise UserError(
                f"config.model.path: {source.path} is a causal model, but {experiment.name} sees whole clips with it; "
                "give the model that it was made of"
            )
    return source


def _is_causal(method: Method) -> bool:
    """Whether all that starts from the model directory's transformer sees chunks in their order."""
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
    """First weights of some roles, read or drawn straight into their places.

    Args:
      source: the model directory, for roles that start from it.
      names: which roles.
      moment: which checkpoint of the phase before; by default its newest whole one. A run that continues names the one
        that it has started from, since roles that are frozen are read again.
      readers: of pretrained parts that are not the model directory's own, by part.

    Returns:
      the weights by role, and the checkpoint of the phase before that they start from (None when they do not).

    Raises:
      UserError: when the previous phase's checkpoint is missing, damaged, or lacks a role, or sat on another model; for
        a model directory in its place that does not fit; for a LoRA file that cannot be read, or is for another model.
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
    """A part of a model directory; LoRA files are merged into its transformer before that is rounded to `dtype`."""
    return read_part(source, part, dtype, place, merge if part == "transformer" else None)[1]


def previous_model(experiment: Experiment, workdir: Path) -> ModelDirectory | None:
    """The model directory that `config.previous.workdir` names in the place of a workdir; None where it names none."""
    folder = resolve(experiment.previous.workdir, workdir) if experiment.previous.workdir else None
    if folder is None or not folder.is_dir() or is_workdir(folder) or latest(folder) is not None:
        return None
    found = find_model(folder)
    return found if "transformer" in found.parts else None


def _read_given(given: ModelDirectory, source: ModelDirectory | None, name: str, role: Role, like: Params) -> Params:
    """A role's weights, where a model directory is what stands for the phase before."""
    where = f"config.previous.workdir: {given.path} is a model directory"
    if role.part != "transformer" or role.adapters is not None:
        what = role.part if role.adapters is None else "adapters"
        raise UserError(f"{where}, but role {name} is of kind {what}; name the workdir that trained it")
    if given.boundary is not None:
        raise UserError(f"{where} of two experts, and role {name} starts from one; convert the folder of one of them")
    if source is not None and given.part("transformer").config != source.part("transformer").config:
        raise UserError(f"{where} of another size than config.model.path, {source.path}; give one of the same")
    return read_pretrained(given, "transformer", None, *_places(like))


def _places(like: Params) -> tuple[np.dtype, Placement]:
    """The dtype of weights, and where each lies."""
    leaves = {sharding.param_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(like)}
    return next(iter(leaves.values())).dtype, lambda path, _: leaves[path].sharding


def previous_moment(experiment: Experiment, workdir: Path, moment: Moment | None = None) -> Moment:
    """Which checkpoint of the phase before a run starts from: its newest whole one, or `moment`'s, if that is whole.

    Raises:
      UserError: there is no such checkpoint, which says how to make one, or it is damaged.
    """
    previous = experiment.previous
    if not previous.workdir:
        raise UserError("config.previous.workdir is empty, but method.init is 'previous'; name the phase before")
    folder = resolve(previous.workdir, workdir)
    if latest(folder) is None:
        raise UserError(
            f"{experiment.name} starts from the previous phase, but there is no checkpoint in {folder}; run: "
            f"{previous.command} --workdir={folder}, or set --config.previous.workdir"
        )
    return whole_moment(folder, moment)


def read_previous(experiment: Experiment, workdir: Path, role: str, like: Params | None, moment: Moment) -> Params:
    """A role's weights in the phase before.

    Args:
      role: its name there.
      like: shapes with places; None for arrays on the host, as they are stored.
      moment: as `previous_moment` gives it.

    Raises:
      UserError: the phase before has no such role, or one of other sizes.
    """
    previous = experiment.previous
    folder = resolve(previous.workdir, workdir)
    places = [("averages", f"{role}_{EMA}"), ("params", role)]
    for item, name in places if previous.weights == "ema" else places[1:]:
        state = read_state(folder, moment, (item,), None if like is None else {item: {name: like}})
        if name in state[item]:
            return state[item][name]
    raise UserError(f"{folder} holds no {role} to start from; config.previous.workdir names another method's")
