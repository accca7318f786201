"""Encodes captioned videos, or captions alone, into latent records, which are what a distillation trains on.

    python -m vpae_jax.encode --videos=DIR [--manifest=FILE --columns=...] --model=DIR --output=DIR
    python -m vpae_jax.encode --captions=FILE --model=DIR [--teacher=DIR] --output=DIR [--steps=50] [--guidance=5]
    python -m vpae_jax.encode --prompts=FILE [--images=DIR] --model=DIR --output=DIR

The first form encodes real videos: all videos of a folder, with captions next to them in .txt or .json files, or those
listed in a manifest. The second has a teacher generate a clip for each caption. The third encodes prompts alone (for
image-to-video each with a first frame), for methods that train without real clips. Each form writes a folder of records
for `config.data.records`, with a page `summary.html` that shows what is in it and what was rejected.

The same command resumes where it was interrupted. Several processes share the work if each is told its index
(--process_id and --num_processes, or SLURM's or JAX's variables) and all see the folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from vpae_jax import cli, sharding
from vpae_jax.config import MeshConfig
from vpae_jax.data.index import read_index
from vpae_jax.encoding import buckets, prompts, synthetic
from vpae_jax.encoding.captions import Captions
from vpae_jax.encoding.datasets import parse_columns
from vpae_jax.encoding.encoder import describe, encode, too_long
from vpae_jax.encoding.filters import Filters
from vpae_jax.encoding.manifest import Columns, Manifest
from vpae_jax.encoding.pictures import Pictures
from vpae_jax.encoding.summary import PAGE, first_reject, rejected, report
from vpae_jax.encoding.synthetic import Recipe
from vpae_jax.encoding.units import Units
from vpae_jax.encoding.videos import VideoClips
from vpae_jax.flow.draws import check_seed
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.runtime import distributed
from vpae_jax.types import UserError

FILTERS = {
    "min_seconds": "minimum duration of a video in seconds",
    "min_side": "minimum length of its shorter side in pixels",
    "max_crop": "maximum fraction of the image that cropping to a bucket may remove",
    "min_motion": "mean difference of successive frames (0 to 255) below which a clip is rejected as static",
    "max_black": "maximum fraction of black frames in a clip",
    "min_caption": "minimum number of characters in a caption",
    "max_caption": "maximum number of characters in a caption",
}
# The sources of records, and the flags that apply to only one of them. Their default is None, to see which were given.
OF_VIDEOS = ("manifest", "fps", "clips_per_video", "stride", "workers", "timeout")
OF_VIDEOS += ("min_seconds", "min_side", "max_crop", "min_motion", "max_black")
OF_CAPTIONS = ("teacher", "steps", "guidance", "solver", "shift", "seed")
SOURCES = {"videos": OF_VIDEOS, "captions": OF_CAPTIONS, "prompts": ("images",)}
UNIT_OF_VIDEOS, UNIT_OF_CAPTIONS, UNIT_OF_PROMPTS = 64, 4, 64
TIMEOUT = 120.0


def parser() -> cli.Parser:
    """Returns the parser of the command line."""
    result = cli.Parser("python -m vpae_jax.encode", __doc__)
    add = result.add_argument
    add(
        "--model",
        default="tiny",
        help="model whose VAE and encoders are used: a folder in any layout, 'tiny', or OWNER/NAME on the hub",
    )
    add("--output", type=Path, required=True, help="folder for the records")
    add("--videos", type=Path, help="folder with the videos")
    add(
        "--manifest", type=Path, help="table of videos: .csv, .tsv, .jsonl or .parquet; default: all videos in --videos"
    )
    add("--columns", help="USE=COLUMN,... for path, caption, id, start, end, cuts, image; or openvid, koala, intern4k")
    add("--buckets", help="clip sizes: 480p, 720p or HEIGHTxWIDTH,...; default: the model's own size")
    add("--num_frames", type=int, help="frames per clip, 1 + a multiple of 4; default: the model's own")
    add("--fps", type=float, help="frames per second of a clip; default: the model's own")
    add("--clips_per_video", type=int, help="maximum number of clips per video; default: 1")
    add("--stride", type=float, help="seconds between the starts of a shot's clips; by default clips do not overlap")
    add("--batch", type=int, default=1, help="clips that a device encodes at once; default: 1")
    add(
        "--unit",
        type=int,
        help="videos, captions or prompts per work unit, which is written as a whole and redone if interrupted; "
        f"default: {UNIT_OF_VIDEOS} videos, {UNIT_OF_CAPTIONS} captions or {UNIT_OF_PROMPTS} prompts",
    )
    add("--workers", type=int, help="processes that decode videos; default: the number of CPUs")
    add("--timeout", type=float, help=f"seconds after which decoding a clip is abandoned; default: {TIMEOUT:g}")
    add("--dtype", choices=cli.DTYPES, default="bfloat16", help="of the text and image encoder; the VAE is float32")
    add("--captions", type=Path, help="captions for the teacher: .txt with one per line, or a table as for --manifest")
    add("--prompts", type=Path, help="prompts for clips that a student will generate: a file as for --captions")
    add("--images", type=Path, help="folder with the first frames of --prompts, named in a column image or by id")
    add("--teacher", help="model that generates the clips of --captions; default: --model")
    add("--steps", type=int, help="sampling steps of the teacher; default: as its author recommends")
    add("--guidance", type=float, help="w of v_u + w (v_c - v_u); default: as the teacher's author recommends")
    add("--solver", choices=("euler", "unipc"), help="ODE solver; default: as the teacher's author recommends")
    add("--shift", type=float, help="shift of the time grid; default: as the teacher's author recommends")
    add("--seed", type=int, help="seed of the first caption's noise; each further caption adds 1; default: 0")
    add("--process_id", type=int, help="index of this process among several, from 0")
    add("--num_processes", type=int, help="number of processes that share the work")
    defaults = {field.name: field.default for field in dataclasses.fields(Filters)}
    for name, text in FILTERS.items():
        add(f"--{name}", type=type(defaults[name]), help=f"{text}; default: {defaults[name]}")
    return result


def check(given: argparse.Namespace) -> str:
    """Returns the name of the source of records, one of SOURCES.

    Raises:
      UserError: none or several sources, a flag of another source, or a value that none accepts.
    """
    own, *more = [source for source in SOURCES if getattr(given, source) is not None] or [""]
    if not own or more:
        raise UserError(
            "give exactly one of --videos (real videos), --captions (for a teacher to generate clips for) and "
            "--prompts (prompts alone)"
        )
    for other, flags in SOURCES.items():
        for name in flags if other != own else ():
            if getattr(given, name) is not None:
                raise UserError(f"--{name} belongs to --{other}; leave it out with --{own}")
    if given.batch < 1:
        raise UserError(f"--batch is {given.batch}; expected 1 or more")
    check_seed(given.seed or 0, "--seed")
    if own == "captions" and given.buckets and len(sizes := buckets.parse(given.buckets, 1)) != 1:
        raise UserError(f"--buckets={given.buckets} names {len(sizes)} sizes; with --captions give one, as 480x832")
    return own


def main(argv: list[str]) -> None:
    given = parser().parse_args(argv)
    own = check(given)
    share = distributed.share(given.process_id, given.num_processes, os.environ)
    # The input is checked before a model is loaded, which may take minutes.
    if own == "videos":
        done = from_videos(given, manifest(given), *share)
    elif own == "captions":
        done = from_captions(given, captions(given), *share)
    else:
        done = from_prompts(given, prompts_of(given), *share)
    if not done:
        print(f"this process has done its share; {given.output} will be complete when the others have done theirs")
        return
    say_what_there_is(given.output)


def say_what_there_is(folder: Path) -> None:
    """Prints what a complete folder of records contains, and where its summary is.

    Raises:
      UserError: there are no clips. Nothing can be trained on them, so a following command must not start.
    """
    index = read_index(folder)
    lines = report(folder, index)
    if not index["count"]:
        raise UserError(
            f"{folder}: the input gives no clips; rejected: {rejected(index)}, the first being "
            f"{first_reject(folder)}; {folder / PAGE} lists them all"
        )
    print("\n".join(lines))


def from_videos(given: argparse.Namespace, listed: Manifest, process: int, processes: int) -> bool:
    """Encodes videos. Returns whether all units are done."""
    pipeline = load_pipeline(given.model, jnp.dtype(given.dtype), with_transformer=False)
    with clips(given, listed, pipeline) as source:
        units = Units(given.output, describe(source, pipeline), source.units)
        return was_complete(units) or encode(source, pipeline, units, given.batch, process, processes)


def from_captions(given: argparse.Namespace, listed: Captions, process: int, processes: int) -> bool:
    """Has a teacher generate clips. Returns whether all units are done."""
    mesh = (
        sharding.make_mesh(MeshConfig(fsdp=1, context=-1), jax.local_devices())
        if jax.local_device_count() > 1
        else None
    )
    teacher = pipeline = load_pipeline(given.teacher or given.model, jnp.dtype(given.dtype), mesh)
    if given.teacher not in (None, given.model):
        pipeline = load_pipeline(given.model, jnp.dtype(given.dtype), with_transformer=False)
    advised, own = teacher.scheduler, pipeline.defaults
    even = None if advised.times else advised.shift
    sizes = buckets.parse(given.buckets, max(pipeline.units)) if given.buckets else ((own.height, own.width),)
    recipe = Recipe(
        steps=advised.steps if given.steps is None else given.steps,
        guidance=advised.guidance if given.guidance is None else given.guidance,
        solver=given.solver or advised.solver,
        shift=even if given.shift is None else given.shift,
        seed=given.seed or 0,
        num_frames=own.num_frames if given.num_frames is None else given.num_frames,
        height=sizes[0][0],
        width=sizes[0][1],
    )
    units = Units(given.output, synthetic.describe(listed, pipeline, teacher, recipe), listed.units)
    return was_complete(units) or synthetic.synthesise(
        listed, pipeline, teacher, recipe, units, given.batch, mesh, process, processes
    )


def from_prompts(given: argparse.Namespace, listed: Captions, process: int, processes: int) -> bool:
    """Encodes prompts and first frames. Returns whether all units are done."""
    pipeline = load_pipeline(given.model, jnp.dtype(given.dtype), with_transformer=False)
    if given.images is not None and not pipeline.takes_image:
        raise UserError(f"--images={given.images}: {given.model} is a text-to-video model; leave it out")
    own = pipeline.defaults
    frames = own.num_frames if given.num_frames is None else given.num_frames
    sizes = prompts.Sizes(frames, buckets.parse(given.buckets or f"{own.height}x{own.width}", max(pipeline.units)))
    if given.images is None and len(sizes.buckets) != 1:
        raise UserError(
            f"--buckets={given.buckets} names {len(sizes.buckets)} sizes, but only first frames can choose among them; "
            "without --images give one, as 480x832"
        )
    units = Units(given.output, prompts.describe(listed, pipeline, sizes), listed.units)
    if was_complete(units):
        return True
    if given.images is None and pipeline.takes_image:
        print(f"no --images: the prompts are encoded for text-to-video, without a first frame for {given.model}")
    return prompts.encode_prompts(listed, pipeline, sizes, units, given.batch, process, processes)


def was_complete(units: Units) -> bool:
    """Returns whether nothing is left to do; prints a line if so."""
    if complete := units.complete():
        print(f"{units.folder} is already complete; nothing to do")
    return complete


def manifest(given: argparse.Namespace) -> Manifest:
    """Returns the videos that the flags select. Raises `UserError` for invalid flags, or if there are none."""
    if given.columns is not None and given.manifest is None:
        raise UserError("--columns describes a manifest; give --manifest=FILE, or leave it out")
    columns = None if given.columns is None else parse_columns(given.columns)
    if columns is not None and columns.image is not None:
        raise UserError("--columns: image= belongs to --prompts; leave it out with --videos")
    return Manifest(given.videos, given.manifest, columns, UNIT_OF_VIDEOS if given.unit is None else given.unit)


def captions(given: argparse.Namespace) -> Captions:
    """Returns the captions that the flags select. Raises `UserError` for invalid flags, or if there are none."""
    columns = Columns() if given.columns is None else parse_columns(given.columns)
    if columns.image is not None:
        raise UserError("--columns: image= belongs to --prompts; leave it out with --captions")
    unit = UNIT_OF_CAPTIONS if given.unit is None else given.unit
    return Captions(given.captions, columns.caption, columns.id, unit, filters(given))


def prompts_of(given: argparse.Namespace) -> Captions:
    """Returns the prompts that the flags select. Raises `UserError` for invalid flags, or if there are none."""
    columns = Columns() if given.columns is None else parse_columns(given.columns)
    if columns.image is not None and given.images is None:
        raise UserError("--columns: image= names files in a folder; give it with --images=FOLDER, or leave image= out")
    unit = UNIT_OF_PROMPTS if given.unit is None else given.unit
    pictures = None if given.images is None else Pictures(given.images, columns.image)
    return Captions(given.prompts, columns.caption, columns.id, unit, filters(given), "--prompts", pictures)


def filters(given: argparse.Namespace) -> Filters:
    """Returns the filters that the flags set. Raises `UserError` for invalid bounds."""
    bounds = {name: getattr(given, name) for name in FILTERS}
    return Filters(**{name: bound for name, bound in bounds.items() if bound is not None})


def clips(given: argparse.Namespace, listed: Manifest, pipeline: Pipeline) -> VideoClips:
    """Returns the clips of the videos, in sizes that the model can generate. Raises `UserError` for an invalid flag."""
    own = pipeline.defaults
    return VideoClips(
        listed,
        buckets=buckets.parse(given.buckets or f"{own.height}x{own.width}", max(pipeline.units)),
        frames=own.num_frames if given.num_frames is None else given.num_frames,
        fps=own.fps if given.fps is None else given.fps,
        filters=filters(given),
        stride=given.stride,
        clips_per_video=1 if given.clips_per_video is None else given.clips_per_video,
        workers=os.cpu_count() or 1 if given.workers is None else given.workers,
        timeout=TIMEOUT if given.timeout is None else given.timeout,
        unfit=partial(too_long, pipeline),
    )


if __name__ == "__main__":
    cli.run(main)
