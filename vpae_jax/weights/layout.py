"""A whole model directory, written: its parts, what lies beside them, its settings and its card."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from vpae_jax.types import UserError
from vpae_jax.weights.card import Card, Provenance, write_card
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.filenames import INDEX, SCHEDULER, SETTINGS, VERSION, read_json, write_json
from vpae_jax.weights.find import find_model
from vpae_jax.weights.image_processor import IMAGE_PROCESSOR_FILE, ImageProcessor
from vpae_jax.weights.parts import PARTS, check_fit, untold
from vpae_jax.weights.settings import Defaults, Scheduler, read_defaults, read_scheduler
from vpae_jax.weights.tensors import SHARD_BYTES
from vpae_jax.weights.writing import Format, Values, open_values, replacing, verify_part, write_part

WAN_TOKENIZER = Path("google/umt5-xxl")  # where Wan's own code looks


def write_model(
    folder: Path,
    base: ModelDirectory,
    parts: Mapping[str, Values],
    *,
    form: Format = "diffusers",
    scheduler: Scheduler | None = None,
    defaults: Defaults | None = None,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    provenance: Provenance | None = None,
    complete: bool = True,
    verify: bool = False,
) -> dict[str, int]:
    """Writes a model directory; it appears whole or not at all.

    Args:
      folder: where to write.
      base: all that `parts` and the other arguments do not give: its remaining parts, tokenizer, image processor,
        scheduler, default clip. A missing image processor is written for the image encoder's size.
      parts: config and weights of the parts that differ from the base.
      form: the layout.
      scheduler, defaults: in place of the base's.
      dtype: of all weights; None keeps theirs.
      overwrite: replace an existing model directory; anything else there is never replaced.
      shard_bytes: largest size of one safetensors file.
      provenance: what the model card says of where the weights come from; None for "from `base`".
      complete: whether a part or tokenizer that a Wan pipeline needs must be there. Without one there is no
        model_index.json either.
      verify: whether every tensor is read back, and compared bit for bit, before the directory appears.

    Returns:
      how many parameters and layers of each part were compared; nothing without `verify`.

    Raises:
      UserError: `folder` exists, neither `base` nor `parts` has what `complete` asks for, parts do not fit together, or
        do not read back as they were written.
    """
    if folder.exists() and not (overwrite and (folder / INDEX).is_file()):
        raise UserError(f"{folder}: already exists; remove it or choose another destination")
    names = [name for name in PARTS if name in parts or name in base.parts]
    if complete:
        base.require_whole(parts)
    known = {name: parts[name].config if name in parts else base.parts[name].config for name in names}
    check_fit(known, str(base.path))
    encoder = known.get("image_encoder")
    image = encoder is not None or ("transformer" in known and known["transformer"].image_dim is not None)
    whole = not base.lacks(parts)
    scheduler = scheduler or read_scheduler(base.folder, image)
    defaults = defaults or read_defaults(base.folder, image)
    with replacing(folder) as temporary:
        temporary.mkdir()
        for name in names:
            with ExitStack() as stack:
                values = parts[name] if name in parts else stack.enter_context(open_values(base, name))
                write_part(temporary, name, values, form, dtype, shard_bytes)
        _copy_tokenizers(temporary, base, form)
        settings: dict[str, Any] = dataclasses.asdict(defaults)
        if form == "wan":
            told = {name: untold(name, config) for name, config in known.items()}
            settings |= {"scheduler": dataclasses.asdict(scheduler), "parts": {n: t for n, t in told.items() if t}}
        else:
            (temporary / "scheduler").mkdir()
            write_json(temporary / "scheduler" / SCHEDULER, scheduler.to_json())
            if encoder is not None:
                _image_processor(temporary, base, encoder)
            if whole:
                write_json(temporary / INDEX, _index(temporary, encoder is not None))
        write_json(temporary / SETTINGS, settings)
        card = Card(form, image, whole, tuple(names), scheduler, defaults, provenance or Provenance(str(base.path)))
        write_card(temporary, card)
        written = dataclasses.replace(find_model(temporary), path=folder)  # by the name that messages are to tell
        return {name: _verify(written, name, base, parts, dtype) for name in names} if verify else {}


def _verify(
    written: ModelDirectory, name: str, base: ModelDirectory, parts: Mapping[str, Values], dtype: DTypeLike | None
) -> int:
    with ExitStack() as stack:
        values = parts[name] if name in parts else stack.enter_context(open_values(base, name))
        try:
            return verify_part(written, name, values, dtype)
        except UserError as error:
            raise UserError(f"{error}; nothing is kept. Is the disk sound?") from error


def _copy_tokenizers(folder: Path, base: ModelDirectory, form: Format) -> None:
    """The text encoder's tokenizer at its place in the layout, and Wan's others where they were."""
    if base.tokenizer is None:
        return
    shutil.copytree(base.tokenizer, folder / (WAN_TOKENIZER if form == "wan" else "tokenizer"))
    for other in base.more_tokenizers:
        shutil.copytree(other, folder / other.name)


def _image_processor(folder: Path, base: ModelDirectory, config: Any) -> None:
    target = folder / "image_processor"
    if base.image_processor is not None:
        shutil.copytree(base.image_processor, target)
        return
    target.mkdir()
    side = config.image_size
    write_json(target / IMAGE_PROCESSOR_FILE, ImageProcessor(side, (side, side)).to_json())


def _index(folder: Path, image: bool) -> dict[str, Any]:
    """The model_index.json of what has been written into `folder`."""
    tokenizer = read_json(folder / "tokenizer" / "tokenizer_config.json").get("tokenizer_class", "T5TokenizerFast")
    scheduler = read_json(folder / "scheduler" / SCHEDULER)["_class_name"]
    index: dict[str, Any] = {
        "_class_name": "WanImageToVideoPipeline" if image else "WanPipeline",
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", tokenizer],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if image:
        index |= {
            "image_encoder": ["transformers", "CLIPVisionModel"],
            "image_processor": ["transformers", "CLIPImageProcessor"],
        }
    return index
