"""A whole model directory: its index, its scheduler, its default clip, and how one is written.

`vpae_jax.json` beside `model_index.json` holds what Diffusers has no place for and does not read: the size of clip that
the model was made for (`Defaults`). Without it Wan 2.1's own defaults hold.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jax.typing import DTypeLike

from vpae_jax.config import build
from vpae_jax.convert.diffusers import Weights, replacing, write_part
from vpae_jax.convert.files import SHARD_BYTES, read_json, write_json
from vpae_jax.convert.image_processor import FILE as IMAGE_PROCESSOR_FILE
from vpae_jax.convert.image_processor import ImageProcessor
from vpae_jax.convert.parts import PARTS
from vpae_jax.types import UserError

INDEX, DEFAULTS, SCHEDULER = "model_index.json", "vpae_jax.json", "scheduler_config.json"
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


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json of a Wan 2.1 pipeline.

    Raises:
      UserError: no model directory there, or one of another pipeline.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a model directory in the Diffusers layout")
    path = folder / INDEX
    index = read_json(path)
    if index.get("_class_name") not in ("WanPipeline", "WanImageToVideoPipeline"):
        found = index.get("_class_name")
        raise UserError(f"{path}: _class_name is {found!r}, expected 'WanPipeline' or 'WanImageToVideoPipeline'")
    second = index.get("transformer_2") or [None]
    if second[0] is not None or index.get("expand_timesteps"):
        raise UserError(f"{path}: this is a Wan 2.2 pipeline (transformer_2 or expand_timesteps); only Wan 2.1 works")
    return index


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


def write_model(
    folder: Path,
    source: Path,
    parts: Mapping[str, tuple[Any, Weights]],
    *,
    scheduler: Scheduler | None = None,
    defaults: Defaults | None = None,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model directory that Diffusers loads; it appears whole or not at all.

    Args:
      folder: where to write.
      source: a model directory, or as much of one as `parts` and the other arguments do not give: its tokenizer,
        image processor, scheduler, default clip and remaining parts are copied as they are. A missing image processor
        is written for the image encoder's size.
      parts: config and weights of the parts that differ from the source.
      scheduler, defaults: in place of the source's.
      dtype: of the weights in `parts`; None keeps theirs.
      overwrite: replace an existing model directory; anything else there is never replaced.
      shard_bytes: largest size of one safetensors file.

    Raises:
      UserError: `folder` exists, or neither `source` nor `parts` has a part that a Wan pipeline needs.
    """
    if folder.exists() and not (overwrite and (folder / INDEX).is_file()):
        raise UserError(f"{folder}: already exists; remove it or choose another destination")
    names = [name for name in PARTS if name in parts or (source / name).is_dir()]
    for name in ("transformer", "vae", "text_encoder"):
        if name not in names:
            raise UserError(f"{source}: no {name}/ folder; expected a model directory in the Diffusers layout")
    if not (source / "tokenizer").is_dir():
        raise UserError(f"{source}: no tokenizer/ folder; expected a model directory in the Diffusers layout")
    with replacing(folder) as temporary:
        temporary.mkdir()
        for name in names:
            if name in parts:
                write_part(temporary, name, *parts[name], dtype, shard_bytes)
            else:
                shutil.copytree(source / name, temporary / name)
        shutil.copytree(source / "tokenizer", temporary / "tokenizer")
        if "image_encoder" in names:
            _image_processor(temporary, source, parts)
        if scheduler is not None or not (source / "scheduler").is_dir():
            scheduler = scheduler or Scheduler()
            (temporary / "scheduler").mkdir()
            write_json(temporary / "scheduler" / SCHEDULER, scheduler.to_json())
        else:
            shutil.copytree(source / "scheduler", temporary / "scheduler")
        if defaults is not None:
            write_json(temporary / DEFAULTS, dataclasses.asdict(defaults))
        elif (source / DEFAULTS).is_file():
            shutil.copyfile(source / DEFAULTS, temporary / DEFAULTS)
        write_json(temporary / INDEX, _index(temporary, names))


def _image_processor(folder: Path, source: Path, parts: Mapping[str, tuple[Any, Weights]]) -> None:
    if (source / "image_processor").is_dir():
        shutil.copytree(source / "image_processor", folder / "image_processor")
        return
    if "image_encoder" not in parts:
        raise UserError(f"{source}: no image_processor/ folder beside image_encoder/; fetch the model again")
    side = parts["image_encoder"][0].image_size
    (folder / "image_processor").mkdir()
    write_json(folder / "image_processor" / IMAGE_PROCESSOR_FILE, ImageProcessor(side, (side, side)).to_json())


def _index(folder: Path, names: list[str]) -> dict[str, Any]:
    """The model_index.json of what has been written into `folder`."""
    tokenizer = read_json(folder / "tokenizer" / "tokenizer_config.json").get("tokenizer_class", "T5TokenizerFast")
    scheduler = read_json(folder / "scheduler" / SCHEDULER)["_class_name"]
    index: dict[str, Any] = {
        "_class_name": "WanImageToVideoPipeline" if "image_encoder" in names else "WanPipeline",
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", tokenizer],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if "image_encoder" in names:
        index |= {
            "image_encoder": ["transformers", "CLIPVisionModel"],
            "image_processor": ["transformers", "CLIPImageProcessor"],
        }
    return index
