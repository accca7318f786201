"""The queue between the pages and the devices: bounded, in order, with at most one waiting job per page."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Condition
from typing import Any, Literal

from vpae_jax.serving.limits import Asked
from vpae_jax.types import UserError

MAX_WAITING = 16
MAX_KEPT = 256  # jobs whose result can be asked for

State = Literal["waiting", "running", "done", "superseded"]


class Full(UserError):
    """The queue has no place left."""


@dataclass(frozen=True)
class Outcome:
    """What became of one model's clip.

    Attributes:
      state: where it stands; "compiling" if its settings are new, so that programs are compiled first.
      clip: facts about a clip that is done, as the page shows them.
      error: why it failed; one line.
    """

    state: Literal["waiting", "making", "compiling", "done", "failed"] = "waiting"
    clip: dict[str, Any] | None = None
    error: str | None = None


@dataclass
class Job:
    """A request on its way. Changed by the queue alone, which holds its lock meanwhile.

    Attributes:
      asked: the request.
      name: random, so that nobody can guess another page's jobs.
      state: where it stands.
      outcomes: of each model's clip, by model.
    """

    asked: Asked
    name: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    state: State = "waiting"
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.outcomes = {name: Outcome() for name in self.asked.samplers}


class JobQueue:
    """Hands jobs to one worker in the order in which they came.

    A newer job of a page takes the place in the queue of its older one that waits, so the queue does not grow while
    someone types, and typing on does not put anyone back to the end of it. The older job of a page that is running is
    superseded as well: its worker stops before the next model's clip.

    Args:
      places: jobs that may wait.
    """

    def __init__(self, places: int = MAX_WAITING) -> None:
        self._places, self._closed = places, False
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._kept: OrderedDict[str, Job] = OrderedDict()
        self._changed = Condition()

    def add(self, asked: Asked) -> Job:
        """Queues a job. Raises `Full` if no place is left."""
        job = Job(asked)
        with self._changed:
            older = next((number for number, one in enumerate(self._waiting) if one.asked.page == asked.page), None)
            if older is not None:
                self._waiting[older].state = "superseded"
                self._waiting[older] = job
            elif len(self._waiting) >= self._places:
                raise Full(f"the queue is full: {self._places} requests are waiting; try again in a moment")
            else:
                self._waiting.append(job)
            if self._running is not None and self._running.asked.page == asked.page:
                self._running.state = "superseded"
            self._kept[job.name] = job
            for name in [name for name, one in self._kept.items() if one.state in ("done", "superseded")]:
                if len(self._kept) <= MAX_KEPT:
                    break
                del self._kept[name]
            self._changed.notify_all()
        return job

    def take(self) -> Job | None:
        """Waits for the next job, which is running from then on; None once the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting)
            if self._closed:
                return None
            self._running = self._waiting.pop(0)
            self._running.state = "running"
            return self._running

    def goes_on(self, job: Job) -> bool:
        """Whether the running job is still wanted."""
        with self._changed:
            return job.state == "running" and not self._closed

    def report(self, job: Job, model: str, outcome: Outcome) -> None:
        """Records what became of a model's clip."""
        with self._changed:
            job.outcomes[model] = outcome

    def finish(self, job: Job) -> None:
        """Ends the running job."""
        with self._changed:
            self._running = None
            if job.state == "running":
                job.state = "done"

    def close(self) -> None:
        """Lets the worker end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def look_up(self, name: str) -> dict[str, Any] | None:
        """Where a job stands, as JSON: its state, how many jobs are ahead of it, and each model's outcome. None for an
        unknown job."""
        with self._changed:
            if (job := self._kept.get(name)) is None:
                return None
            return {"state": job.state, "ahead": self._ahead(job), "clips": _listed(job.outcomes)}

    def _ahead(self, job: Job) -> int:
        if job.state != "waiting":
            return 0
        return self._waiting.index(job) + (self._running is not None)


def _listed(outcomes: dict[str, Outcome]) -> Sequence[dict[str, Any]]:
    return [{"model": name, "state": one.state, "clip": one.clip, "error": one.error} for name, one in outcomes.items()]
