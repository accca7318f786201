"""The only training loop.

Each step runs the method's due updates in order, each repeat on the next batch. Metrics are read one step late, so the
host never waits for the device; checkpoints hold everything that the next step depends on, so an interrupted run ends
with the same bits as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
from vpae_jax.train.metrics import MetricsLog
from vpae_jax.train.roles import RoleModels
from vpae_jax.train.state import TrainState, places_of
from vpae_jax.train.trackers import Tracker
from vpae_jax.types import Params, UserError


@runtime_checkable
class Data(Protocol):
    """Batches as `data.batches` makes them.

    Attributes:
      bad: how many damaged records this process has met.
    """

    bad: int

    def __next__(self) -> Any: ...
    def get_state(self) -> Mapping[str, Any]: ...
    def set_state(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Hook:
    """Something to do between steps: sample clips, score held-out ones.

    Attributes:
      every: interval in steps; it also runs before the first and after the last step.
      run: receives the number of completed steps and the state (whose buffers the next step consumes); returns what to
        record: scalars, and videos' files for a tracker.
      name: what it does, as in "scoring held-out clips".
      done: whether it has run after a step. A run that was interrupted between a checkpoint and what is due after it
        makes up for that when it continues.
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
    """Trains from the workdir's newest whole checkpoint, or `state`, to `experiment.steps`, or until it is to stop.

    Args:
      batches: their position is part of every checkpoint.
      put: moves this process's part of a batch to the devices, in the right sharding.
      stop: whether to stop after this step, on all processes alike.

    Returns:
      The last state, which is also the newest checkpoint.

    Raises:
      UserError: when a loss or gradient is not finite, or a checkpoint cannot be written; the last good checkpoint
        stays. When there are checkpoints, but none is whole.
    """
    with Checkpoints(workdir, experiment.keep) as checkpoints, ExitStack() as stack:
        start = checkpoints.newest()
        if start is not None:
            state, batches = checkpoints.restore(start, state, batches)
            say(f"continuing from step {start} of {workdir}")
        start = int(state.step)
        places = places_of(state)
        programs = [
            steps.make_update(update, i, models, optimizers, experiment.accumulation, places)
            for i, update in enumerate(method.updates)
        ]
        metrics = MetricsLog(workdir, start, experiment.steps, _tracker(experiment, workdir))
        stack.callback(metrics.close)
        missed = hooks if start == 0 else tuple(hook for hook in hooks if not hook.done(start))
        _run_hooks(missed, start, experiment.steps, state, metrics)
        pending: tuple[int, dict[str, Any]] | None = None
        clock, scalars_of_update = Clock(), {}
        for step in range(start, experiment.steps):
            scalars: dict[str, Any] = {}
            for index, update in steps.due(method.updates, step):
                for repeat in range(update.repeats):
                    with clock.waiting(scalars_of_update):
                        batch = next(batches)
                    with metrics.first_time(f"compiling the {update.name}'s update"):
                        state, scalars_of_update = programs[index](state, frozen, put(batch), jnp.int32(repeat))
                    scalars |= scalars_of_update
            state = replace(state, step=state.step + 1)
            if pending is not None:
                _record(metrics, *pending, clock, batches, experiment, checkpoints)
            pending = (step + 1, scalars)
            metrics.advance()
            checkpoints.check()
            last, stopping = step + 1 == experiment.steps, stop(step + 1)
            if last or stopping or (step + 1) % experiment.checkpoint_every == 0:
                _record(metrics, *pending, clock, batches, experiment, checkpoints)
                pending = None
                checkpoints.save(state, batches)
            if stopping and not last:
                break
            _run_hooks(hooks, step + 1, experiment.steps, state, metrics)
    return state


def _tracker(experiment: Experiment, workdir: Path) -> Callable[[], Tracker] | None:
    """What begins the run of the tracker that the config names."""
    if experiment.tracker == "none":
        return None
    return partial(Tracker, experiment.tracker, workdir, experiment.name, dataclasses.asdict(experiment))


class Clock:
    """Time a step since the last reading, and how much of it the devices were idle for want of data."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.time, self.step, self.waited = now, now(), None, 0.0

    @contextmanager
    def waiting(self, running: Any) -> Iterator[None]:
        """Around what waits for data. It is counted only when what was `running` on the devices, arrays that are yet to
        be computed, has ended by then: else the devices had work all the time."""
        since = self.now()
        yield
        if all(value.is_ready() for value in jax.tree.leaves(running)):
            self.waited += self.now() - since

    def read(self, step: int) -> dict[str, float]:
        """`seconds_per_step`, and `data_wait`, the share of them spent waiting for data; 0 at the first reading."""
        now, before = self.now(), self.step
        passed = now - self.time
        known = before is not None and passed > 0
        result = {
            "seconds_per_step": passed / max(1, step - before) if before is not None else 0.0,
            "data_wait": self.waited / passed if known else 0.0,
        }
        self.time, self.step, self.waited = now, step, 0.0
        return result


def _record(
    metrics: MetricsLog,
    step: int,
    scalars: dict,
    clock: Clock,
    data: Data,
    experiment: Experiment,
    checkpoints: Checkpoints,
) -> None:
    """Waits for one step's metrics, checks them, and writes them when due, and those of the last step, with what slowed
    any of the processes."""
    values = {name: float(value) for name, value in jax.device_get(scalars).items()}
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        saved = checkpoints.latest()
        kept = "there is no checkpoint yet" if saved is None else f"the checkpoint of step {saved} is kept"
        raise UserError(
            f"step {step}: {bad[0]} is not finite; {kept}; lower that role's learning_rate or clip_norm and start again"
        )
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
