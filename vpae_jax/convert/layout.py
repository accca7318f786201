"""A whole model directory: its index, and how one is written."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from vpae_jax.convert.diffusers import Weights, replacing, write_part
from vpae_jax.convert.files import SHARD_BYTES, read_json, write_json
from vpae_jax.convert.image_processor import FILE as IMAGE_PROCESSOR_FILE
from vpae_jax.convert.image_processor import ImageProcessor
from vpae_jax.convert.parts import PARTS
from vpae_jax.convert.settings import DEFAULTS, SCHEDULER, VERSION, Defaults, Scheduler
from vpae_jax.types import UserError

INDEX = "model_index.json"


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
