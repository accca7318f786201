"""Generates the clips that a suite requires, under the names that it expects.

    OUTPUT/manifest.json    what each clip was made from (`suites.manifest`)
    OUTPUT/videos/          the clips, and nothing else: VBench assumes that all files have the first one's suffix
    OUTPUT/unfinished/      clips in progress; removed at the end

A clip is complete or absent, and existing clips are reused. Clips are distributed over processes by index. A process
locks the clip that it is making, so that no clip is made twice if a process is started twice by mistake; on file
systems without locks each would make its own, with the same seed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from vpae_jax.files import claimed, refused_writes, remove_leftovers
from vpae_jax.flow.sampler import Steps
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.media import CRF, read_image, write_video
from vpae_jax.runtime.progress import Pace, working
from vpae_jax.suites.manifest import VIDEOS
from vpae_jax.suites.prompts import Clip
from vpae_jax.types import UserError

UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Recipe:
    """How clips are made.

    Attributes:
      steps, guidance: None for the model's own.
      num_frames: None for the model's own.
      height, width: of a video, in pixels.
      pictures: folder of the first frames; None for text-to-video.
      crf: H.264's constant rate factor.
    """

    steps: Steps | None
    guidance: float | None
    num_frames: int | None
    height: int
    width: int
    pictures: Path | None = None
    crf: int = CRF


def prepare(output: Path, clips: Sequence[Clip]) -> None:
    """Creates an export's folders, and checks that each clip can have its name there.

    Raises:
      UserError: the file system does not allow a name, or does not tell two apart.
    """
    videos, unfinished = output / VIDEOS, output / UNFINISHED
    with refused_writes(output):
        for folder in (videos, unfinished):
            folder.mkdir(parents=True, exist_ok=True)
    remedy = "the suite finds clips by these names; choose an --output on a file system that supports them"
    for clip in clips:
        try:
            os.stat(videos / clip.file)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{videos}: cannot hold a file named {clip.file!r} ({reason}); {remedy}") from error
    if (output / UNFINISHED.upper()).exists():  # the file system ignores case
        seen: dict[str, str] = {}
        for clip in clips:
            if (other := seen.setdefault(clip.file.casefold(), clip.file)) != clip.file:
                raise UserError(f"{videos}: {other!r} and {clip.file!r} are the same file there; {remedy}")


def missing(output: Path, clips: Sequence[Clip]) -> list[Clip]:
    """The clips that do not exist yet."""
    return [clip for clip in clips if not (output / VIDEOS / clip.file).exists()]


def make(pipeline: Pipeline, recipe: Recipe, output: Path, clips: Sequence[Clip]) -> None:
    """Generates those of a process's clips that are missing, except any that another process is making.

    Raises:
      UserError: a prompt or image that the model cannot use, or a clip that cannot be written. Earlier clips remain.
    """
    left = missing(output, clips)
    # Checks all prompts first, before hours are spent, since one may be too long.
    for text in {clip.prompt.augmented or clip.prompt.text for clip in left}:
        pipeline.tokenize([text])
    remove_leftovers(output / UNFINISHED)
    pace = Pace(len(left))
    for number, clip in enumerate(left):
        path, (part, lock) = output / VIDEOS / clip.file, _working(output, clip)
        with claimed(lock) as ours:
            if ours and not path.exists():
                with nullcontext() if number else working("compiling, and making the first clip"):
                    _make(pipeline, recipe, clip, part)
                with refused_writes(path):
                    part.replace(path)
        pace.advance()
    for clip in clips:
        if (output / VIDEOS / clip.file).exists():  # remains of killed processes
            for file in _working(output, clip):
                file.unlink(missing_ok=True)
    with suppress(OSError):  # another process is still working there
        (output / UNFINISHED).rmdir()


def _working(output: Path, clip: Clip) -> tuple[Path, Path]:
    """The file of an unfinished clip, and its lock."""
    part = output / UNFINISHED / f"{clip.prompt.number:05d}-{clip.sample:03d}.mp4"
    return part, part.with_suffix(".lock")


def _make(pipeline: Pipeline, recipe: Recipe, clip: Clip, part: Path) -> None:
    prompt = clip.prompt
    image = None if recipe.pictures is None else read_image(recipe.pictures / prompt.image)
    try:
        frames = pipeline(
            prompt.augmented or prompt.text,
            image=image,
            steps=recipe.steps,
            guidance=recipe.guidance,
            seed=clip.seed,
            num_frames=recipe.num_frames,
            height=recipe.height,
            width=recipe.width,
        )
    except UserError as error:
        raise UserError(f"{clip.file}: {error}") from error
    write_video(part, frames, pipeline.defaults.fps, recipe.crf)
