"""How a model directory is sampled and which clip it makes: what its author recommends.

`vpae_jax.json` beside `model_index.json` holds what Diffusers has no place for and does not read: the size of clip that
the model was made for (`Defaults`). Without it Wan 2.1's own defaults hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vpae_jax.config import build
from vpae_jax.convert.files import read_json
from vpae_jax.types import UserError

DEFAULTS, SCHEDULER = "vpae_jax.json", "scheduler_config.json"
VERSION = "0.33.0"  # the first Diffusers release with Wan

_UNIPC, _EULER = "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"
# What a scheduler's config must say, where it says anything, for our solvers to take the same steps on the same times.
_REQUIRED: Mapping[str, Mapping[str, Any]] = {
    _UNIPC: {
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "solver_order": 2,
        "solver_type": "bh2",
        "predict_x0": True,
        "thresholding": False,
        "use_dynamic_shifting": False,
    },
    _EULER: {
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": False,
        "shift_terminal": None,
        "stochastic_sampling": False,
    },
}


@dataclass(frozen=True)
class Scheduler:
    """How the directory's author samples it.

    UniPC's times are Diffusers' own (`flow.solvers.unipc_grid`). Euler's are `flow.schedule.shifted_times`, which
    Diffusers' scheduler has by itself for one step only: for more it spaces them from 1 to the shifted 1/1000, and then
    shifts them (4 steps, shift 1: 1, .667, .334, .001, 0, where ours are 1, .75, .5, .25, 0). It takes ours when given
    them unshifted and without the last 0:

        scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])  # shifted by the scheduler

    Wan's pipelines call `set_timesteps` with a number of steps and take no sigmas; for them, bind the sigmas first:

        pipe.scheduler.set_timesteps = functools.partial(pipe.scheduler.set_timesteps, sigmas=[1, 0.75, 0.5, 0.25])
        pipe(prompt, num_inference_steps=4)

    Attributes:
      solver: "unipc" (Diffusers' UniPCMultistepScheduler) or "euler" (FlowMatchEulerDiscreteScheduler).
      shift: s of the time grid, `flow.schedule` Eq. 8.
    """

    solver: Literal["euler", "unipc"] = "unipc"
    shift: float = 3.0

    def to_json(self) -> dict[str, Any]:
        """The scheduler_config.json that Diffusers reads."""
        if self.solver == "euler":
            settings: dict[str, Any] = {"_class_name": _EULER, "shift": self.shift}
        else:
            settings = {"_class_name": _UNIPC, "flow_shift": self.shift}
        return {**_REQUIRED[settings["_class_name"]], **settings, "_diffusers_version": VERSION}


@dataclass(frozen=True)
class Defaults:
    """The clip that a call without sizes makes.

    Attributes:
      num_frames: 1 + a multiple of 4.
      height, width: pixels.
      fps: frames a second of a written video.
    """

    num_frames: int = 81
    height: int = 480
    width: int = 832
    fps: float = 16.0


def read_scheduler(folder: Path) -> Scheduler:
    """The model directory's scheduler.

    Raises:
      UserError: none there, or one of a kind that our solvers do not have.
    """
    path = folder / "scheduler" / SCHEDULER
    values = read_json(path)
    name = str(values.get("_class_name"))
    if name not in _REQUIRED:
        raise UserError(f"{path}: _class_name is {name!r}, expected one of {', '.join(_REQUIRED)}")
    for key, expected in _REQUIRED[name].items():
        if values.get(key, expected) != expected:
            raise UserError(f"{path}: {key} is {values[key]!r}, only {expected!r} is supported")
    unipc = name == _UNIPC
    shift = values.get("flow_shift" if unipc else "shift", 1.0)
    return build(Scheduler, {"solver": "unipc" if unipc else "euler", "shift": shift}, str(path))


def read_defaults(folder: Path) -> Defaults:
    """The model directory's default clip; Wan 2.1's where there is no `vpae_jax.json`."""
    path = folder / DEFAULTS
    return build(Defaults, read_json(path), str(path)) if path.is_file() else Defaults()
