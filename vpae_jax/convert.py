"""Converts models between layouts, and training runs to models.

    python -m vpae_jax.convert SRC DST --format=diffusers|wan|orbax [--weights=generator|ema] [--base=MODEL]
        [--lora=FILE] [--dtype=...] [--verify]
    python -m vpae_jax.convert SRC DST.safetensors --format=diffusers|wan --as-lora [--rank=N] [--base=TEACHER]

SRC is a model: a folder or a single file in any layout, "tiny", or an id of the Hugging Face hub. Or it is the workdir
of a training run: then DST is the model that the run started from, with the generator of its newest checkpoint as the
transformer. What SRC lacks comes from --base. --lora merges a LoRA file into the transformer.

With --as-lora, DST is a LoRA file: the best approximation of rank N to what the transformer differs by from that of
--base (of a run: from that of the model that it started from). --format=diffusers writes PEFT's names, --format=wan
ComfyUI's. --weights=ROLE of a role that trains adapters writes these as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from vpae_jax import cli
from vpae_jax.methods import make_method
from vpae_jax.methods.base import EMA
from vpae_jax.run.first_weights import resolve_model
from vpae_jax.train.checkpoint import CONFIG_FILE, FOLDER, read_state
from vpae_jax.types import UserError
from vpae_jax.weights.card import Provenance
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.extraction import extract, format_energies
from vpae_jax.weights.filenames import SETTINGS, read_json
from vpae_jax.weights.find import find_model
from vpae_jax.weights.layout import write_model
from vpae_jax.weights.locate import locate
from vpae_jax.weights.lora import Lora, Merged, from_adapters, write_lora
from vpae_jax.weights.lora_reading import read_lora
from vpae_jax.weights.names import Layout
from vpae_jax.weights.settings import Scheduler
from vpae_jax.weights.writing import Format, Values, from_tree, open_values

WEIGHTS = ("generator", "ema")


@dataclass(frozen=True)
class Input:
    """What is converted.

    Attributes:
      base: the model whose parts are taken where `parts` has none.
      parts: weights in memory.
      scheduler: how to sample them; None as `base`.
      provenance: where they come from.
    """

    base: ModelDirectory
    provenance: Provenance
    parts: Mapping[str, Values] = field(default_factory=dict)
    scheduler: Scheduler | None = None


def read_model(source: str, base: str | None) -> Input:
    """A model, completed from another.

    Raises:
      UserError: no model there.
    """
    other = None if base is None else find_model(locate(base))
    model = find_model(locate(source), other)
    if not model.parts:
        raise UserError(f"{source}: holds no part of a Wan model and no training run")
    if other is not None:
        if model.tokenizer is None:
            model = dataclasses.replace(model, tokenizer=other.tokenizer, more_tokenizers=other.more_tokenizers)
        if not any((model.folder / name).exists() for name in ("scheduler", SETTINGS)):
            model = dataclasses.replace(model, folder=other.folder)
        model = dataclasses.replace(
            model,
            parts={**other.parts, **model.parts},
            image_processor=model.image_processor or other.image_processor,
        )
    return Input(model, Provenance(source, {} if base is None else {"base": base}))


def read_run(workdir: Path, weights: str | None, base: str | None) -> Input:
    """The model that a run started from, the transformer that it trained, and how to sample that.

    Raises:
      UserError: a role or average that the checkpoint lacks.
    """
    if weights not in (None, *WEIGHTS):
        raise UserError(f"--weights={weights}: expected one of {', '.join(WEIGHTS)}")
    run = read_json(workdir / CONFIG_FILE)
    model = find_model(resolve_model(run["model"]["path"], workdir) if base is None else locate(base))
    state = read_state(workdir)
    method = make_method(run["method"])
    name = f"generator_{EMA}"
    average = weights == "ema" or (weights is None and name in state["averages"])
    trained = state["averages"].get(name) if average else state["params"].get("generator")
    if trained is None or method.student is None:
        raise UserError(
            f"{workdir}: the checkpoint has no {'average of the ' if average else ''}generator; it was not trained"
        )
    facts = {
        "run": run.get("name", ""),
        "step": int(state["step"]),
        "weights": "the generator's average" if average else "the generator",
        "started from": str(run["model"]["path"]),
    }
    return Input(
        model,
        Provenance(str(workdir), facts, _scores(workdir)),
        {"transformer": from_tree("transformer", model.part("transformer").config, trained)},
        Scheduler.of_student(run["sample_shift"], method.student.sampler.steps, method.student.sampler.guidance),
    )


def read_adapters(workdir: Path, name: str) -> Lora:
    """The adapters that a run trained for a role.

    Raises:
      UserError: the run has no such role, or it trains no adapters.
    """
    roles = make_method(read_json(workdir / CONFIG_FILE)["method"]).roles
    trained = [role for role, spec in roles.items() if spec.trains and spec.adapters is not None]
    if name not in trained:
        raise UserError(f"--weights={name}: {workdir} trains adapters of {', '.join(trained) or 'no role'} only")
    params = read_state(workdir, items=("params",))["params"][name]
    adapters = roles[name].adapters
    assert adapters is not None
    return from_adapters(params, adapters.alpha, adapters.rank)


def convert(given: Input, target: Path, form: Format, dtype: Any, lora_file: Path | None, verify: bool) -> None:
    """Writes `target`; see the module's docstring.

    Raises:
      UserError: a target that exists, a part that neither the input nor its base has, weights that cannot be read, or
        that do not read back as they were written.
    """
    with ExitStack() as stack:
        parts = dict(given.parts)
        if lora_file is not None:
            values = parts.get("transformer") or stack.enter_context(open_values(given.base, "transformer"))
            parts["transformer"] = Merged(values, read_lora(lora_file, values.config))
        facts = {
            "merged LoRA": None if lora_file is None else str(lora_file),
            "dtype": None if dtype is None else str(dtype),
        }
        facts = {**given.provenance.facts, **{name: value for name, value in facts.items() if value is not None}}
        counts = write_model(
            target,
            given.base,
            parts,
            form=form,
            scheduler=given.scheduler,
            dtype=dtype,
            provenance=dataclasses.replace(given.provenance, facts=facts),
            complete=False,
            verify=verify,
        )
        if lacking := given.base.lacks(parts):
            print(f"note: no {', '.join(lacking)} in the source; --base=MODEL makes {target} a whole model")
        for name, count in counts.items():
            print(f"{name}: {count} tensors read back, bit for bit")


def write_difference(given: Input, teacher: str | None, target: Path, form: Layout, rank: int, dtype: Any) -> None:
    """Writes the transformer's difference from the teacher's as a LoRA file, and prints what it keeps.

    Raises:
      UserError: no teacher, transformers of different sizes, a rank below 1, or weights that cannot be read.
    """
    if teacher is None and "transformer" not in given.parts:
        raise UserError("--as-lora: name the model that the LoRA is for with --base")
    base = given.base if teacher is None else find_model(locate(teacher))
    with ExitStack() as stack:
        student = given.parts.get("transformer") or stack.enter_context(open_values(given.base, "transformer"))
        found = extract(student, stack.enter_context(open_values(base, "transformer")), rank)
    write_lora(target, found.lora, form, dtype)
    print(format_energies(found))


def _scores(workdir: Path) -> dict[str, float]:
    """What a run's guard measured of the weights that it exported."""
    path = workdir / "guard.json"
    if not path.is_file():
        return {}
    known = read_json(path)
    return {
        f"held-out {name}, step {step}": value
        for step, found in known["scores"].items()
        for name, value in found.items()
        if name.endswith(f"/{known['compared']}")
    }


def parser() -> cli.Parser:
    """The command line."""
    result = cli.Parser("python -m vpae_jax.convert", __doc__)
    add = result.add_argument
    add("source", metavar="SRC", help="model (folder, file, hub id, 'tiny'), or workdir of a training run")
    add("target", type=Path, metavar="DST", help="folder (with --as-lora: file) to write; must not exist")
    add("--format", choices=get_args(Format), required=True, help="the layout of DST")
    add("--weights", help="of a run: generator, or ema (by default, if kept); with --as-lora also a role with adapters")
    add("--base", help="model that gives what SRC lacks; with --as-lora, the teacher")
    add("--lora", type=Path, help="LoRA file to merge into the transformer")
    add("--as-lora", action="store_true", help="write the transformer's difference from --base's as a LoRA file")
    add("--rank", type=int, help="rank of the LoRA file")
    add("--dtype", choices=cli.DTYPES, help="of the written weights; by default as they are")
    add("--verify", action="store_true", help="read DST back and compare it bit for bit")
    return result


def main(argv: list[str]) -> None:
    given = parser().parse_args(argv)
    _check(given)
    dtype = None if given.dtype is None else np.dtype(given.dtype)
    run = (Path(given.source) / FOLDER).is_dir()
    if given.as_lora and run and given.weights not in (None, *WEIGHTS):
        write_lora(given.target, read_adapters(Path(given.source), given.weights), given.format, dtype)
        print(given.target)
        return
    if run:
        source = read_run(Path(given.source), given.weights, None if given.as_lora else given.base)
    elif given.weights is not None:
        raise UserError(f"--weights={given.weights}: {given.source} is not a training run's workdir; leave it out")
    else:
        source = read_model(given.source, given.base)
    if given.as_lora:
        write_difference(source, given.base, given.target, given.format, given.rank, dtype)
    else:
        convert(source, given.target, given.format, dtype, given.lora, given.verify)
    print(given.target)


def _check(given: argparse.Namespace) -> None:
    """Raises `UserError` for options that do not go together, and for a target that exists."""
    if given.target.exists():
        raise UserError(f"{given.target}: already exists; remove it or choose another destination")
    source = Path(given.source)
    if source.is_dir() and not (source / FOLDER).is_dir() and given.target.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{given.target}: lies in {source}; choose a destination outside")
    if not given.as_lora:
        if given.rank is not None:
            raise UserError(f"--rank={given.rank}: only with --as-lora")
        return
    if given.format == "orbax":
        raise UserError("--format=orbax: a LoRA file is written for diffusers or wan (ComfyUI)")
    if given.lora is not None or given.verify:
        raise UserError("--as-lora: leave --lora and --verify out")
    if given.target.suffix != ".safetensors":
        raise UserError(f"{given.target}: a LoRA file's name ends in .safetensors")
    if given.rank is None and given.weights in (None, *WEIGHTS):
        raise UserError("--as-lora: give --rank=N")


if __name__ == "__main__":
    cli.run(main)
