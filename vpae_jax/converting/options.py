"""The options of `convert`, and which of them go together."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import get_args

from vpae_jax import cli
from vpae_jax.converting.pushing import written_by
from vpae_jax.types import UserError
from vpae_jax.weights.find import is_workdir
from vpae_jax.weights.merging import parse_lora
from vpae_jax.weights.names import Layout
from vpae_jax.weights.self_forcing import SUFFIX
from vpae_jax.weights.writing import Format

WEIGHTS = ("generator", "ema")


def of_the_generator(weights: str | None) -> bool:
    """Whether --weights names the generator, its average, or one of its further averages, "ema_DECAY"."""
    return weights is None or weights in WEIGHTS or weights.startswith("ema_")


SELF_FORCING = "self_forcing"


def parser(description: str | None) -> cli.Parser:
    """The command line.

    Args:
      description: the program's docstring.
    """
    result = cli.Parser("python -m vpae_jax.convert", description)
    add = result.add_argument
    add("source", metavar="SRC", help="model (folder, file, hub id, 'tiny'), or workdir of a training run")
    add("target", type=Path, metavar="DST", help="folder (with --as-lora: file) to write; must not exist")
    add("--format", choices=(*get_args(Format), SELF_FORCING), required=True, help="the layout of DST")
    add(
        "--weights",
        help="of a run: generator, ema (the default, if kept; for Self-Forcing both) or ema_DECAY, with --as-lora "
        "also a role with adapters; of a file with several sets, such as generator and generator_ema: one of them",
    )
    add("--refused", action="store_true", help="of a run whose guard turned its trained weights down: these weights")
    add("--student", metavar="CONFIG", help="SRC is sampled as this config's student: configs/NAME.py[:PRESET]")
    add("--base", help="model that gives what SRC lacks; with --as-lora, the teacher")
    add(
        "--lora",
        type=partial(parse_lora, name="--lora"),
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="LoRA file to merge into the transformer; several are added",
    )
    add("--as-lora", action="store_true", help="write the transformer's difference from --base's as a LoRA file")
    add("--rank", type=int, help="rank of the LoRA file")
    add("--dtype", choices=cli.DTYPES, help="of the written weights; by default as they are")
    add("--push", metavar="OWNER/NAME", help="upload DST to this repository of the Hugging Face hub, too")
    add("--private", action="store_true", help="with --push: a repository that is created is private")
    add("--verify", action="store_true", help="read DST back and compare it bit for bit")
    return result


def check(given: argparse.Namespace, role: str | None, command: str) -> None:
    """Raises `UserError` for options that do not go together, and for a target that exists and that the command, with
    --push, has not written. A run's role that trains adapters has its rank."""
    if given.push is not None and given.format == SELF_FORCING:
        raise UserError(f"--push: leave it out with --format={SELF_FORCING}; a model's own layouts are uploaded")
    if given.private and given.push is None:
        raise UserError("--private: only with --push=OWNER/NAME")
    if given.target.exists() and given.push is not None:
        if not written_by(given.target, command):
            raise UserError(f"{given.target}: exists, and was not written by this command; remove it or choose another")
    elif given.target.exists():
        raise UserError(f"{given.target}: already exists; remove it or choose another destination")
    source = Path(given.source)
    if given.refused and not is_workdir(source):
        raise UserError(f"--refused: {source} is no training run, whose guard could have turned weights down")
    if given.student is not None and is_workdir(source):
        raise UserError(f"--student: {source} is a training run, which says how its student is sampled; leave it out")
    if source.is_dir() and not is_workdir(source) and given.target.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{given.target}: lies in {source}; choose a destination outside")
    if not given.as_lora:
        if given.rank is not None:
            raise UserError(f"--rank={given.rank}: only with --as-lora")
        if given.format == SELF_FORCING and given.target.suffix != SUFFIX:
            raise UserError(f"{given.target}: a checkpoint of Self-Forcing's name ends in {SUFFIX}")
        return
    if given.format not in get_args(Layout):
        raise UserError(f"--format={given.format}: a LoRA file is written for diffusers or wan (ComfyUI)")
    if given.lora or given.verify:
        raise UserError("--as-lora: leave --lora and --verify out")
    if given.target.suffix != ".safetensors":
        raise UserError(f"{given.target}: a LoRA file's name ends in .safetensors")
    if given.rank is None and role is None:
        raise UserError("--as-lora: give --rank=N")
