"""The recommended sampling and default clip of a model directory.

`vpae_jax.json` next to `model_index.json` holds what Diffusers has no place for and does not read: the clip size that
the model was trained for and its negative prompt (`Defaults`). Without it, Wan 2.1's own defaults apply.
`scheduler_config.json` specifies how it is sampled (`Scheduler`); the number of steps, the guidance and a causal
model's chunks are under private keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vpae_jax.config import build
from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.sampler import Sampler, Solver, Steps, typed
from vpae_jax.types import UserError
from vpae_jax.weights import grids
from vpae_jax.weights.filenames import CAUSAL_PIPELINE, INDEX, SCHEDULER, SETTINGS, VERSION, read_json
from vpae_jax.weights.safetensors_file import quote

# Wan 2.1's negative prompts, with full-width commas; image-to-video's adds a shaking camera.
IMAGE_NEGATIVE_PROMPT = (
    "镜头晃动,色调艳丽,过曝,静态,细节模糊不清,字幕,风格,作品,画作,画面,静止,整体发灰,最差质量,低质量,JPEG压缩残留,"
    "丑陋的,残缺的,多余的手指,画得不好的手部,画得不好的脸部,畸形的,毁容的,形态畸形的肢体,手指融合,"
    "静止不动的画面,杂乱的背景,三条腿,背景人很多,倒着走"
).replace(",", "\uff0c")
NEGATIVE_PROMPT = IMAGE_NEGATIVE_PROMPT.partition("\uff0c")[2]

_UNIPC = "UniPCMultistepScheduler"
# A scheduler class of Diffusers for each of our solvers.
_CLASSES: Mapping[Solver, str] = {
    "unipc": _UNIPC,
    "euler": "FlowMatchEulerDiscreteScheduler",
    "consistency": "FlowMatchLCMScheduler",
}
# Keys of scheduler_config.json that Diffusers keeps and ignores.
_STEPS, _GUIDANCE, _TIMES, _SHIFT = "_num_inference_steps", "_guidance_scale", "_times", "_shift"
_CHUNKS, _FIRST = "_chunks", "_first_chunk_times"
_FLOW_MATCH: Mapping[str, Any] = {
    "num_train_timesteps": grids.TRAIN_TIMES,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
}
# Values that a scheduler's config must have for our solvers to take the same steps at the same timesteps. The other
# keys that Diffusers reads either determine the timesteps or have no effect on flow sigmas: betas, spacing, thresholds,
# parts of dynamic shifting.
_REQUIRED: Mapping[Solver, Mapping[str, Any]] = {
    "unipc": {
        "num_train_timesteps": grids.TRAIN_TIMES,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "final_sigmas_type": "zero",
        "solver_order": 2,
        "solver_type": "bh2",
        "solver_p": None,
        "predict_x0": True,
        "lower_order_final": True,
        "disable_corrector": [],
        "thresholding": False,
        "use_dynamic_shifting": False,
        "shift_terminal": None,
    },
    "euler": {**_FLOW_MATCH, "stochastic_sampling": False},
    "consistency": {**_FLOW_MATCH, "scale_factors": None},
}
# A missing key has Diffusers' default, which is the required value for all keys except these.
_ABSENT: Mapping[str, Any] = {"prediction_type": "epsilon", "use_flow_sigmas": False}
MIN_FPS, MAX_FPS = 0.01, 1000.0
MAX_PROMPT = 10_000  # characters; cleaning a text of megabytes takes minutes
MAX_PIXELS = 2**30  # per clip; 81 frames of 720x1280 are a fourteenth of it
# Keys of `vpae_jax.json` that are not defaults, but settings that other layouts have no place for.
_ELSEWHERE = ("scheduler", "parts", "boundary")


@dataclass(frozen=True)
class Scheduler:
    """The recommended sampling of a model directory, and its scheduler_config.json.

    Diffusers' Wan pipelines, called with `num_inference_steps=steps` and `guidance_scale=guidance`, take the same steps
    without further settings:

        unipc         UniPCMultistepScheduler; `shift` is its `flow_shift`, and its timesteps are ours for any number of
                      steps (`flow.solvers.unipc_levels`)
        euler         FlowMatchEulerDiscreteScheduler
        consistency   FlowMatchLCMScheduler, whose fresh noise comes from PyTorch's global generator

    The latter two get the `shift` and `shift_terminal` for which they have exactly our timesteps, and pass them to the
    network unchanged, for this number of steps (`weights.grids`). With more or fewer steps, their timesteps have the
    same first and last value; with one step they divide by 0, so remove the terminal for that:

        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift_terminal=None)

    Timesteps that these fields cannot express are written as `_times`, which we read and Diffusers ignores: by default,
    it uses even ones down to the last. To use them, bind them to its scheduler, as the model card shows:

        pipe.scheduler.set_timesteps = functools.partial(pipe.scheduler.set_timesteps, sigmas=numpy.array(times[:-1]))

    None of this applies to a causal model, which generates a clip chunk by chunk: Diffusers has no pipeline for it.

    Attributes:
      solver: the sampling solver.
      shift: s of even timesteps (`flow.schedule` Eq. 8); positive.
      steps: number of sampling steps, at least 1.
      guidance: at least 1. A student's is its own, mostly 1, never the teacher's.
      times: the timesteps of `steps` steps, falling from 1 to 0, if they are not the even ones; else empty.
      chunks: of a causal model; None for a model that generates whole clips.
      first: timesteps of a causal model's first chunk, if they differ; else empty.

    If a file does not specify them, steps and guidance have the defaults of Diffusers' Wan pipelines.

    Raises:
      UserError: a number outside its range, or timesteps that no sampler has.
    """

    solver: Solver = "unipc"
    shift: float = 3.0
    steps: int = 50
    guidance: float = 5.0
    times: tuple[float, ...] = ()
    chunks: Chunks | None = None
    first: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.times and len(self.times) != self.steps + 1:
            raise UserError(f"times are {len(self.times)} numbers, expected {self.steps + 1}: one per step, and 0")
        Sampler.even(self.steps, self.shift, self.guidance, self.solver)
        self.sampler()

    @classmethod
    def of(cls, sampler: Sampler, shift: float = 1.0) -> Scheduler:
        """The scheduler for a sampler.

        Args:
          sampler: what a student was trained for.
          shift: of even timesteps for other numbers of steps, if it does not follow from the sampler's own timesteps,
            since there is only one or they are not even.
        """
        even = grids.even_shift(sampler.solver, sampler.times)
        times = sampler.times if even is None and sampler.steps > 1 else ()
        shift, causal = shift if even is None else even, (sampler.chunks, sampler.first)
        return cls(sampler.solver, shift, sampler.steps, sampler.guidance, times, *causal)

    def sampler(
        self,
        steps: Steps | None = None,
        guidance: float | None = None,
        solver: Solver | None = None,
        shift: float | None = None,
        window: int | None = None,
        sink: int | None = None,
    ) -> Sampler:
        """The recommended sampler, with any arguments overridden.

        Another number of steps, or another shift, gives even timesteps; so does "unipc" instead of another solver,
        whose timesteps it cannot use. However, a causal student of N steps with the solver "consistency" also works
        with fewer: it is trained to end after each of them, so n steps use the first n of its timesteps
        (Self-Forcing, 2506.08009).

        Args:
          steps: if two numbers, for the first chunk and for each later one (First-Frame Enhancement, 2511.01419); only
            for a causal model.
          guidance, solver, shift: see `Scheduler`.
          window, sink: see `flow.chunks.Chunks`; only for a causal model.

        Raises:
          UserError: arguments that only a causal model supports, for another model; and as `Sampler`.
        """
        given = {name: value for name, value in (("window", window), ("sink", sink)) if value is not None}
        if self.chunks is None and isinstance(steps, tuple):
            raise UserError(f"steps is {typed(steps)}, but this model is not causal: it has no chunks; give one number")
        if self.chunks is None and given:
            name, value = next(iter(given.items()))
            raise UserError(f"{name} is {value}, but this model is not causal: all frames see each other; leave it out")
        chosen = self.solver if solver is None else solver
        own = (len(self.first) - 1, self.steps) if self.first else self.steps
        steps = own if steps is None else steps
        first, later = steps if isinstance(steps, tuple) else (None, steps)
        times = self._times(later, self.times, chosen, shift)
        opening = () if first is None else self._times(first, self.first, chosen, shift)
        return Sampler(
            solver=chosen,
            times=times,
            guidance=float(self.guidance if guidance is None else guidance),
            chunks=None if self.chunks is None else replace(self.chunks, **given),
            first=() if opening == times else opening,
        )

    def _times(self, steps: int, own: tuple[float, ...], solver: Solver, shift: float | None) -> tuple[float, ...]:
        """Timesteps for `steps` steps: `own` if it has that many, a causal student's first ones, or even ones."""
        if shift is None and (solver == self.solver or solver != "unipc"):
            if own and len(own) == steps + 1:
                return own
            if self.chunks is not None and self.solver == "consistency" and 1 <= steps <= self.steps:
                return *(self.times or Sampler.even(self.steps, self.shift).times)[:steps], 0.0
        return Sampler.even(steps, self.shift if shift is None else shift, 1.0, solver).times

    @property
    def bound_times(self) -> tuple[float, ...]:
        """Timesteps that must be bound to Diffusers' scheduler, without the last 0; empty if it needs none."""
        return tuple(self.to_json().get(_TIMES, ())[:-1])

    def told(self) -> dict[str, Any]:
        """What people and other programs need to sample the model, in plain words. It is in model_index.json and in the
        metadata of LoRA files, and is not read back: scheduler_config.json has it in Diffusers' words."""
        times = self.sampler().times[:-1]
        found = {"num_inference_steps": self.steps, "guidance_scale": self.guidance, "solver": self.solver}
        return {**found, "shift": self.shift, "timesteps": [round(grids.TRAIN_TIMES * t, 4) for t in times]}

    def to_json(self) -> dict[str, Any]:
        """The scheduler_config.json that Diffusers reads."""
        advice = {_STEPS: self.steps, _GUIDANCE: self.guidance, "_diffusers_version": VERSION}
        advice |= {} if self.chunks is None else {_CHUNKS: asdict(self.chunks)}
        advice |= {_FIRST: list(self.first)} if self.first else {}
        return {"_class_name": _CLASSES[self.solver], **_REQUIRED[self.solver], **self._times_json(), **advice}

    def _times_json(self) -> dict[str, Any]:
        """The fields that determine the timesteps."""
        times, other = self.times, {_SHIFT: self.shift} if self.times else {}
        if self.solver == "unipc":
            return {"flow_shift": 1.0, _TIMES: list(times), **other} if times else {"flow_shift": self.shift}
        times = times or grids.even_times(self.steps, self.shift)
        grid = grids.Grid(self.shift, None) if self.steps == 1 else grids.fit(times)
        if grid is None:
            return {"shift": 1.0, "shift_terminal": times[-2], _TIMES: list(times), **other}
        return {"shift": grid.shift, "shift_terminal": grid.terminal, **other}


@dataclass(frozen=True)
class Defaults:
    """The clip size of a call without sizes, and the default negative prompt.

    Attributes:
      num_frames: 1 + a multiple of 4.
      height, width: in pixels. With an image, their product is the area, and the image determines the aspect ratio.
      fps: frames per second of a written video.
      negative_prompt: for a guided call without one.

    Raises:
      UserError: a size below 1, a clip of more than `MAX_PIXELS`, an implausible frame rate or prompt length.
    """

    num_frames: int = 81
    height: int = 480
    width: int = 832
    fps: float = 16.0
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected at least 1")
        check_pixels(self.num_frames, self.height, self.width)
        if not MIN_FPS <= self.fps <= MAX_FPS:
            raise UserError(f"fps is {self.fps}, expected a number from {MIN_FPS:g} to {MAX_FPS:g}")
        if len(self.negative_prompt) > MAX_PROMPT:
            count = len(self.negative_prompt)
            raise UserError(f"negative_prompt has {count} characters, expected at most {MAX_PROMPT}")


def check_pixels(num_frames: int, height: int, width: int) -> None:
    """Raises `UserError` for a clip of more pixels than any Wan model generates at once."""
    if num_frames * height * width > MAX_PIXELS:
        raise UserError(
            f"{num_frames} frames of {height}x{width} are more than {MAX_PIXELS:.1e} pixels; give a smaller clip"
        )


# The defaults of Wan's own program.
WAN_TEXT, WAN_IMAGE = Scheduler("unipc", 5.0, 50, 5.0), Scheduler("unipc", 3.0, 40, 5.0)


def read_scheduler(folder: Path, image: bool = False) -> Scheduler:
    """Reads a model's scheduler: from its `scheduler/`, else from its `vpae_jax.json`, else Wan's own.

    Args:
      folder: of the model.
      image: whether this is an image-to-video model, which Wan samples with fewer steps and another shift.

    Raises:
      UserError: a scheduler that our solvers do not support, or one of a causal model without chunks.
    """
    found, index = _read_scheduler(folder, image), folder / INDEX
    if found.chunks is None and index.is_file() and read_json(index).get("_class_name") == CAUSAL_PIPELINE:
        raise UserError(
            f"{folder / 'scheduler' / SCHEDULER}: has no {_CHUNKS}, without which a causal model ({index}) cannot be "
            "sampled; fetch it again"
        )
    return found


def _read_scheduler(folder: Path, image: bool) -> Scheduler:
    path = folder / "scheduler" / SCHEDULER
    if not path.is_file():
        told, where = _settings(folder).get("scheduler"), f"{folder / SETTINGS}.scheduler"
        if told is None:
            return WAN_IMAGE if image else WAN_TEXT
        if not isinstance(told, dict):
            raise UserError(f"{where}: expected a JSON object, found {quote(told)}")
        return build(Scheduler, told, where)
    return scheduler_from_json(read_json(path), str(path))


@dataclass(frozen=True)
class _Told:
    """The entries of a scheduler_config.json for timesteps, steps and guidance, with Diffusers' defaults."""

    shift: float = 1.0
    shift_terminal: float | None = None
    steps: int = 50
    guidance: float = 5.0
    times: tuple[float, ...] = ()
    shift_of_others: float | None = None
    chunks: Chunks | None = None
    first: tuple[float, ...] = ()


def scheduler_from_json(values: Mapping[str, Any], where: str) -> Scheduler:
    """The scheduler of a scheduler_config.json.

    Args:
      where: it was found, for messages.

    Raises:
      UserError: as `read_scheduler`.
    """
    solvers: dict[str, Solver] = {name: solver for solver, name in _CLASSES.items()}
    name = str(values.get("_class_name"))
    if name not in solvers:
        raise UserError(f"{where}: _class_name is {quote(name)}, expected one of {', '.join(solvers)}")
    solver = solvers[name]
    for key, expected in _REQUIRED[solver].items():
        found = values.get(key, _ABSENT.get(key, expected))
        if found != expected:
            left_out = "" if key in values else " (Diffusers' default for a missing key)"
            raise UserError(f"{where}: {key} is {quote(found)}{left_out}, only {expected!r} is supported")
    keys = {
        "shift": "flow_shift" if solver == "unipc" else "shift",
        "shift_terminal": "shift_terminal",
        "steps": _STEPS,
        "guidance": _GUIDANCE,
        "times": _TIMES,
        "shift_of_others": _SHIFT,
        "chunks": _CHUNKS,
        "first": _FIRST,
    }
    told = build(_Told, {ours: values[key] for ours, key in keys.items() if key in values}, where)
    try:
        said = Scheduler(solver, told.shift, told.steps, told.guidance, told.times, told.chunks, told.first)
        times = said.times
        if not times and solver != "unipc":
            times = grids.Grid(told.shift, told.shift_terminal).times(told.steps)
        if not times:
            return said
        shift = told.shift if told.shift_of_others is None else told.shift_of_others
        return Scheduler.of(Sampler(solver, times, told.guidance, told.chunks, told.first), shift)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def read_defaults(folder: Path, image: bool = False) -> Defaults:
    """Reads the model's default clip; Wan 2.1's if there is no `vpae_jax.json`.

    Args:
      folder: of the model.
      image: whether this is an image-to-video model, for which Wan has another negative prompt.

    Raises:
      UserError: a `vpae_jax.json` with other keys or values of other types.
    """
    given = {key: value for key, value in _settings(folder).items() if key not in _ELSEWHERE}
    negative = IMAGE_NEGATIVE_PROMPT if image else NEGATIVE_PROMPT
    return build(Defaults, {"negative_prompt": negative, **given}, str(folder / SETTINGS))


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    return read_json(path) if path.is_file() else {}
