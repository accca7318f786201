"""Writes a whole model directory: parts, accompanying files, settings and model card."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from vpae_jax.files import replacing
from vpae_jax.types import UserError
from vpae_jax.weights.card import SAMPLES, Card, Provenance, write_card
from vpae_jax.weights.comfyui import SUFFIX, obstacle, workflow, write_workflow
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.filenames import (
    CAUSAL_PIPELINE,
    CAUSAL_TRANSFORMER,
    INDEX,
    PRODUCT,
    SAMPLING,
    SCHEDULER,
    SETTINGS,
    VERSION,
    read_json,
    write_json,
)
from vpae_jax.weights.find import HIGH_FOLDER, LOW_FOLDER, find_model
from vpae_jax.weights.image_processor import IMAGE_PROCESSOR_FILE, ImageProcessor
from vpae_jax.weights.lora import Lora, write_lora
from vpae_jax.weights.merging import MERGED_BEFORE, LoraFile, about_base, told
from vpae_jax.weights.parts import LOW, PARTS, check_fit, kind_of, makes_from_image, untold
from vpae_jax.weights.pickles import require_torch
from vpae_jax.weights.settings import Defaults, Scheduler, read_defaults, read_scheduler
from vpae_jax.weights.spiece import check_files
from vpae_jax.weights.tensors import SHARD_BYTES
from vpae_jax.weights.writing import Format, Values, is_pickled, open_values, verify_part, write_part

WAN_TOKENIZER = Path("google/umt5-xxl")  # where Wan's own code looks
# ComfyUI reads no shards, and Wan's own program reads one file as well as several.
_LARGEST: Mapping[Format, int] = {"wan": sys.maxsize}
LORA_FILE = "pytorch_lora_weights.safetensors"  # what Diffusers' `load_lora_weights` looks for in a folder


@dataclass(frozen=True)
class Contents:
    """The contents of a model directory to be written.

    Attributes:
      base: supplies everything else: remaining parts, tokenizer, image processor, scheduler, default clip. A missing
        image processor is written for the image encoder's size.
      parts: config and weights of the parts that differ from the base.
      scheduler, defaults, boundary: replace the base's.
      lora: changes that turn another model's transformer into the one in `parts`; written along with the parts in the
        diffusers layout, except for a causal model, since programs that load it would let all frames see each other.
      base_loras: LoRA files that were merged into the base's transformer before training, so that `lora` applies on top
        of them.
      provenance: the origin of the weights for the model card; None for "from `base`".
      without: parts of the base that cannot be read and may be missing; any other unreadable part is an error.
    """

    base: ModelDirectory
    parts: Mapping[str, Values] = field(default_factory=dict)
    scheduler: Scheduler | None = None
    defaults: Defaults | None = None
    boundary: float | None = None
    lora: Lora | None = None
    base_loras: tuple[LoraFile, ...] = ()
    provenance: Provenance | None = None
    without: Collection[str] = ()

    @property
    def configs(self) -> dict[str, Any]:
        """The config of every part, in writing order."""
        base, parts = self.base.parts, self.parts
        return {n: (parts if n in parts else base)[n].config for n in PARTS if n in parts or n in base}

    @contextmanager
    def values(self, part: str) -> Iterator[Values]:
        """Opens a part's weights, in memory or in the base's files."""
        if part in self.parts:
            yield self.parts[part]
        else:
            with open_values(self.base, part) as values:
                yield values

    def card(self, form: Format) -> Card:
        """The content of the model card. Raises `UserError` for parts that do not fit together, or cannot be read."""
        configs, folder = self.configs, self.base.folder
        for name in self.base.unreadable:
            if name not in self.parts and name not in self.without:
                self.base.part(name)
        check_fit(configs, str(self.base.path), self.without)
        boundary = self.base.boundary if self.boundary is None else self.boundary
        if (LOW in configs) != (boundary is not None):
            there, missing = (LOW, "no boundary between it and transformer") if LOW in configs else ("a boundary", LOW)
            raise UserError(f"{self.base.path}: has {there}, but {missing}; two experts need both")
        image = makes_from_image(configs)
        scheduler = self.scheduler or read_scheduler(folder, image)
        with_lora = self.lora is not None and form == "diffusers" and scheduler.chunks is None
        return Card(
            form=form,
            image=image,
            whole=not self.base.lacks(self.parts),
            parts=tuple(configs),
            scheduler=scheduler,
            defaults=self.defaults or read_defaults(folder, image),
            provenance=self.provenance or Provenance(str(self.base.path)),
            boundary=boundary,
            lora=LORA_FILE if with_lora else None,
            base=str(self.base.path),
            base_loras=self.base_loras,
        )


def write_product(workdir: Path, contents: Contents, facts: Mapping[str, Any] | None = None) -> Path:
    """Writes the model directory of a run into its workdir, replacing an earlier one, and returns its path.

    Args:
      workdir: of the run.
      contents: what to write.
      facts: facts about the run for the model card.

    Raises:
      UserError: a part is missing, or as `write_model`.
    """
    base, folder = contents.base, workdir / PRODUCT
    base.require_whole(contents.parts)
    begun = {"started from": str(base.path)} if base.parts else {}
    begun |= {MERGED_BEFORE: told(contents.base_loras)} if contents.base_loras else {}
    provenance = Provenance(str(workdir), {**begun, **(facts or {})})
    write_model(folder, dataclasses.replace(contents, provenance=provenance), overwrite=True)
    return folder


def write_model(
    folder: Path,
    contents: Contents,
    form: Format = "diffusers",
    *,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
    verify: bool = False,
) -> dict[str, int]:
    """Writes a model directory, which appears complete or not at all.

    If a part or tokenizer that a Wan pipeline needs (`ModelDirectory.require_whole`) is missing, no model_index.json is
    written.

    Args:
      folder: where to write.
      contents: what to write.
      form: the layout.
      dtype: of all weights; None keeps theirs.
      overwrite: whether to replace an existing model directory; anything else is never replaced.
      verify: whether to read back every tensor and check that it is bit-identical before the directory appears.

    Returns:
      The number of parameters and layers of each part that were compared; empty without `verify`.

    Raises:
      UserError: `folder` exists, parts do not fit together, or do not read back as they were written; the layout needs
        PyTorch, which is not installed.
    """
    if folder.exists() and not (overwrite and (folder / INDEX).is_file()):
        raise UserError(f"{folder}: already exists; remove it or choose another destination")
    card = contents.card(form)
    for name in card.parts:
        if is_pickled(name, form):  # checked before the transformer is written, which takes minutes
            require_torch(folder / PARTS[name].wan_file)
    card = dataclasses.replace(card, name=folder.name, workflow=_workflow_name(folder, card))
    with replacing(folder) as temporary:
        temporary.mkdir()
        for name in card.parts:
            with contents.values(name) as values:
                write_part(_root(temporary, name, card), name, values, form, dtype, _LARGEST.get(form, SHARD_BYTES))
        _copy_tokenizers(temporary, contents.base, form)
        if form == "wan":
            _write_wan_settings(temporary, contents, card)
        else:
            _write_settings(temporary, contents, card)
        if card.lora is not None and contents.lora is not None:
            about = about_base(contents.base.path, contents.base_loras)
            write_lora(temporary / card.lora, contents.lora, "diffusers", about=about)
        if card.workflow is not None:
            write_workflow(temporary / card.workflow, _workflow(card))
        for sample in card.provenance.samples:
            (temporary / SAMPLES).mkdir(exist_ok=True)
            shutil.copy(sample, temporary / SAMPLES)
        write_card(temporary, card)
        written = dataclasses.replace(find_model(temporary), path=folder)  # with its final path, for messages
        return {name: _verify(written, name, contents, dtype) for name in card.parts} if verify else {}


def _workflow_name(folder: Path, card: Card) -> str | None:
    """What a folder's ComfyUI workflow is called; None where it has none."""
    if card.form != "wan" or "transformer" not in card.parts or obstacle(card.scheduler, card.boundary) is not None:
        return None
    return folder.name + SUFFIX


def _workflow(card: Card) -> dict[str, Any]:
    """The folder's ComfyUI workflow."""
    encoder = "image_encoder" in card.parts
    return workflow(card.scheduler, card.defaults, f"{card.name}.safetensors", image=card.image, image_encoder=encoder)


def _root(folder: Path, part: str, card: Card) -> Path:
    """The folder in which a layout places a part: Wan's two experts have separate folders."""
    if card.form == "wan" and card.boundary is not None and kind_of(part) == "transformer":
        return folder / (LOW_FOLDER if part == LOW else HIGH_FOLDER)
    return folder


def _verify(written: ModelDirectory, name: str, contents: Contents, dtype: DTypeLike | None) -> int:
    with contents.values(name) as values:
        try:
            return verify_part(written, name, values, dtype)
        except UserError as error:
            raise UserError(f"{error}; nothing is kept. Is the disk sound?") from error


def _write_wan_settings(folder: Path, contents: Contents, card: Card) -> None:
    """Writes the settings that Wan's own layout has no place for."""
    told = {name: untold(name, config) for name, config in contents.configs.items()}
    settings = dataclasses.asdict(card.defaults)
    settings |= {"scheduler": dataclasses.asdict(card.scheduler), "parts": {n: t for n, t in told.items() if t}}
    settings |= {} if card.boundary is None else {"boundary": card.boundary}
    write_json(folder / SETTINGS, settings)


def _write_settings(folder: Path, contents: Contents, card: Card) -> None:
    """Writes the other files of the diffusers layout, and our settings."""
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / SCHEDULER, card.scheduler.to_json())
    encoder, settings = contents.configs.get("image_encoder"), dataclasses.asdict(card.defaults)
    if encoder is not None:
        _image_processor(folder, contents.base, encoder)
    if card.whole:
        write_json(folder / INDEX, _index(folder, card))
    elif card.boundary is not None:
        settings |= {"boundary": card.boundary}
    write_json(folder / SETTINGS, settings)


def _copy_tokenizers(folder: Path, base: ModelDirectory, form: Format) -> None:
    """Copies the text encoder's tokenizer to its place in the layout, and Wan's other tokenizers under their names."""
    if not base.has_tokenizer:
        return
    for folder_of_one in (base.tokenizer, *base.more_tokenizers):
        if folder_of_one is not None:
            check_files(folder_of_one)
    with base.open_tokenizer() as source:
        shutil.copytree(source, folder / (WAN_TOKENIZER if form == "wan" else "tokenizer"))
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


def _index(folder: Path, card: Card) -> dict[str, Any]:
    """The model_index.json for what has been written into `folder`. For a causal model, it makes Diffusers refuse."""
    tokenizer = read_json(folder / "tokenizer" / "tokenizer_config.json").get("tokenizer_class", "T5TokenizerFast")
    scheduler = read_json(folder / "scheduler" / SCHEDULER)["_class_name"]
    transformer = ["diffusers", CAUSAL_TRANSFORMER if card.causal else "WanTransformer3DModel"]
    pipeline = "WanImageToVideoPipeline" if card.image else "WanPipeline"
    index: dict[str, Any] = {
        "_class_name": CAUSAL_PIPELINE if card.causal else pipeline,
        "_diffusers_version": VERSION,
        SAMPLING: card.scheduler.told(),
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", tokenizer],
        "transformer": transformer,
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if card.boundary is not None:
        index |= {LOW: transformer, "boundary_ratio": card.boundary}
    if "image_encoder" in card.parts:
        index |= {
            "image_encoder": ["transformers", "CLIPVisionModel"],
            "image_processor": ["transformers", "CLIPImageProcessor"],
        }
    return index
