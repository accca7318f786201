"""The one thread that owns the devices: loads the models, warms them up, and makes one clip after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax

from vpae_jax.evaluation.rows import Entry
from vpae_jax.flow.sampler import Sampler, typed
from vpae_jax.media import Picture
from vpae_jax.serving.jobs import Job, JobQueue, Outcome
from vpae_jax.serving.models import Made, Model, load_models, make, warm_up
from vpae_jax.serving.stores import Clips, Store
from vpae_jax.types import UserError

Generate = Literal["auto", "typing", "button"]

MAX_TYPING_SECONDS = 5.0  # for all models' clips together; beyond it a page has a button
MAX_PROGRAMS = 64  # combinations of model, steps and size; beyond it compiled programs are dropped


@dataclass(frozen=True)
class Ready:
    """What the page is made of, once all models are loaded and warmed up.

    Attributes:
      models: in the order of the page.
      typing: whether clips follow the typing, or a button asks for them.
      decision: that in words, with the measured time.
    """

    models: tuple[Model, ...]
    typing: bool
    decision: str


def decide(seconds: float, generate: Generate) -> tuple[bool, str]:
    """Whether clips are made while the user types, and a sentence that says so.

    Args:
      seconds: that one clip of every model takes, together, as the warm-up measured.
      generate: "auto" decides by these seconds; the others are what was asked for.
    """
    typing = generate == "typing" or (generate == "auto" and seconds <= MAX_TYPING_SECONDS)
    what = "Clips follow your typing" if typing else "Clips are made when you press Generate"
    if generate != "auto":
        return typing, f"{what} (--generate={generate}; {seconds:.1f} s per request in the warm-up)."
    limit = f"the limit for answering while you type is {MAX_TYPING_SECONDS:g} s"
    return typing, f"{what}: a request took {seconds:.1f} s in the warm-up ({limit})."


class Worker:
    """Loads, then serves the queue until it is closed; `run` is the thread's body.

    Args:
      entries: the models.
      load: how they are loaded: dtype, mesh, decoder of `load_models`.
      queue: of jobs.
      clips: where they are kept.
      images: uploaded first frames.
      generate: when clips are made.
      say: prints a line of progress.
      where: the page's address.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        load: dict[str, Any],
        queue: JobQueue,
        clips: Clips,
        images: Store[Picture],
        generate: Generate,
        say: Callable[[str], object],
        where: str,
    ) -> None:
        self.entries, self.queue, self.clips, self.images = entries, queue, clips, images
        self.ready: Ready | None = None
        self.doing = "starting"  # the last line of progress
        self._load, self._say, self._where = load, say, where
        self._generate: Generate = generate
        self._compiled: set[tuple[Any, ...]] = set()

    def run(self) -> None:
        """Raises `UserError` if a model cannot be loaded, or cannot make the clip of its own settings."""
        models = load_models(self.entries, **self._load, say=self._tell)
        seconds = sum(warm_up(model, self._tell) for model in models)
        for model in models:
            self._compiled |= {_program(model, model.sampler, None), _program(model, model.sampler, _own_size(model))}
        typing, decision = decide(seconds, self._generate)
        self._tell(decision)
        self.ready = Ready(tuple(models), typing, decision)
        self._tell(f"ready: {self._where} (Ctrl-C ends)")
        while (job := self.queue.take()) is not None:
            self._make_all(job, models)
            self.queue.finish(job)

    def _tell(self, line: str) -> None:
        self.doing = line
        self._say(line)

    def _make_all(self, job: Job, models: Sequence[Model]) -> None:
        """Makes a job's clips, those of the fewest network evaluations first."""
        for model in sorted(models, key=lambda model: job.asked.samplers[model.name].evaluations):
            if not self.queue.goes_on(job):
                return
            self.queue.report(job, model.name, self._outcome(job, model))

    def _outcome(self, job: Job, model: Model) -> Outcome:
        asked = job.asked
        sampler, image = asked.samplers[model.name], None
        if asked.image is not None:
            if not model.takes_image:
                return Outcome("failed", error="this is a text-to-video model; remove the image to see its clip")
            if (image := self.images.get(asked.image)) is None:
                return Outcome("failed", error="the image is no longer here; upload it again")
        try:
            program = _program(model, sampler, None if image is None else model.pipeline.fit(*image.shape[:2]))
            compiles = self._compiles(program)
            self.queue.report(job, model.name, Outcome("compiling" if compiles else "making"))
            made = make(model, sampler, asked.prompt, asked.seed, image)
            self._compiled.add(program)
            name = self.clips.keep(made.frames, model.pipeline.defaults.fps)
        except UserError as error:
            return Outcome("failed", error=str(error))
        except jax.errors.JaxRuntimeError as error:  # out of memory, mostly
            line = str(error).splitlines()[0] if str(error) else "no reason was given"
            return Outcome("failed", error=f"the device failed: {line}; ask for a smaller image or fewer steps")
        return Outcome("done", facts(name, made, sampler, compiles))

    def _compiles(self, program: tuple[Any, ...]) -> bool:
        """Whether a program is new. Too many programs make room for new ones."""
        if program in self._compiled:
            return False
        if len(self._compiled) >= MAX_PROGRAMS:
            jax.clear_caches()
            self._compiled.clear()
        return True


def facts(name: str, made: Made, sampler: Sampler, compiles: bool) -> dict[str, Any]:
    """What the page shows of a clip, as JSON.

    Args:
      name: of the clip.
      compiles: whether its times include compiling.
    """
    frames, height, width, _ = made.frames.shape
    seconds = {stage: round(value, 4) for stage, value in made.seconds.items()}
    return {
        "name": name,
        "frames": frames,
        "height": height,
        "width": width,
        "seconds": {**seconds, "total": round(sum(made.seconds.values()), 4)},
        "evaluations": sampler.evaluations,
        "per_chunk": sampler.chunks is not None,
        "steps": typed(sampler.asked),
        "guidance": sampler.guidance,
        "compiles": compiles,
    }


def _own_size(model: Model) -> tuple[int, int]:
    return model.pipeline.defaults.height, model.pipeline.defaults.width


def _program(model: Model, sampler: Sampler, image_size: tuple[int, int] | None) -> tuple[Any, ...]:
    """What decides which programs a clip needs."""
    return model.name, sampler.times, sampler.first, sampler.guidance > 1, image_size
