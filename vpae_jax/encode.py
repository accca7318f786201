"""Turns videos with captions, or captions alone, into latent records: what a distillation trains on.

    python -m vpae_jax.encode --videos=DIR [--manifest=FILE --columns=...] --model=DIR --output=DIR
    python -m vpae_jax.encode --captions=FILE --model=DIR [--teacher=DIR] --output=DIR [--steps=50] [--guidance=5]
    python -m vpae_jax.encode --prompts=FILE [--images=DIR] --model=DIR --output=DIR

The first encodes real videos: those of a folder, with captions beside them in .txt or .json files, or those that a
manifest lists. The second has a teacher make a clip for each caption. The third encodes prompts alone, with a first
frame each for image-to-video, for methods that train without real clips. All leave a folder of records, for
`config.data.records`, with a page `summary.html` of what is in it and what was refused. The same command goes on
where it was stopped. Several processes share the work when each is told its place (--process_id and --num_processes, or
SLURM's or JAX's variables) and all see the folder.
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
    "min_seconds": "seconds that a video lasts at least",
    "min_side": "pixels of its shorter side, at least",
    "max_crop": "share of the picture that cropping to a bucket may cost",
    "min_motion": "mean difference of successive frames, 0 to 255, below which a clip is static",
    "max_black": "share of a clip's frames that may be black",
    "min_caption": "characters of a caption, at least",
    "max_caption": "characters of a caption, at most",
}
# What records are made of, and the flags that say nothing of the others. Their defaults are None: it shows which were
# given.
OF_VIDEOS = ("manifest", "fps", "clips_per_video", "stride", "workers", "timeout")
OF_VIDEOS += ("min_seconds", "min_side", "max_crop", "min_motion", "max_black")
OF_CAPTIONS = ("teacher", "steps", "guidance", "solver", "shift", "seed")
SOURCES = {"videos": OF_VIDEOS, "captions": OF_CAPTIONS, "prompts": ("images",)}
UNIT_OF_VIDEOS, UNIT_OF_CAPTIONS, UNIT_OF_PROMPTS = 64, 4, 64
TIMEOUT = 120.0


def parser() -> cli.Parser:
    """The command line."""
    result = cli.Parser("python -m vpae_jax.encode", __doc__)
    add = result.add_argument
    add(
        "--model",
        default="tiny",
        help="whose VAE and encoders: a folder in any layout, 'tiny', or OWNER/NAME of the hub",
    )
    add("--output", type=Path, required=True, help="folder of the records")
    add("--videos", type=Path, help="folder of the videos")
    add("--manifest", type=Path, help="table of them: .csv, .tsv, .jsonl or .parquet; by default all below --videos")
    add("--columns", help="USE=COLUMN,... for path, caption, id, start, end, cuts, image; or openvid, koala, intern4k")
    add("--buckets", help="480p, 720p or HEIGHTxWIDTH,...; by default the model's own size")
    add("--num_frames", type=int, help="frames of a clip, 1 + a multiple of 4; the model's own by default")
    add("--fps", type=float, help="frames a second of a clip; the model's own by default")
    add("--clips_per_video", type=int, help="clips of one video at most; 1 by default")
    add("--stride", type=float, help="seconds between the beginnings of a shot's clips; by default they do not overlap")
    add("--batch", type=int, default=1, help="clips that a device encodes at once; 1 by default")
    add(
        "--unit",
        type=int,
        help="videos, captions or prompts that are written together, and lost together by a kill; "
        f"{UNIT_OF_VIDEOS} videos, {UNIT_OF_CAPTIONS} captions or {UNIT_OF_PROMPTS} prompts by default",
    )
    add("--workers", type=int, help="processes that decode; the processors by default")
    add("--timeout", type=float, help=f"seconds after which decoding a clip is given up; {TIMEOUT:g} by default")
    add("--dtype", choices=cli.DTYPES, default="bfloat16", help="of the text and image encoder; the VAE is float32")
    add(
        "--captions", type=Path, help="file of captions for the teacher: .txt with one a line, or a table as --manifest"
    )
    add("--prompts", type=Path, help="file of prompts for clips that a student will make: as --captions")
    add("--images", type=Path, help="folder of the first frames of --prompts: a column image, or files called by id")
    add("--teacher", help="model that makes the clips of --captions; --model by default")
    add("--steps", type=int, help="its network evaluations, twice as many with guidance; as its author samples it")
    add("--guidance", type=float, help="w of v_u + w (v_c - v_u); as its author samples it")
    add("--solver", choices=("euler", "unipc"), help="how the steps are taken; as its author samples it")
    add("--shift", type=float, help="of the time grid; as its author samples it")
    add("--seed", type=int, help="of the first caption's noise, each has the next one; 0 by default")
    add("--process_id", type=int, help="which of several processes this is, from 0")
    add("--num_processes", type=int, help="how many share the work")
    defaults = {field.name: field.default for field in dataclasses.fields(Filters)}
    for name, text in FILTERS.items():
        add(f"--{name}", type=type(defaults[name]), help=f"{text}; {defaults[name]} by default")
    return result


def main(argv: list[str]) -> None:
    given = parser().parse_args(argv)
    own, *more = [source for source in SOURCES if getattr(given, source) is not None] or [""]
    if not own or more:
        raise UserError(
            "give either --videos, to encode these, or --captions, for a teacher to make clips for, or --prompts, to "
            "encode these alone"
        )
    for other, flags in SOURCES.items():
        for name in flags if other != own else ():
            if getattr(given, name) is not None:
                raise UserError(f"--{name} belongs to --{other}; leave it out with --{own}")
    if given.batch < 1:
        raise UserError(f"--batch is {given.batch}; expected 1 or more")
    check_seed(given.seed or 0, "--seed")
    share = distributed.share(given.process_id, given.num_processes, os.environ)
    # What is listed is looked at before a model is loaded, which may take minutes.
    if own == "videos":
        done = from_videos(given, manifest(given), *share)
    elif own == "captions":
        done = from_captions(given, captions(given), *share)
    else:
        done = from_prompts(given, prompts_of(given), *share)
    if not done:
        print(f"this process has done its share; {given.output} is complete when the others have")
        return
    say_what_there_is(given.output)


def say_what_there_is(folder: Path) -> None:
    """Says what there is in complete records, and that their summary shows it.

    Raises:
      UserError: no clip. Nothing can be trained on that, so what would come next must not begin.
    """
    index = read_index(folder)
    lines = report(folder, index)
    if not index["count"]:
        raise UserError(
            f"{folder}: none of what was given makes a clip; rejected: {rejected(index)}, the first being "
            f"{first_reject(folder)}; {folder / PAGE} has them all"
        )
    print("\n".join(lines))


def from_videos(given: argparse.Namespace, listed: Manifest, process: int, processes: int) -> bool:
    """Encodes videos; whether all units are done."""
    pipeline = load_pipeline(given.model, jnp.dtype(given.dtype), with_transformer=False)
    with clips(given, listed, pipeline) as source:
        units = Units(given.output, describe(source, pipeline), source.units)
        return was_complete(units) or encode(source, pipeline, units, given.batch, process, processes)


def from_captions(given: argparse.Namespace, listed: Captions, process: int, processes: int) -> bool:
    """Has a teacher make clips; whether all units are done."""
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
    if len(sizes) != 1:
        raise UserError(f"--buckets={given.buckets} names {len(sizes)} sizes; with --captions give one, as 480x832")
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
    """Encodes prompts and first frames; whether all units are done."""
    pipeline = load_pipeline(given.model, jnp.dtype(given.dtype), with_transformer=False)
    if given.images is not None and not pipeline.takes_image:
        raise UserError(f"--images={given.images}: {given.model} is a text-to-video model; leave it out")
    own = pipeline.defaults
    frames = own.num_frames if given.num_frames is None else given.num_frames
    sizes = prompts.Sizes(frames, buckets.parse(given.buckets or f"{own.height}x{own.width}", max(pipeline.units)))
    if given.images is None and len(sizes.buckets) != 1:
        raise UserError(
            f"--buckets={given.buckets} names {len(sizes.buckets)} sizes, among which first frames choose; without "
            "--images give one, as 480x832"
        )
    units = Units(given.output, prompts.describe(listed, pipeline, sizes), listed.units)
    if was_complete(units):
        return True
    if given.images is None and pipeline.takes_image:
        print(f"no --images: the prompts are for text-to-video, where {given.model} is given no first frame")
    return prompts.encode_prompts(listed, pipeline, sizes, units, given.batch, process, processes)


def was_complete(units: Units) -> bool:
    """Whether nothing is left to do, which is said."""
    if complete := units.complete():
        print(f"{units.folder} was complete; nothing is left to do")
    return complete


def manifest(given: argparse.Namespace) -> Manifest:
    """The videos that the flags ask for. Raises `UserError` for flags that make no sense, or no such videos."""
    if given.columns is not None and given.manifest is None:
        raise UserError("--columns says how to read a manifest; give --manifest=FILE, or leave it out")
    columns = None if given.columns is None else parse_columns(given.columns)
    if columns is not None and columns.image is not None:
        raise UserError("--columns: image= belongs to --prompts; leave it out with --videos")
    return Manifest(given.videos, given.manifest, columns, UNIT_OF_VIDEOS if given.unit is None else given.unit)


def captions(given: argparse.Namespace) -> Captions:
    """The captions that the flags ask for. Raises `UserError` for flags that make no sense, or no such captions."""
    columns = Columns() if given.columns is None else parse_columns(given.columns)
    if columns.image is not None:
        raise UserError("--columns: image= belongs to --prompts; leave it out with --captions")
    unit = UNIT_OF_CAPTIONS if given.unit is None else given.unit
    return Captions(given.captions, columns.caption, columns.id, unit, filters(given))


def prompts_of(given: argparse.Namespace) -> Captions:
    """The prompts that the flags ask for. Raises `UserError` for flags that make no sense, or no such prompts."""
    columns = Columns() if given.columns is None else parse_columns(given.columns)
    if columns.image is not None and given.images is None:
        raise UserError("--columns: image= names files in a folder; give it with --images=FOLDER, or leave image= out")
    unit = UNIT_OF_PROMPTS if given.unit is None else given.unit
    pictures = None if given.images is None else Pictures(given.images, columns.image)
    return Captions(given.prompts, columns.caption, columns.id, unit, filters(given), "--prompts", pictures)


def filters(given: argparse.Namespace) -> Filters:
    """What is not used. Raises `UserError` for bounds that make no sense."""
    bounds = {name: getattr(given, name) for name in FILTERS}
    return Filters(**{name: bound for name, bound in bounds.items() if bound is not None})


def clips(given: argparse.Namespace, listed: Manifest, pipeline: Pipeline) -> VideoClips:
    """The clips of videos, in sizes that the model can make. Raises `UserError` for a flag that makes no sense."""
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
