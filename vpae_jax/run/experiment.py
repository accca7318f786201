"""One run, from its config to the model directory it leaves behind.

config -> method, roles, weights on the mesh   (weights.py)
       -> batches                               (its task, tasks/)
       -> the loop                              (train/loop.py), with previews and scores between steps
       -> a model directory                     (export.py, or the task)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from vpae_jax import sharding, tasks
from vpae_jax.config import Experiment
from vpae_jax.files import resolve
from vpae_jax.flow.sampler import Sampler
from vpae_jax.inference.pipeline import Pipeline, load_pipeline
from vpae_jax.inference.samplers import Denoiser
from vpae_jax.methods import make_method
from vpae_jax.methods.base import EMA, Method, Student
from vpae_jax.models import presets
from vpae_jax.run import export
from vpae_jax.run.first_weights import (
    make_weights,
    read_previous,
    resolve_model,
)
from vpae_jax.run.guard import Guard, obstacle
from vpae_jax.run.previews import Previews
from vpae_jax.runtime.preemption import Stop, never
from vpae_jax.runtime.processes import as_first_says, first_alone, is_first, say, to_host
from vpae_jax.tasks.base import Feed, Task, TooFew
from vpae_jax.train.blueprint import Blueprint, draw_up
from vpae_jax.train.checkpoint import CONFIG_FILE, guard_config, latest_step
from vpae_jax.train.loop import Hook, train
from vpae_jax.train.optim import make_optimizer
from vpae_jax.train.roles import check_roles
from vpae_jax.train.state import TrainState, abstract, create
from vpae_jax.types import Batch, Params, PixelBatch, UserError
from vpae_jax.weights.settings import Scheduler

# What may differ between two runs in one workdir: how long and how often, never what is computed. Where records lie
# may; a checkpoint's position says which they are.
FREE = ("steps", "accumulation", "mesh", "log_every", "sample_every", "checkpoint_every", "keep", "guard")
FREE_DATA = ("data.folder", "data.records", "data.videos", "data.workers", "data.max_bad", "data.held_out_records")
TEACHER_STEPS = 50
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
        transformer = pipeline.transformer.config
    tasks.check(experiment, method.batch, pipeline)
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

    task = tasks.open_task(experiment.data, workdir, experiment.model.path, experiment.method)
    guard = make_guard(experiment, method, workdir, task, pipeline)
    if guard is not None and not continuing:
        guard.begin(previous_step)
    hooks = make_hooks(experiment, method, workdir, task, pipeline, guard, blueprint, frozen)
    rows = sharding.own_rows(mesh, experiment.batch_size)
    feed = Feed(experiment.batch_size, experiment.seed, experiment.data.workers, rows, experiment.data.max_bad)
    batches = task.batches(method.batch, pipeline, feed)
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
        assert method.student is not None
        begin = partial(starting_weights, blueprint, experiment, workdir, guard.read()["previous_step"])
        start = partial(starting_student, blueprint, method.student, frozen, begin)
        if not guard.decide(int(state.step), judged(blueprint, method.student, frozen, state), start):
            params["generator"] = begin()
    params = {name: to_host(params[name]) for name in params if name in PRODUCTS}
    if is_first():
        say(f"model directory: {write_product(experiment, method, workdir, task, params, source)}")


def claim(experiment: Experiment, workdir: Path) -> None:
    """Makes the workdir and ties it to this config. Raises `UserError` if it is tied to another, or not shared."""
    if not is_first() and not (workdir / CONFIG_FILE).is_file():
        raise UserError(
            f"{workdir}: what process 0 wrote there is not seen here; choose a --workdir that all hosts share"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    guard_config(workdir, dataclasses.asdict(experiment), FREE + FREE_DATA)


def check_settings(experiment: Experiment, method: Method) -> None:
    """Raises `UserError` for an update that the run is too short for."""
    for update in method.updates:
        if update.starts >= experiment.steps:
            raise UserError(
                f"config.steps is {experiment.steps}, but the {update.name} is trained from step {update.starts} on; "
                "raise config.steps or shorten the warm-up"
            )


def starting_weights(blueprint: Blueprint, experiment: Experiment, workdir: Path, previous_step: int | None) -> Params:
    """The student's weights as the phase before left them."""
    earlier = blueprint.models.roles["generator"].previous("generator") or "generator"
    return read_previous(experiment, workdir, earlier, blueprint.trained["generator"], previous_step)[0]


def starting_student(
    blueprint: Blueprint, student: Student, frozen: Mapping[str, Params], begin: Callable[[], Params]
) -> Denoiser:
    """What the run's first weights are judged by: averages begin at the weights."""
    return Denoiser(*blueprint.models.weights(student.view, {**frozen, "generator": begin()}, {}))


def judged(blueprint: Blueprint, student: Student, frozen: Mapping[str, Params], state: TrainState) -> Denoiser:
    """What a run is judged by and exports: the student's average where it keeps one."""
    return list(shown(blueprint, student, frozen, state).values())[-1]


def shown(
    blueprint: Blueprint, student: Student, frozen: Mapping[str, Params], state: TrainState
) -> dict[str, Denoiser]:
    """What previews show of a train state."""
    views = {"generator": student.view}
    if student.average is not None:
        views["generator, average"] = f"{student.view}_{student.average}"
    held = {**frozen, **state.params}
    return {name: Denoiser(*blueprint.models.weights(view, held, state.averages)) for name, view in views.items()}


def make_guard(
    experiment: Experiment, method: Method, workdir: Path, task: Task, pipeline: Pipeline | None
) -> Guard | None:
    """The guard where it can judge; says why where it cannot."""
    if not experiment.guard.enabled:
        return None
    reason, student = obstacle(method), method.student
    if reason is None and student is not None and pipeline is not None:
        try:
            return Guard(task, pipeline, workdir, experiment.guard, student.sampler)
        except TooFew as error:
            reason = str(error)
    say(f"guard: off, since {reason}; the run's last weights will be its model directory")
    return None


def make_hooks(
    experiment: Experiment,
    method: Method,
    workdir: Path,
    task: Task,
    pipeline: Pipeline | None,
    guard: Guard | None,
    blueprint: Blueprint,
    frozen: Mapping[str, Params],
) -> tuple[Hook, ...]:
    """Scores of the guard and previews of the student, for a run that has one."""
    hooks, student = [], method.student
    if pipeline is None or student is None:
        return ()
    if guard is not None:
        hooks.append(
            Hook(
                experiment.guard.every, lambda step, state: guard.score(step, judged(blueprint, student, frozen, state))
            )
        )
    if experiment.sample_every:
        networks, teacher = partial(shown, blueprint, student, frozen), None
        if "teacher" in frozen:
            how = Sampler.even(TEACHER_STEPS, experiment.sample_shift, experiment.sample_guidance)
            teacher = Denoiser(*blueprint.models.weights("teacher", frozen, {})), how
        try:
            previews = Previews(task, pipeline, workdir, networks, student.sampler, teacher)
            hooks.append(Hook(experiment.sample_every, previews))
        except TooFew as error:
            say(f"previews: off, since {error}")
    return tuple(hooks)


def write_product(
    experiment: Experiment,
    method: Method,
    workdir: Path,
    task: Task,
    params: Mapping[str, Params],
    source: Path | None,
) -> Path:
    """The model directory of a finished run, from its roles' final weights."""
    student = method.student
    steps, guidance = (1, 1.0) if student is None else (student.sampler.steps, student.sampler.guidance)
    scheduler = Scheduler.of_student(experiment.sample_shift, steps, guidance)
    if source is None or method.batch is not Batch:
        return task.write_model(workdir, experiment.model.preset, params, source, scheduler)
    return export.write_student(workdir, params["generator"], source, scheduler)


def product_weights(method: Method, state: TrainState) -> dict[str, Params]:
    """The weights of every trained role that a run's model directory is made from: their average where one is kept."""
    return {name: state.averages.get(f"{name}_{EMA}", params) for name, params in state.params.items()}
