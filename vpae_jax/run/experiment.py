"""One run, from its config to the model directory it leaves behind.

config -> method, roles, weights on the mesh   (weights.py)
       -> batches                               (data/)
       -> the loop                              (train/loop.py), with previews and scores between steps
       -> a model directory                     (export.py)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from vpae_jax import sharding
from vpae_jax.config import Experiment
from vpae_jax.flow.sampler import ONE_STEP, Sampler
from vpae_jax.inference.pipeline import Pipeline, load_pipeline
from vpae_jax.methods import make_method
from vpae_jax.methods.base import EMA, Method, Student
from vpae_jax.models import presets
from vpae_jax.run import export
from vpae_jax.run.first_weights import (
    make_weights,
    read_pretrained,
    read_previous,
    resolve,
    resolve_model,
)
from vpae_jax.run.guard import Guard
from vpae_jax.run.inputs import Sources, make_batches, open_records, renders
from vpae_jax.run.previews import Clips, Generation, preview_of_digits, preview_of_records, write_previews
from vpae_jax.runtime.preemption import Stop, never
from vpae_jax.runtime.processes import as_first_says, first_alone, is_first, say, to_host
from vpae_jax.tasks.digits.clips import MovingDigits, check_size
from vpae_jax.train.blueprint import Blueprint, draw_up
from vpae_jax.train.checkpoint import CONFIG_FILE, guard_config, latest_step
from vpae_jax.train.loop import Hook, train
from vpae_jax.train.optim import make_optimizer
from vpae_jax.train.roles import check_roles
from vpae_jax.train.state import TrainState, abstract, create
from vpae_jax.types import Batch, CaptionedFrames, Params, PixelBatch, UserError
from vpae_jax.weights.find import find_model
from vpae_jax.weights.settings import Scheduler

# What may differ between two runs in one workdir: how long and how often, never what is computed. Where records lie
# may; a checkpoint's position says which they are.
FREE = ("steps", "accumulation", "mesh", "log_every", "sample_every", "checkpoint_every", "keep", "guard")
FREE_DATA = ("data.folder", "data.records", "data.videos", "data.workers", "data.max_bad")
# Roles that a run's model directory is made from.
PRODUCTS = ("generator", "vae", "encoders")


def run(experiment: Experiment, workdir: Path, devices: Sequence[Any] | None = None, stop: Stop = never) -> None:
    """Trains one phase in `workdir`, or continues it, and writes the resulting model directory to `workdir/model`.

    Of several processes, all call this; the first one writes what is not a checkpoint.

    Args:
      devices: JAX's devices that the mesh is laid over; all devices of all processes by default.
      stop: whether to stop after a step, with a checkpoint and no model directory.

    Raises:
      UserError: for a config that does not fit itself, the method, the devices, the model directory or the workdir.
    """
    method = make_method(experiment.method)
    check_roles(method, experiment.optimizers)
    check_settings(experiment, method)
    mesh = sharding.make_mesh(experiment.mesh, devices)
    experiment = dataclasses.replace(experiment, accumulation=sharding.parts_of_batch(experiment, mesh))
    pipeline = source = None
    transformer = presets.find(experiment.model.preset).transformer
    if method.batch is not PixelBatch:
        source = resolve_model(experiment.model.path, workdir)
        pipeline = load_pipeline(source, jnp.dtype(experiment.model.dtype), with_transformer=False)
        made, transformer = pipeline.defaults, pipeline.transformer.config
        if renders(experiment):
            check_size(str(source), made.num_frames, made.height, made.width)
    continuing = as_first_says("continuing", latest_step(workdir) is not None)
    blueprint = draw_up(experiment, method, mesh, transformer)
    optimizers = {role: make_optimizer(experiment.optimizers[role]) for role in blueprint.trained}
    # A run that continues has its trained weights in its checkpoint; so the phase before may be gone by then.
    needed = [name for name in method.roles if name in blueprint.frozen or not continuing]
    weights, previous_step = make_weights(blueprint, experiment, workdir, source, needed)
    frozen = {name: weights.pop(name) for name in blueprint.frozen}
    if previous_step is not None:
        folder, kind = resolve(experiment.previous.workdir, workdir), experiment.previous.weights
        say(f"{experiment.name} starts from step {previous_step} of {folder} ({kind} weights)")
    first_alone("config", partial(claim, experiment, workdir))

    guard = make_guard(experiment, workdir, pipeline)
    if guard is not None and not continuing:
        guard.begin(previous_step)
    records: Sources = ()
    if pipeline is not None and method.batch is Batch:
        records = open_records(experiment, workdir, pipeline)
    hooks = make_hooks(experiment, method, workdir, pipeline, guard, frozen, records)
    batches = make_batches(experiment, method, pipeline, mesh, records)
    del pipeline  # and with it the encoders: hooks keep what they need
    if continuing:
        state = abstract(blueprint.trained, method.roles, optimizers)
    else:
        state = create(experiment.seed, weights, method.roles, optimizers)
    put = partial(sharding.put_rows, mesh=mesh, size=experiment.batch_size)
    state = train(experiment, method, blueprint.models, optimizers, state, frozen, batches, put, workdir, hooks, stop)
    if (step := int(state.step)) < experiment.steps:
        say(f"stopped at step {step} of {experiment.steps}, and saved; the same command continues")
        return
    params = product_weights(method, state)
    if guard is not None:
        start = partial(starting_generator, blueprint, experiment, workdir, source, guard.read()["previous_step"])
        if not guard.decide(int(state.step), _average(state), start):
            params["generator"] = start()
    params = {name: to_host(params[name]) for name in params if name in PRODUCTS}
    if is_first():
        say(f"model directory: {write_product(experiment, method, workdir, params, source)}")


def claim(experiment: Experiment, workdir: Path) -> None:
    """Makes the workdir and ties it to this config. Raises `UserError` if it is tied to another, or not shared."""
    if not is_first() and not (workdir / CONFIG_FILE).is_file():
        raise UserError(
            f"{workdir}: what process 0 wrote there is not seen here; choose a --workdir that all hosts share"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    guard_config(workdir, dataclasses.asdict(experiment), FREE + FREE_DATA)


def check_settings(experiment: Experiment, method: Method) -> None:
    """Raises `UserError` for a batch of more clips than there are, an update that the run is too short for, or a guard
    of a method that trains no generator."""
    if experiment.guard.enabled and method.student is None:
        raise UserError("config.guard.enabled is True, but the method trains no generator to score; switch it off")
    if renders(experiment) and experiment.batch_size > experiment.data.clips:
        raise UserError(
            f"config.batch_size is {experiment.batch_size}, but config.data.clips is {experiment.data.clips}; "
            "lower the one or raise the other"
        )
    for update in method.updates:
        if update.starts >= experiment.steps:
            raise UserError(
                f"config.steps is {experiment.steps}, but the {update.name} is trained from step {update.starts} on; "
                "raise config.steps or shorten the warm-up"
            )


def starting_generator(
    blueprint: Blueprint, experiment: Experiment, workdir: Path, source: Path | None, previous_step: int | None
) -> Params:
    """The weights that the generator started from."""
    like = blueprint.trained["generator"]
    if blueprint.models.roles["generator"].previous("generator"):
        earlier = blueprint.models.roles["generator"].previous("generator") or "generator"
        return read_previous(experiment, workdir, earlier, like, previous_step)[0]
    if source is None:
        raise UserError("role generator starts from a model directory; set config.model.path")
    return read_pretrained(source, like)


def make_guard(experiment: Experiment, workdir: Path, pipeline: Pipeline | None) -> Guard | None:
    """The guard, where it is switched on and knows the clips: it scores generated digits."""
    if pipeline is None or not experiment.guard.enabled:
        return None
    if not renders(experiment):
        say("guard: off, since it scores digits alone; the run's last weights will be its model directory")
        return None
    return Guard(pipeline, workdir, experiment.guard)


def make_hooks(
    experiment: Experiment,
    method: Method,
    workdir: Path,
    pipeline: Pipeline | None,
    guard: Guard | None,
    frozen: Mapping[str, Params],
    records: Sources,
) -> tuple[Hook, ...]:
    """Scores of the guard and previews of the generator, for a run that has one."""
    hooks = []
    if guard is not None:
        hooks.append(Hook(experiment.guard.every, lambda step, state: guard.score(step, _average(state))))
    if pipeline is not None and method.student is not None and experiment.sample_every:
        real, generation = preview_of_digits(pipeline) if renders(experiment) else preview_of_records(pipeline, records)
        preview = make_preview(
            experiment, workdir, pipeline.defaults.fps, real, generation, frozen.get("teacher"), method.student
        )
        hooks.append(Hook(experiment.sample_every, preview))
    return tuple(hooks)


def make_preview(
    experiment: Experiment,
    workdir: Path,
    fps: float,
    real: Clips,
    generation: Generation,
    teacher: Params | None,
    student: Student,
) -> Callable[[int, TrainState], Mapping[str, float]]:
    """Writes clips of the data, the teacher, the generator and its average, side by side."""
    shift, sampler = experiment.sample_shift, student.sampler
    rows: dict[str, Any] = {"data": real}
    if teacher is not None:
        rows["teacher, 100 evaluations"] = generation(teacher, Sampler.even(50, shift, experiment.sample_guidance))

    def preview(step: int, state: TrainState) -> Mapping[str, float]:
        made = dict(rows)
        made["generator"] = generation(state.params["generator"], sampler)
        if student.average is not None:
            made["generator, average"] = generation(state.averages[f"{student.view}_{student.average}"], sampler)
        if is_first():
            write_previews(workdir / "previews", step, made, fps)
        return {}

    return preview


def write_product(
    experiment: Experiment, method: Method, workdir: Path, params: Mapping[str, Params], source: Path | None
) -> Path:
    """The model directory of a finished run, from its roles' final weights."""
    preset = experiment.model.preset
    sampler, shift = ONE_STEP if method.student is None else method.student.sampler, experiment.sample_shift
    if source is None:
        clips = MovingDigits("train", experiment.data.clips, experiment.data.seed)
        return export.write_autoencoder(workdir, preset, params["vae"], clips, Scheduler.of(sampler, shift))
    if method.batch is CaptionedFrames:
        return export.write_encoders(workdir, preset, params["encoders"], source)
    return export.write_student(workdir, find_model(source), export.Trained(params["generator"]), sampler, shift)


def product_weights(method: Method, state: TrainState) -> dict[str, Params]:
    """The weights of every trained role that a run's model directory is made from: their average where one is kept."""
    return {name: state.averages.get(f"{name}_{EMA}", params) for name, params in state.params.items()}


def _average(state: TrainState) -> Params:
    """The weights that a run is judged and exported by."""
    return state.averages.get(f"generator_{EMA}", state.params["generator"])
