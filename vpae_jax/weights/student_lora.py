"""A student's LoRA file, with what it takes to sample it: in the file's metadata, and for ComfyUI in a workflow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jax.typing import DTypeLike

from vpae_jax.weights.comfyui import SUFFIX, model_file, obstacle, workflow, write_workflow
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.lora import Lora, write_lora
from vpae_jax.weights.lora_card import BASE, about_sampling
from vpae_jax.weights.names import Layout
from vpae_jax.weights.parts import makes_from_image
from vpae_jax.weights.settings import Scheduler, read_defaults


def write_student_lora(
    target: Path,
    lora: Lora,
    form: Layout,
    dtype: DTypeLike | None,
    about: Mapping[str, str],
    scheduler: Scheduler,
    model: ModelDirectory,
) -> None:
    """Writes a LoRA file; ComfyUI's form gets a workflow beside it, `NAME.workflow.json`.

    Args:
      about: for the file's metadata; names the model that it is for.
      scheduler: how the student is sampled.
      model: whose parts and default clip the student has.

    Raises:
      UserError: as `write_lora`.
    """
    image = makes_from_image({name: source.config for name, source in model.parts.items()})
    clip = read_defaults(model.folder, image)
    write_lora(target, lora, form, dtype, {**about, **about_sampling(scheduler, clip, image, form)})
    if form == "wan" and obstacle(scheduler, model.boundary) is None:
        encoder = "image_encoder" in model.parts
        base = model_file(about.get(BASE, ""))
        graph = workflow(scheduler, clip, base, image=image, image_encoder=encoder, lora=target.name)
        write_workflow(target.with_suffix(SUFFIX), graph)
