"""One run, from its config to the model directory that it writes.

config -> method, roles, weights on the mesh   (train/blueprint.py, first_weights.py)
       -> batches                               (the task, tasks/)
       -> the loop                              (train/loop.py), with previews and scores between steps
       -> a model directory                     (export.py, or the task)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from vpae_jax import sharding, tasks
from vpae_jax.config import Experiment
from vpae_jax.files import resolve
from vpae_jax.flow.sampler import ONE_STEP, Sampler
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.inference.samplers import Denoiser
from vpae_jax.methods import make_method
from vpae_jax.methods.base import EMA, Method
from vpae_jax.models import presets
from vpae_jax.run import export, image_encoders
from vpae_jax.run.agreement import reads, require_same, started_with
from vpae_jax.run.first_weights import (
    find_start,
    forget_damaged,
    make_weights,
    previous_model,
    remember,
    remembered,
    starts_from_transformer,
)
from vpae_jax.run.guard import Guard, doubt, obstacle
from vpae_jax.run.loras import LORA, check_loras, lora_files
from vpae_jax.run.overview import overview
from vpae_jax.run.previews import Previews
from vpae_jax.run.scoring import Scorer
from vpae_jax.run.student import Maker
from vpae_jax.run.workdir import Lock, claim, require_config
from vpae_jax.runtime.preemption import Stop, never
from vpae_jax.runtime.processes import broadcast_from_0, is_first, say, to_host
from vpae_jax.tasks.base import Feed, Task, TooFew
from vpae_jax.train import trackers
from vpae_jax.train.blueprint import PixelParts, draw_up
from vpae_jax.train.loop import Hook, train
from vpae_jax.train.newest import Moment, latest
from vpae_jax.train.optim import make_optimizer
from vpae_jax.train.profiling import Window
from vpae_jax.train.roles import check_roles
from vpae_jax.train.state import abstract, create
from vpae_jax.types import Params, PixelBatch, UserError
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.filenames import PRODUCT
from vpae_jax.weights.image_encoders import StoredEncoder
from vpae_jax.weights.merging import LoraFile
from vpae_jax.weights.settings import Scheduler

UNGUARDED = "the run's last weights will be exported"


def run(experiment: Experiment, workdir: Path, devices: Sequence[Any] | None = None, stop: Stop = never) -> None:
    """Trains one phase in `workdir`, or resumes it, and writes the resulting model directory to `workdir/model`.

    All processes of a run must call this with the same arguments; only the first one writes anything but checkpoints.
    Only one run at a time may use a workdir.

    Args:
      devices: JAX devices for the mesh; by default all devices of all processes.
      stop: returns whether to stop after an update, with a checkpoint but without a model directory.

    Raises:
      UserError: the config is inconsistent, or does not fit the method, the devices, the model directory, the workdir
        or the other processes; another run uses the workdir; something cannot be read or written.
    """
    require_same("what they were started with", partial(started_with, experiment))
    require_config(workdir, experiment)
    with Lock(workdir) as lock:
        _run(experiment, workdir, lock, devices, stop)


def _run(experiment: Experiment, workdir: Path, lock: Lock, devices: Sequence[Any] | None, stop: Stop) -> None:
    method = make_method(experiment.method)
    check_roles(method, experiment.optimizers)
    check_settings(experiment, method)
    trackers.require(experiment.tracker)
    mesh = sharding.make_mesh(experiment.mesh, devices)
    parts = 1 if method.whole_batch else sharding.parts_of_batch(experiment, mesh)
    experiment = dataclasses.replace(experiment, accumulation=parts)
    source, loras, encoder, pipeline, given = _inputs(experiment, method, workdir)
    fresh = presets.find(experiment.model.preset).transformer
    transformer = fresh if pipeline is None else pipeline.transformer.config
    tasks.check(experiment, method, pipeline, workdir)
    continuing = broadcast_from_0("continuing", latest(workdir) is not None)
    looked_by = PixelParts.of(presets.find(experiment.model.preset))
    if pipeline is not None:
        looked_by = dataclasses.replace(looked_by, vae=pipeline.vae.config)
    if encoder is not None:
        looked_by = dataclasses.replace(looked_by, image_encoder=encoder.config)
    blueprint = draw_up(experiment, method, mesh, transformer, looked_by)
    optimizers = {role: make_optimizer(experiment.optimizers[role]) for role in blueprint.trained}
    # A resumed run has its trained weights in its checkpoint. So the previous phase may have been deleted, unless a
    # frozen role starts from it.
    needed = [name for name in method.roles if name in blueprint.frozen or not continuing]
    begun = Moment.named(broadcast_from_0("start", str(remembered(workdir)))) if continuing else None
    known = begun is not None
    readers = {} if encoder is None else {image_encoders.PART: encoder.read}
    weights, first = make_weights(blueprint, experiment, workdir, source, needed, begun, readers)
    frozen = {name: weights.pop(name) for name in blueprint.frozen}
    begun = first if begun is None else begun
    if begun is not None and not continuing:
        folder, kind = resolve(experiment.previous.workdir, workdir), experiment.previous.weights
        doubted = f"; {doubts}" if (doubts := doubt(folder)) else ""
        say(f"{experiment.name} starts from step {begun} of {folder} ({kind} weights){doubted}")
    elif given is not None and not continuing:
        say(f"{experiment.name} starts from the model in {given.path}")
    claim(experiment, workdir, lock)
    if is_first() and not known:
        if continuing:
            forget_damaged(workdir)
        remember(workdir, begun)
    say(overview(blueprint))

    task = tasks.open_task(experiment.data, workdir, experiment.model.path, experiment.method)
    maker = None if method.student is None else Maker(blueprint.models, method.student, frozen)
    judging = pipeline
    if pipeline is not None and mesh.size > 1 and not mesh.is_multi_process:  # it also decodes the real clips
        judging = pipeline.over(mesh)
    scorer, guard = make_scorer(experiment, method, maker, workdir, task, judging)
    for one in (scorer, guard):
        if one is not None and not continuing:
            one.begin()
    hooks = make_hooks(experiment, workdir, task, judging, scorer, maker)
    rows = sharding.own_rows(mesh, experiment.batch_size)
    data = experiment.data
    feed = Feed(experiment.batch_size, experiment.seed, data.workers, rows, data.max_bad, method.known_noise)
    batches = task.batches(method.batch, pipeline, feed)
    del pipeline, judging  # frees the encoders; hooks keep what they need
    if continuing:
        state = abstract(blueprint.trained, method.roles, optimizers)
    else:
        state = create(experiment.seed, weights, method.roles, optimizers)
    put = partial(sharding.put_rows, mesh=mesh, size=experiment.batch_size)
    state = train(experiment, method, blueprint.models, optimizers, state, frozen, batches, put, workdir, hooks, stop)
    if (step := int(state.step)) < experiment.steps:
        say(f"stopped at step {step} of {experiment.steps} and saved a checkpoint; run the same command to resume")
        return
    params, averages, facts = state.params, state.averages, {}
    if maker is not None and guard is not None:

        def begin() -> dict[str, Params]:
            try:
                return make_weights(blueprint, experiment, workdir, source, maker.roles, begun)[0]
            except UserError as error:
                raise UserError(f"{error}; or keep the trained weights with --config.guard.enabled=False") from error

        decided = guard.decide(int(state.step), maker.judged(state), lambda: maker.of_start(begin()))
        facts = {"guard": decided.reason}
        if not decided.kept:
            params, averages = begin(), None
    folder = write_student(experiment, workdir, task, source, maker, params, averages, facts, loras)
    say(f"model directory: {folder}")


class Inputs(NamedTuple):
    """What a run reads besides its clips.

    Attributes:
      source: the model directory; None for a method that trains an autoencoder on pixels.
      loras: LoRA files that are merged into it.
      encoder: the image encoder of a discriminator on pixels.
      pipeline: pipeline of the model directory, without the transformer's weights, and without those of the encoders if
        the data is already encoded.
      given: a model directory given instead of the previous phase's workdir; None if that is a run, or there is none.
    """

    source: ModelDirectory | None
    loras: tuple[LoraFile, ...]
    encoder: StoredEncoder | None
    pipeline: Pipeline | None
    given: ModelDirectory | None


def _inputs(experiment: Experiment, method: Method, workdir: Path) -> Inputs:
    """Finds what a run reads, compares it between processes, and loads the pipeline that decodes latents and, unless
    the data is already encoded, encodes prompts and images."""
    source = None if method.batch is PixelBatch else find_start(experiment, method, workdir)
    loras = lora_files(experiment.model.lora, workdir)
    check_loras(loras, source is not None and starts_from_transformer(method))
    encoder = image_encoders.find(experiment, method, source, workdir)
    continues = any(role.previous(name) is not None for name, role in method.roles.items())
    given = previous_model(experiment, workdir) if continues else None
    more = {
        **({} if encoder is None else {"the image encoder": encoder.files}),
        **({LORA: [file.path for file in loras]} if loras else {}),
        **({} if given is None else {"the model to start from": given.part("transformer").files}),
    }
    require_same("what they read", lambda: reads(source, tasks.digests(experiment.data, workdir), more))
    pipeline = None
    if source is not None:
        dtype, encodes = jnp.dtype(experiment.model.dtype), tasks.encodes(experiment.data)
        pipeline = load_pipeline(source, dtype, with_transformer=False, with_encoders=encodes)
    return Inputs(source, loras, encoder, pipeline, given)


def check_settings(experiment: Experiment, method: Method) -> None:
    """Raises `UserError` if the run is too short for an update or a profile, or if a batch that must stay whole would
    be split."""
    window = Window.parse(experiment.profile)
    if window is not None and window.last > experiment.steps:
        raise UserError(f"config.profile ends at step {window.last}, but config.steps is {experiment.steps}; lower it")
    if method.whole_batch and experiment.accumulation not in (1, -1):
        raise UserError(
            f"config.accumulation is {experiment.accumulation}, but the method compares the clips of a batch with each "
            "other; set it to 1"
        )
    for update in method.updates:
        if update.starts >= experiment.steps:
            raise UserError(
                f"config.steps is {experiment.steps}, but the {update.name} is only trained from step {update.starts} "
                f"on; raise config.steps, or lower config.method.{update.delay}"
            )


def make_scorer(
    experiment: Experiment, method: Method, maker: Maker | None, workdir: Path, task: Task, pipeline: Pipeline | None
) -> tuple[Scorer | None, Guard | None]:
    """Returns the scorer of the student, if the config or the guard needs it, and the guard, if it applies. Prints why
    if one is requested but not available."""
    reason = obstacle(method) if experiment.guard.enabled else None
    if reason is not None:
        say(f"guard: off, because {reason}; {UNGUARDED}")
    guarded = experiment.guard.enabled and reason is None
    if not guarded and not experiment.score_every:
        return None, None
    if maker is None or pipeline is None:
        say("scores: off, because the method trains no student")
        return None, None
    try:
        scorer = Scorer(task, pipeline, workdir, experiment.score_clips, maker.student.sampler)
    except TooFew as error:
        say(f"scores and guard: off, because {error}; {UNGUARDED}" if guarded else f"scores: off, because {error}")
        return None, None
    return scorer, Guard(scorer, workdir) if guarded else None


def make_hooks(
    experiment: Experiment,
    workdir: Path,
    task: Task,
    pipeline: Pipeline | None,
    scorer: Scorer | None,
    maker: Maker | None,
) -> tuple[Hook, ...]:
    """Returns the hooks for scores and previews of the student, if the run has one."""
    hooks = []
    if maker is None or pipeline is None:
        return ()
    if scorer is not None:
        hooks.append(
            Hook(
                experiment.score_every,
                lambda step, state: scorer(step, maker.judged(state)),
                "scoring held-out clips",
                scorer.done,
            )
        )
    if experiment.sample_every:
        teacher = None
        if "teacher" in maker.frozen:
            how = Sampler.even(experiment.sample_steps, experiment.sample_shift, experiment.sample_guidance)
            teacher = Denoiser(*maker.models.weights("teacher", maker.frozen, {})), how
        try:
            previews = Previews(task, pipeline, workdir, maker.shown, maker.student.sampler, teacher)
        except TooFew as error:
            say(f"previews: off, because {error}")
        else:
            hooks.append(Hook(experiment.sample_every, previews, "making previews", previews.done))
    return tuple(hooks)


def write_student(
    experiment: Experiment,
    workdir: Path,
    task: Task,
    source: ModelDirectory | None,
    maker: Maker | None,
    params: Mapping[str, Params],
    averages: Mapping[str, Params] | None,
    facts: Mapping[str, str],
    loras: Sequence[LoraFile],
) -> Path:
    """Writes the model directory of a finished run from its roles' final weights. All processes must call this; only
    the first one writes.

    Args:
      averages: None if they are equal to the weights.
      facts: facts about the run for its model card.
      loras: LoRA files that were merged into the model that the run started from.
    """
    folder = workdir / PRODUCT
    if maker is not None and source is not None:
        student = maker.student
        trained, low = maker.exported(params, averages)
        boundary = None if low is None else student.boundary
        if is_first():
            shift = experiment.sample_shift
            export.write_student(workdir, source, trained, student.sampler, shift, low, boundary, facts, loras)
        return folder
    final = {name: to_host((averages or {}).get(f"{name}_{EMA}", tree)) for name, tree in params.items()}
    if is_first() and source is not None and "decoder" in final:
        sizes = presets.find(experiment.model.preset)
        export.write_decoder(workdir, source, sizes.decoder, final["decoder"])
    elif is_first():
        task.write_model(workdir, experiment.model.preset, final, source, Scheduler.of(ONE_STEP))
    return folder
