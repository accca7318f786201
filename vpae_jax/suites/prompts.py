"""The prompts of a suite, read from the user's own checkout of it.

Sources, of the repository Vchitect/VBench:

    vbench       vbench/VBench_full_info.json; line i of an augmented file is for its entry i
    vbench_i2v   vbench2_beta_i2v/vbench2_i2v_full_info.json, images in vbench2_beta_i2v/data/crop/RATIO
    vbench2      VBench-2.0/prompts/VBench2_full_text.txt; line i of an augmented file is for its line i; dimensions in
                 VBench-2.0/vbench2/VBench2_full_info.json

A video is made from the augmented prompt and named after the original one. Where a suite lists a prompt twice, the
files of both have the same names: the clips are made once, for the first entry.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vpae_jax.files import local_path
from vpae_jax.flow.draws import check_seed
from vpae_jax.types import UserError

SuiteName = Literal["vbench", "vbench_i2v", "vbench2"]
REPOSITORY = "https://github.com/Vchitect/VBench"
NONE = "none"  # instead of a file: no augmented prompts
# Sample j of prompt i has the seed 100000 i + j, as in the leaderboard's entry for Wan 2.1 14B (VBench's issue 163).
SPREAD = 100_000
MAX_SAMPLES = 1000
# Aspect ratios (width / height) of VBench-I2V's images, by folder.
RATIOS: Mapping[str, float] = {"1-1": 1.0, "8-5": 8 / 5, "7-4": 7 / 4, "16-9": 16 / 9}
MAX_STRETCH = 1.1  # largest ratio between the aspect ratios of an image and the video


@dataclass(frozen=True)
class Suite:
    """A benchmark's rules.

    Attributes:
      name: its key on the command line.
      title: its own name.
      folder: of the checkout, where its programs are run.
      info: its list of prompts and their dimensions, relative to the checkout.
      dimensions: what it measures.
      samples: videos per prompt.
      more: videos per prompt for single dimensions that need more.
      order: file with each prompt once, one per line; "" if `info` itself gives their order.
      augmented: file of augmented prompts for Wan; "" if the suite has none.
      longest: number of characters of a prompt used in file names; 0 for all.
      crf: H.264's constant rate factor if the suite specifies one, else None.
      pictures: folder of the first frames' crops; "" for text-to-video.
    """

    name: SuiteName
    title: str
    folder: str
    info: str
    dimensions: tuple[str, ...]
    samples: int
    more: Mapping[str, int] = field(default_factory=dict)
    order: str = ""
    augmented: str = ""
    longest: int = 0
    crf: int | None = None
    pictures: str = ""


_QUALITY = ("subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree")
_QUALITY += ("aesthetic_quality", "imaging_quality")

SUITES: Mapping[str, Suite] = {
    "vbench": Suite(
        "vbench",
        "VBench",
        ".",
        "vbench/VBench_full_info.json",
        (
            *_QUALITY,
            "temporal_flickering",
            "object_class",
            "multiple_objects",
            "human_action",
            "color",
            "spatial_relationship",
            "scene",
            "appearance_style",
            "temporal_style",
            "overall_consistency",
        ),
        samples=5,
        more={"temporal_flickering": 25},  # its filter keeps five static ones
        augmented="prompts/augmented_prompts/Wan2.1-T2V-1.3B/all_dimension_aug_wanx_seed42.txt",
    ),
    "vbench_i2v": Suite(
        "vbench_i2v",
        "VBench-I2V",
        ".",
        "vbench2_beta_i2v/vbench2_i2v_full_info.json",
        ("camera_motion", "i2v_subject", "i2v_background", *_QUALITY),
        samples=5,
        crf=10,
        pictures="vbench2_beta_i2v/data/crop",
    ),
    "vbench2": Suite(
        "vbench2",
        "VBench-2.0",
        "VBench-2.0",
        "VBench-2.0/vbench2/VBench2_full_info.json",
        (
            "Human_Anatomy",
            "Human_Identity",
            "Human_Clothes",
            "Diversity",
            "Composition",
            "Dynamic_Spatial_Relationship",
            "Dynamic_Attribute",
            "Motion_Order_Understanding",
            "Human_Interaction",
            "Complex_Landscape",
            "Complex_Plot",
            "Camera_Motion",
            "Motion_Rationality",
            "Instance_Preservation",
            "Mechanics",
            "Thermotics",
            "Material",
            "Multi-View_Consistency",
        ),
        samples=3,
        more={"Diversity": 20},
        order="VBench-2.0/prompts/VBench2_full_text.txt",
        augmented="VBench-2.0/prompts/prompt_aug/Wanx_full_text_aug.txt",
        longest=180,
    ),
}


@dataclass(frozen=True)
class Prompt:
    """One prompt of a suite.

    Attributes:
      number: its index in the suite's list, from 0; determines its seeds.
      text: as listed by the suite.
      augmented: the text to generate from instead; None for the text itself.
      dimensions: those that its videos are measured for.
      image: file name of its first frame; "" for none.
      samples: number of videos to make.
      stem: start of its videos' names.
    """

    number: int
    text: str
    augmented: str | None
    dimensions: tuple[str, ...]
    image: str
    samples: int
    stem: str

    @property
    def clips(self) -> tuple[Clip, ...]:
        """Its videos."""
        return tuple(Clip(self, sample) for sample in range(self.samples))


@dataclass(frozen=True)
class Clip:
    """One video that a suite requires.

    Attributes:
      prompt: what it shows.
      sample: its index among the prompt's videos, from 0.
    """

    prompt: Prompt
    sample: int

    @property
    def seed(self) -> int:
        """The seed of its noise."""
        return SPREAD * self.prompt.number + self.sample

    @property
    def file(self) -> str:
        """Its file name."""
        return f"{self.prompt.stem}-{self.sample}.mp4"


def read_prompts(
    suite: Suite,
    checkout: Path,
    augmented: str | None = None,
    dimensions: Sequence[str] = (),
    samples: int | None = None,
) -> tuple[Prompt, ...]:
    """Reads a suite's prompts, in its order.

    Args:
      suite: the benchmark.
      checkout: the suite's repository.
      augmented: file with one augmented prompt per line, or "none"; by default the suite's own for Wan.
      dimensions: those to be measured; all by default.
      samples: videos per prompt; the suite's own number by default.

    Raises:
      UserError: a missing checkout, an unexpected file in it, an unknown dimension, a number of samples below 1, or a
        prompt that cannot be part of a file name.
    """
    if unknown := [name for name in dimensions if name not in suite.dimensions]:
        there = ", ".join(suite.dimensions)
        raise UserError(f"--dimensions: {suite.title} has no dimension {unknown[0]!r}; it has {there}")
    if samples is not None and not 1 <= samples <= MAX_SAMPLES:
        raise UserError(f"--samples={samples}: expected 1 to {MAX_SAMPLES} videos per prompt")
    entries = _entries(suite, checkout)
    texts = [str(entry["prompt_en"]) for entry in entries]
    if suite.order:
        listed = _lines(checkout / suite.order, checkout)
        if set(listed) != set(texts):
            differing = next(iter(set(listed) ^ set(texts)))
            raise UserError(
                f"{checkout / suite.order} and {checkout / suite.info} list different prompts, such as {differing!r}; "
                "take both from the same commit"
            )
    else:
        listed = texts
    written = _augmented(suite, checkout, augmented, len(listed))
    wanted = set(dimensions or suite.dimensions)
    known: dict[str, list[str]] = {}
    for entry in entries:
        names = known.setdefault(entry["prompt_en"], [])
        names += [name for name in entry["dimension"] if name not in names]
    images = {entry["prompt_en"]: entry.get("image_name", "") for entry in entries}
    found: dict[str, Prompt] = {}
    for number, text in enumerate(listed):
        asked = [name for name in known[text] if name in wanted]
        if text in found or not asked:
            continue
        found[text] = Prompt(
            number,
            text,
            None if written is None else written[number],
            tuple(known[text]),
            images[text],
            samples or max(suite.more.get(name, suite.samples) for name in asked),
            text[: suite.longest] if suite.longest else text,
        )
    for prompt in found.values():
        if "/" in prompt.stem or "\0" in prompt.stem:
            raise UserError(
                f"{suite.title} names clips after prompts, but {prompt.text!r} has a slash, which a file name cannot "
                f"have; take {suite.info} from {REPOSITORY}"
            )
    check_seed(SPREAD * len(listed), f"the seed after prompt {len(listed)}")
    return tuple(found.values())


def crop_of(height: int, width: int) -> str:
    """The folder of the images whose aspect ratio is closest to the video's.

    Raises:
      UserError: all would have to be stretched by more than `MAX_STRETCH`.
    """

    def stretch(ratio: float) -> float:
        return math.exp(abs(math.log(width / height / ratio)))

    name = min(RATIOS, key=lambda name: stretch(RATIOS[name]))
    if stretch(RATIOS[name]) > MAX_STRETCH:
        raise UserError(
            f"the model makes clips of {height}x{width} (height x width), but VBench-I2V's images are "
            f"{', '.join(RATIOS)} (width-height); give a --height and --width close to one of these ratios"
        )
    return name


def check_pictures(suite: Suite, checkout: Path, crop: str, prompts: Iterable[Prompt]) -> Path:
    """The folder of the first frames. Raises `UserError` if one is missing."""
    folder = checkout / suite.pictures / crop
    for prompt in prompts:
        if not prompt.image or not (folder / prompt.image).is_file():
            raise UserError(
                f"{folder / prompt.image}: no such image; run `sh vbench2_beta_i2v/download_data.sh` in {checkout}"
            )
    return folder


def sources(suite: Suite, checkout: Path, augmented: str | None) -> tuple[Path, ...]:
    """The files that `read_prompts` reads."""
    files = [checkout / name for name in (suite.info, suite.order) if name]
    file = _augmented_file(suite, checkout, augmented)
    return tuple(files if file is None else [*files, file])


def _entries(suite: Suite, checkout: Path) -> list[dict[str, Any]]:
    path = checkout / suite.info
    try:
        entries = json.loads(_text(path, checkout))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); take it from {REPOSITORY}") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: expected a list of prompts; take it from {REPOSITORY}")
    for number, entry in enumerate(entries):
        if not (
            isinstance(entry, dict)
            and isinstance(entry.get("prompt_en"), str)
            and isinstance(entry.get("dimension"), list)
            and isinstance(entry.get("image_name", ""), str)
        ):
            raise UserError(
                f"{path}: entry {number} has no valid 'prompt_en' and 'dimension'; take the file from {REPOSITORY}"
            )
    return entries


def _augmented_file(suite: Suite, checkout: Path, augmented: str | None) -> Path | None:
    if augmented == NONE:
        return None
    if augmented is not None:
        return local_path(augmented)
    return checkout / suite.augmented if suite.augmented else None


def _augmented(suite: Suite, checkout: Path, augmented: str | None, count: int) -> list[str] | None:
    """An augmented prompt for each of the suite's `count`; None if there are none."""
    path = _augmented_file(suite, checkout, augmented)
    if path is None:
        return None
    lines = _lines(path, checkout)
    if len(lines) != count:
        raise UserError(
            f"{path}: has {len(lines)} lines, expected {count}: line i is for prompt i of {suite.order or suite.info}; "
            "give another file with --augmented=FILE, or --augmented=none"
        )
    if "" in lines:
        raise UserError(f"{path}: line {lines.index('') + 1} is empty; write a prompt there")
    return lines


def _lines(path: Path, checkout: Path) -> list[str]:
    """A text file's lines, stripped, without trailing empty ones."""
    return [line.strip() for line in _text(path, checkout).rstrip().split("\n")]


def _text(path: Path, checkout: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        remedy = f"--checkout={checkout} must be a clone of {REPOSITORY}"
        raise UserError(
            f"{path}: no such file; {remedy if path.is_relative_to(checkout) else 'give another'}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; take it from {REPOSITORY}") from error
