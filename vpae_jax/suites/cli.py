"""Public benchmarks: generates the clips that a suite scores, and aggregates the suite's scores.

    python -m vpae_jax.evaluate --suite=vbench|vbench_i2v|vbench2 --checkout=DIR --model=MODEL --output=DIR
    python -m vpae_jax.evaluate --suite=... --suite-results=NAME=FILE_OR_DIR [--suite-results=...] --output=DIR

The first reads the suite's prompts from the user's own checkout of it (github.com/Vchitect/VBench), makes each clip
from its augmented prompt, names it after the original one, and prints the commands that score the clips in the suite's
own environment. A repeated command resumes where it stopped. Several processes share the work if each is told its index
(--process_id and --num_processes, or SLURM's or JAX's variables) and all see the folder. Writes

    manifest.json   prompt, augmented prompt, seed and image of each clip; the model's fingerprint and its sampler
    videos/         the clips

The second prints the aggregate scores by the suite's own formula, and writes scores.json. docs/evaluation.md has the
rules.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from os import environ
from pathlib import Path

from vpae_jax import cli
from vpae_jax.flow.sampler import parse_steps
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.media import CRF
from vpae_jax.runtime import distributed
from vpae_jax.runtime.progress import working
from vpae_jax.suites import export, scores
from vpae_jax.suites.commands import commands
from vpae_jax.suites.manifest import VIDEOS, checkout_of, entry_of, made_with, merged, write_manifest
from vpae_jax.suites.prompts import NONE, SUITES, check_pictures, crop_of, read_prompts, sources
from vpae_jax.types import UserError
from vpae_jax.weights.find import find_model
from vpae_jax.weights.parts import makes_from_image
from vpae_jax.weights.settings import read_defaults, read_scheduler

FLAGS = ("--suite", "--suite-results")
# Options for making clips, which do not apply to scores.
OF_EXPORTS = ("checkout", "model", "steps", "guidance", "samples", "dimensions", "augmented")
OF_EXPORTS += ("num_frames", "height", "width", "dtype", "process_id", "num_processes")


def asked(argv: list[str]) -> bool:
    """Whether a command line asks for a suite."""
    return any(word.partition("=")[0] in FLAGS for word in argv)


def parser() -> cli.Parser:
    """The command line."""
    result = cli.Parser("python -m vpae_jax.evaluate", __doc__)
    add = result.add_argument
    add("--suite", choices=tuple(SUITES), required=True, help="which benchmark")
    add("--output", type=Path, required=True, help="folder to write into")
    add("--checkout", type=Path, help="clone of the suite's repository")
    add("--model", help="model: folder or file in any layout, 'tiny', or OWNER/NAME of the Hugging Face hub")
    add(
        "--steps",
        type=partial(parse_steps, name="--steps"),
        metavar="N|N,M",
        help="sampling steps, each with one network evaluation, two with guidance; the model's own by default",
    )
    add("--guidance", type=float, help="w of v_u + w (v_c - v_u), 1 for none; the model's own by default")
    add("--samples", type=int, help="videos per prompt; the suite's own number by default")
    add("--dimensions", help="NAME,NAME: make only the clips of these dimensions; all by default")
    add("--augmented", help=f"file of augmented prompts, one per line, or {NONE!r}; by default the suite's for Wan")
    add("--num_frames", type=int, help="frames of a video; the model's own by default")
    add("--height", type=int, help="pixels; the model's own by default")
    add("--width", type=int, help="pixels; the model's own by default")
    add("--dtype", choices=cli.DTYPES, help=cli.DTYPE_HELP)
    add("--process_id", type=int, help="index of this process, from 0")
    add("--num_processes", type=int, help="number of processes that share the work")
    add(
        "--suite-results",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a row: its name, and a result file of the suite or a folder of them; repeatable",
    )
    return result


def main(argv: list[str]) -> None:
    given = parser().parse_args(argv)
    if given.output.exists() and not given.output.is_dir():
        raise UserError(f"--output={given.output} is a file; name a folder")
    if given.suite_results:
        for name in OF_EXPORTS:
            if getattr(given, name) is not None:
                raise UserError(f"--{name} is for making clips; leave it out with --suite-results")
        add_up(given)
        return
    for name in ("checkout", "model"):
        if getattr(given, name) is None:
            raise UserError(
                f"--{name} is missing: give --checkout and --model to make a suite's clips, or --suite-results to "
                "aggregate its scores"
            )
    make_clips(given)


def make_clips(given: argparse.Namespace) -> None:
    """Generates this process's share of the clips. Raises `UserError` for options that the model or the suite does not
    support."""
    suite, output = SUITES[given.suite], given.output
    dimensions = [] if given.dimensions is None else [name.strip() for name in given.dimensions.split(",")]
    prompts = read_prompts(suite, given.checkout, given.augmented, dimensions, given.samples)
    process, processes = distributed.share(given.process_id, given.num_processes, environ)
    model = find_model(given.model)
    image = makes_from_image({name: part.config for name, part in model.parts.items()})
    sizes = {name: getattr(given, name) for name in ("num_frames", "height", "width")}
    own = replace(
        read_defaults(model.folder, image), **{name: size for name, size in sizes.items() if size is not None}
    )
    crop, pictures = "", None
    if suite.pictures:
        if not image and read_scheduler(model.folder, image).chunks is None:
            raise UserError(
                f"--model={given.model} is a text-to-video model, but {suite.title} gives first frames; give an "
                "image-to-video model"
            )
        crop = crop_of(own.height, own.width)
        pictures = check_pictures(suite, given.checkout, crop, prompts)
    clips = [clip for prompt in prompts for clip in prompt.clips]
    with working(f"reading {given.model}"):
        pipeline = load_pipeline(model, given.dtype)
    sampler = pipeline.sampler(given.steps, given.guidance)
    pipeline.latent_shape(1, own.num_frames, own.height, own.width)
    crf = CRF if suite.crf is None else suite.crf
    # A causal model that continues an image has another default length.
    frames = None if pictures and not image and given.num_frames is None else own.num_frames
    clip = {"num_frames": frames, "height": own.height, "width": own.width, "fps": own.fps, "crf": crf}
    shared = {
        "suite": suite.name,
        "checkout": checkout_of(given.checkout, sources(suite, given.checkout, given.augmented)),
        "model": given.model,
        **made_with(pipeline, sampler, clip),
    }
    manifest = merged(output, shared, [entry_of(clip, crop) for clip in clips])
    export.prepare(output, clips)
    write_manifest(output, manifest)
    recipe = export.Recipe(given.steps, given.guidance, frames, own.height, own.width, pictures, crf)
    export.make(pipeline, recipe, output, clips[process::processes])
    if left := len(export.missing(output, clips)):
        print(f"this process has done its share; {left} of {len(clips)} clips remain for other processes")
        return
    print(f"{output / VIDEOS}: all {len(clips)} clips are complete; in {suite.title}'s own environment run\n")
    print(commands(suite, given.checkout, output, dimensions, crop))


def add_up(given: argparse.Namespace) -> None:
    """Prints and writes a suite's aggregate scores. Raises `UserError` for anything that is not a result of it."""
    formula, rows = scores.FORMULAS[given.suite], {}
    for text in given.suite_results:
        name, _, path = text.partition("=")
        if not name or not path:
            raise UserError(f"--suite-results={text!r}: expected NAME=FILE or NAME=FOLDER")
        if name in rows:
            raise UserError(f"two rows are named {name!r}; give each its own name")
        rows[name] = scores.add_up(scores.read_results(cli.local_path(path), formula), formula)
    path = given.output / scores.SCORES
    scores.write_scores(path, given.suite, rows, formula)
    print(f"{scores.table(rows, formula)}\n")
    for name, row in rows.items():
        if row.missing:
            named = ", ".join(row.missing)
            print(f"{name}: no result for {named}: each counts as a score of 0, as in the suite's own scripts")
    if formula.plain:
        print(f"{scores.PLAIN}: of the i2v score and the six quality scores, as in the V-PAE paper; not from the suite")
    print(path)
