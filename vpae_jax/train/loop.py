"""The training loop, the only one.

Each step runs the method's due updates in order, each repeat on the next batch. While an update runs, the host prepares
the next batch and then waits: a large update takes minutes, and with several in the queue the reaction to SIGTERM would
come too late. A run can save and stop between any two updates. Checkpoints contain everything that the rest of the run
depends on, so an interrupted run ends with bit-identical results.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from vpae_jax.config import Experiment
from vpae_jax.methods.base import Method
from vpae_jax.runtime import processes
from vpae_jax.runtime.preemption import Stop, never
from vpae_jax.runtime.processes import say
from vpae_jax.train import step as steps
from vpae_jax.train.checkpoint import Checkpoints
from vpae_jax.train.clocks import Alarm, Clock
from vpae_jax.train.metrics import MetricsLog
from vpae_jax.train.newest import Moment
from vpae_jax.train.profiling import Profiler, Window
from vpae_jax.train.roles import RoleModels
from vpae_jax.train.state import TrainState, places_of
from vpae_jax.train.trackers import Tracker
from vpae_jax.types import Params, UserError


@runtime_checkable
class Data(Protocol):
    """An iterator of batches, as returned by `data.batches`.

    Attributes:
      bad: number of corrupt records that this process has met.
    """

    bad: int

    def __next__(self) -> Any: ...
    def get_state(self) -> Mapping[str, Any]: ...
    def set_state(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Hook:
    """Something to do between steps, such as sampling previews or scoring held-out clips.

    Attributes:
      every: interval in steps; the hook also runs before the first and after the last step.
      run: receives the number of completed steps and the state (whose buffers the next step consumes); returns what to
        record: scalars, and video files for a tracker.
      name: description for messages, as in "scoring held-out clips".
      done: whether the hook has already run after a step. If a run was interrupted between a checkpoint and the hooks
        due after it, it runs them when it resumes.
    """

    every: int
    run: Callable[[int, TrainState], Mapping[str, Any]]
    name: str
    done: Callable[[int], bool] = lambda step: True

    def due(self, step: int, last: int) -> bool:
        return step in (0, last) or (self.every > 0 and step % self.every == 0)


def train(
    experiment: Experiment,
    method: Method,
    models: RoleModels,
    optimizers: Mapping[str, Any],
    state: TrainState,
    frozen: Mapping[str, Params],
    batches: Data,
    put: Callable[[Any], Any],
    workdir: Path,
    hooks: tuple[Hook, ...] = (),
    stop: Stop = never,
) -> TrainState:
    """Trains from the workdir's newest intact checkpoint, or from `state`, to `experiment.steps` or until told to stop.

    Args:
      batches: the training data; its position is part of every checkpoint.
      put: moves this process's part of a batch to the devices, with the right sharding.
      stop: returns whether to stop after the current update; the same in all processes.

    Returns:
      The last state, which is also the newest checkpoint.

    Raises:
      UserError: a loss or gradient is not finite, or a checkpoint cannot be written; the last good checkpoint is kept.
        Or there are checkpoints, but none is intact.
    """
    with Checkpoints(workdir, experiment.keep) as checkpoints, ExitStack() as stack:
        begun, values = checkpoints.newest(), {}  # metrics reported by the updates of the current step
        if begun is not None:
            state, position, values = checkpoints.restore(begun, state)
            batches.set_state(position)
            say(f"resuming from step {begun} of {workdir}")
        begun = begun or Moment(int(state.step))
        places = places_of(state)
        programs = [
            steps.make_update(update, i, models, optimizers, experiment.accumulation, places)
            for i, update in enumerate(method.updates)
        ]
        metrics = MetricsLog(workdir, begun.step, experiment.steps, _tracker(experiment, workdir))
        stack.callback(metrics.close)
        profiler = Profiler(Window.parse(experiment.profile), workdir)
        stack.callback(profiler.close)
        if not begun.updates:
            missed = hooks if begun.step == 0 else tuple(hook for hook in hooks if not hook.done(begun.step))
            _run_hooks(missed, begun.step, experiment.steps, state, metrics)
        clock, alarm, ahead = Clock(), Alarm(experiment.checkpoint_minutes), _Ahead(batches, put)

        def pause(updates: int = 0, due: bool = False) -> bool:
            """Writes a checkpoint after an update if one is due or the run must stop; returns whether it must stop."""
            stopping = stop()
            if due or stopping or alarm.rings():
                checkpoints.save(state, ahead.position, updates, values)
                alarm.wind()
            return stopping

        for step in range(begun.step, experiment.steps):
            turns = steps.due(method.updates, step)
            for done, (index, repeat) in enumerate(turns, start=1):
                if Moment(step, done) <= begun:
                    continue
                with clock.waiting(None):
                    batch = ahead.take()
                name = method.updates[index].name
                with metrics.first_time(f"compiling the update of {name}"), profiler.update(name, step + 1):
                    state, running = programs[index](state, frozen, batch, jnp.int32(repeat))
                if done < len(turns) or step + 1 < experiment.steps:
                    with clock.waiting(running):
                        ahead.prepare()
                values |= _read(running, step + 1, checkpoints)
                if done < len(turns) and pause(done):
                    return state
            state = replace(state, step=state.step + 1)
            profiler.after(step + 1)
            _record(metrics, step + 1, values, clock, batches, experiment)
            values = {}
            metrics.advance()
            checkpoints.check()
            last = step + 1 == experiment.steps
            if pause(due=last or (step + 1) % experiment.checkpoint_every == 0) and not last:
                return state
            _run_hooks(hooks, step + 1, experiment.steps, state, metrics)
    return state


class _Ahead:
    """Batches on the devices, of which the next one can be prepared ahead.

    Attributes:
      position: position in the data after the batches taken so far.
    """

    def __init__(self, batches: Data, put: Callable[[Any], Any]) -> None:
        self.batches, self.put = batches, put
        self.position, self.next = batches.get_state(), None

    def prepare(self) -> None:
        self.next = self.put(next(self.batches))

    def take(self) -> Any:
        if self.next is None:
            self.prepare()
        self.position, batch, self.next = self.batches.get_state(), self.next, None
        return batch


def _tracker(experiment: Experiment, workdir: Path) -> Callable[[], Tracker] | None:
    """Returns a function that starts the tracker named by the config; None if there is none."""
    if experiment.tracker == "none":
        return None
    return partial(Tracker, experiment.tracker, workdir, experiment.name, dataclasses.asdict(experiment))


def _read(running: Mapping[str, Any], step: int, checkpoints: Checkpoints) -> dict[str, float]:
    """Waits for an update and returns its metrics. Raises `UserError` if one is not finite."""
    values = {name: float(value) for name, value in jax.device_get(running).items()}
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        saved = checkpoints.latest()
        kept = "there is no checkpoint yet" if saved is None else f"the checkpoint of step {saved} is kept"
        raise UserError(
            f"step {step}: {bad[0]} is not finite; {kept}; lower that role's learning_rate or clip_norm and start again"
        )
    return values


def _record(
    metrics: MetricsLog, step: int, values: Mapping[str, float], clock: Clock, data: Data, experiment: Experiment
) -> None:
    """Writes a step's metrics if due, and always those of the last step, with timings over all processes."""
    if step % experiment.log_every == 0 or step == experiment.steps:
        times = clock.read(step)
        waits, bad = processes.of_all(np.array([times["data_wait"], data.bad])).T
        metrics.write(step, {**values, **times, "data_wait": float(waits.max()), "bad_records": float(bad.sum())})


def _run_hooks(hooks: tuple[Hook, ...], step: int, last: int, state: TrainState, metrics: MetricsLog) -> None:
    for hook in hooks:
        if hook.due(step, last):
            with metrics.first_time(hook.name):
                values = hook.run(step, state)
            if values:
                metrics.write(step, values)
