"""How a model directory is sampled and which clip it makes: what its author recommends.

`vpae_jax.json` beside `model_index.json` holds what Diffusers has no place for and does not read: the clip that the
model was made for and its negative prompt (`Defaults`). Without it Wan 2.1's own defaults hold. The recommended steps
and guidance are in `scheduler_config.json`, under private names that Diffusers keeps and ignores (`Scheduler`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vpae_jax.config import build
from vpae_jax.types import UserError
from vpae_jax.weights.filenames import SCHEDULER, SETTINGS, VERSION, read_json

# What Wan 2.1 guides away from, between full-width commas; image-to-video adds a shaking camera.
IMAGE_NEGATIVE_PROMPT = (
    "镜头晃动,色调艳丽,过曝,静态,细节模糊不清,字幕,风格,作品,画作,画面,静止,整体发灰,最差质量,低质量,JPEG压缩残留,"
    "丑陋的,残缺的,多余的手指,画得不好的手部,画得不好的脸部,畸形的,毁容的,形态畸形的肢体,手指融合,"
    "静止不动的画面,杂乱的背景,三条腿,背景人很多,倒着走"
).replace(",", "\uff0c")
NEGATIVE_PROMPT = IMAGE_NEGATIVE_PROMPT.partition("\uff0c")[2]

_UNIPC, _EULER = "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"
_STEPS, _GUIDANCE = "_num_inference_steps", "_guidance_scale"
# What a scheduler's config must say for our solvers to take the same steps on the same times. All else that Diffusers
# reads is either the shift or without effect on flow sigmas: betas, spacing, thresholds, parts of dynamic shifting.
_REQUIRED: Mapping[str, Mapping[str, Any]] = {
    _UNIPC: {
        "num_train_timesteps": 1000,
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
    _EULER: {
        "num_train_timesteps": 1000,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_dynamic_shifting": False,
        "shift_terminal": None,
        "invert_sigmas": False,
        "stochastic_sampling": False,
    },
}
# A key that the file leaves out has Diffusers' default, which is the required value for all but these.
_ABSENT: Mapping[str, Any] = {"prediction_type": "epsilon", "use_flow_sigmas": False}
# Keys of `vpae_jax.json` that are no defaults: what other layouts have no place for.
_ELSEWHERE = ("scheduler", "parts")
# Steps and guidance where nobody says otherwise: Wan's own, and those of a one-step student.
_RECOMMENDED: Mapping[str, tuple[int, float]] = {"unipc": (50, 5.0), "euler": (1, 1.0)}


@dataclass(frozen=True)
class Scheduler:
    """How the directory's author samples it, and recommends to.

    UniPC's times are Diffusers' own (`flow.solvers.unipc_levels`). Euler's are `flow.schedule.shifted_times`, which
    Diffusers' scheduler has by itself for one step only: for more it spaces them from 1 to the shifted 1/1000, and then
    shifts them (4 steps, shift 1: 1, .667, .334, .001, 0, where ours are 1, .75, .5, .25, 0). It takes ours when given
    them unshifted and without the last 0:

        scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])  # shifted by the scheduler

    Wan's pipelines call `set_timesteps` with a number of steps and take no sigmas; for them, bind the sigmas first:

        pipe.scheduler.set_timesteps = functools.partial(pipe.scheduler.set_timesteps, sigmas=[1, 0.75, 0.5, 0.25])
        pipe(prompt, num_inference_steps=4)

    Attributes:
      solver: "unipc" (Diffusers' UniPCMultistepScheduler) or "euler" (FlowMatchEulerDiscreteScheduler).
      shift: s of the time grid, `flow.schedule` Eq. 8; above 0.
      steps: recommended network evaluations, at least 1. 0 stands for the solver's usual ones, and is replaced by them:
        Wan's 50 for unipc, a student's 1 for euler.
      guidance: recommended guidance, at least 1. 0 stands for the solver's usual one, and is replaced by it: Wan's 5
        for unipc, a student's 1 for euler.

    Raises:
      UserError: a number outside its range.
    """

    solver: Literal["euler", "unipc"] = "unipc"
    shift: float = 3.0
    steps: int = 0
    guidance: float = 0.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise UserError(f"shift is {self.shift}, expected a positive number")
        for name, usual in zip(("steps", "guidance"), _RECOMMENDED[self.solver], strict=True):
            value = getattr(self, name)
            if value == 0:
                object.__setattr__(self, name, usual)
            elif not value >= 1:
                raise UserError(f"{name} is {value}, expected at least 1")

    @classmethod
    def of_student(cls, shift: float, steps: int, guidance: float) -> Scheduler:
        """How a generator is sampled that was trained for so many steps; in one, there is no guidance."""
        return cls("euler", shift, steps, guidance if steps > 1 else 1.0)

    def to_json(self) -> dict[str, Any]:
        """The scheduler_config.json that Diffusers reads."""
        if self.solver == "euler":
            settings: dict[str, Any] = {"_class_name": _EULER, "shift": self.shift}
        else:
            settings = {"_class_name": _UNIPC, "flow_shift": self.shift}
        settings |= {_STEPS: self.steps, _GUIDANCE: self.guidance, "_diffusers_version": VERSION}
        return {**_REQUIRED[settings["_class_name"]], **settings}


@dataclass(frozen=True)
class Defaults:
    """The clip that a call without sizes makes, and what its guidance moves away from.

    Attributes:
      num_frames: 1 + a multiple of 4.
      height, width: pixels. With an image their product is the area, and the image decides the shape.
      fps: frames a second of a written video.
      negative_prompt: of a guided call that gives none.
    """

    num_frames: int = 81
    height: int = 480
    width: int = 832
    fps: float = 16.0
    negative_prompt: str = ""


# What Wan's own program samples with where nobody says otherwise.
WAN_TEXT, WAN_IMAGE = Scheduler("unipc", 5.0, 50, 5.0), Scheduler("unipc", 3.0, 40, 5.0)


def read_scheduler(folder: Path, image: bool = False) -> Scheduler:
    """A model's scheduler: of its `scheduler/`, else of its `vpae_jax.json`, else Wan's own.

    Args:
      folder: the model's.
      image: whether this is an image-to-video model, which Wan samples with fewer steps and another shift.

    Raises:
      UserError: one of a kind that our solvers do not have.
    """
    path = folder / "scheduler" / SCHEDULER
    if not path.is_file():
        told, where = _settings(folder).get("scheduler"), f"{folder / SETTINGS}.scheduler"
        if told is None:
            return WAN_IMAGE if image else WAN_TEXT
        if not isinstance(told, dict):
            raise UserError(f"{where}: expected a JSON object, found {told!r}")
        return build(Scheduler, told, where)
    values = read_json(path)
    name = str(values.get("_class_name"))
    if name not in _REQUIRED:
        raise UserError(f"{path}: _class_name is {name!r}, expected one of {', '.join(_REQUIRED)}")
    for key, expected in _REQUIRED[name].items():
        found = values.get(key, _ABSENT.get(key, expected))
        if found != expected:
            left_out = "" if key in values else " (Diffusers' default, as the file does not say)"
            raise UserError(f"{path}: {key} is {found!r}{left_out}, only {expected!r} is supported")
    unipc = name == _UNIPC
    given = {"solver": "unipc" if unipc else "euler", "shift": values.get("flow_shift" if unipc else "shift", 1.0)}
    given |= {ours: values[key] for ours, key in (("steps", _STEPS), ("guidance", _GUIDANCE)) if key in values}
    return build(Scheduler, given, str(path))


def read_defaults(folder: Path, image: bool = False) -> Defaults:
    """The model's default clip; Wan 2.1's where there is no `vpae_jax.json`.

    Args:
      folder: the model's.
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
