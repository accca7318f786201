"""The model card of a LoRA file on the hub: what the file's own metadata say of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from vpae_jax.config import build
from vpae_jax.types import UserError
from vpae_jax.weights.card import TAGS, Provenance, binding, end, sampling_facts, top
from vpae_jax.weights.comfyui import FOLDERS, model_file
from vpae_jax.weights.safetensors_file import parse_json
from vpae_jax.weights.settings import Defaults, Scheduler, scheduler_from_json

# Keys of the metadata. Of these `SAMPLING` is for people, and `SCHEDULER` is a scheduler_config.json.
BASE, COMMAND, TASK, FORM, CLIP, SAMPLING, SCHEDULER = (
    "base",
    "command",
    "task",
    "form",
    "clip",
    "sampling",
    "scheduler",
)
IMAGE, TEXT = "image-to-video", "text-to-video"
# Settings of Diffusers' schedulers that decide the times.
_TIMING = ("prediction_type", "use_flow_sigmas", "flow_shift", "shift", "shift_terminal")


def about_sampling(scheduler: Scheduler, clip: Defaults, image: bool, form: str) -> dict[str, str]:
    """What the metadata of a student's LoRA file say of how it is sampled.

    Args:
      clip: the clip that it makes.
      image: whether it makes videos from a first frame.
      form: whose names its tensors have.
    """
    told = {SAMPLING: scheduler.told(), SCHEDULER: scheduler.to_json(), CLIP: dataclasses.asdict(clip)}
    return {**{name: json.dumps(value) for name, value in told.items()}, TASK: IMAGE if image else TEXT, FORM: form}


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises `UserError` for a file that cannot be read."""
    try:
        with safe_open(file, "np") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


def lora_card(file: Path, metadata: Mapping[str, str], provenance: Provenance, workflow: str | None) -> str:
    """A README.md.

    Args:
      metadata: the file's.
      provenance: where it comes from; `origin` is that of the model that it is for.
      workflow: name of its ComfyUI workflow; None for none.

    Raises:
      UserError: metadata that say of its sampling what no scheduler has.
    """
    scheduler = clip = None
    if SCHEDULER in metadata:
        scheduler = scheduler_from_json(parse_json(metadata[SCHEDULER].encode()), f"{file}: {SCHEDULER}")
        clip = build(Defaults, parse_json(metadata.get(CLIP, "{}").encode()), f"{file}: {CLIP}")
    task, form, base = metadata.get(TASK, TEXT), metadata.get(FORM, "diffusers"), metadata.get(BASE, "")
    library = {"library_name": "diffusers"} if form == "diffusers" else {}
    relation = {"base_model_relation": "adapter"} if provenance.origin.model else {}
    head = {**provenance.origin.header(), **relation, "pipeline_tag": task, **library, "tags": ["lora", *TAGS]}
    facts = {
        "for": base,
        "with": metadata.get("base_lora", ""),
        "rank": metadata.get("rank", ""),
        "source": provenance.source,
        **provenance.facts,
        **({} if scheduler is None else sampling_facts(scheduler)),
        COMMAND: metadata.get(COMMAND, ""),
    }
    lines = top(head, f"A LoRA for a Wan 2.1 {task} model", {name: value for name, value in facts.items() if value})
    if workflow is not None:
        needed = f"`{FOLDERS['lora']}/{file.name}` and `{FOLDERS['model']}/{model_file(base)}`"
        lines += ["", "## ComfyUI", "", f"Drag `{workflow}` into ComfyUI. It loads {needed} of `ComfyUI/models`."]
    if scheduler is not None and clip is not None and form == "diffusers":
        lines += ["", "## Use", "", *_use(file.name, base, scheduler, clip, task == IMAGE)]
    return "\n".join([*lines, *end(provenance)]) + "\n"


def _use(file: str, base: str, scheduler: Scheduler, clip: Defaults, image: bool) -> list[str]:
    """How Diffusers samples the model with the LoRA, as the student is sampled."""
    given = ['image=load_image("FIRST_FRAME.png")'] if image else []
    given += ['prompt="..."', f"num_frames={clip.num_frames}", f"height={clip.height}", f"width={clip.width}"]
    given += [f"num_inference_steps={scheduler.steps}", f"guidance_scale={scheduler.guidance}"]
    config = scheduler.to_json()
    name, timing = config["_class_name"], ", ".join(f"{key}={config[key]!r}" for key in _TIMING if key in config)
    return [
        "```python",
        *(["from functools import partial", "", "import numpy"] if scheduler.bound_times else []),
        f"from diffusers import DiffusionPipeline, {name}",
        *(["from diffusers.utils import load_image"] if image else []),
        "",
        f"pipe = DiffusionPipeline.from_pretrained({base!r})",
        f'pipe.load_lora_weights(".", weight_name={file!r})',
        f"pipe.scheduler = {name}({timing})",
        *binding(scheduler),
        f"frames = pipe({', '.join(given)}).frames[0]",
        "```",
    ]
