"""Converts models between layouts, and training runs to models.

    python -m vpae_jax.convert SRC DST --format=diffusers|wan|orbax [--weights=generator|ema|...] [--base=MODEL]
        [--student=CONFIG] [--lora=FILE[:STRENGTH] ...] [--dtype=...] [--verify]
    python -m vpae_jax.convert SRC DST.safetensors --format=diffusers|wan --as-lora [--rank=N] [--base=TEACHER]
    python -m vpae_jax.convert SRC DST.pt --format=self_forcing [--weights=generator|ema]

SRC is a model: a folder or a single file in any layout, "tiny", or an id of the Hugging Face hub. Or it is the workdir
of a training run: then DST is the model that the run started from, with the generator of its newest checkpoint as the
transformer. Of a file with several sets of weights, --weights names one. What SRC lacks comes from --base. A file of
weights does not say how it is sampled: --student=CONFIG says that it is a student as this config makes one, such as
configs/self_forcing.py:t2v-1.3b-480p. --lora merges a LoRA file into the transformer, times its strength; it may be
given more than once.

With --as-lora, DST is a LoRA file: the best approximation of rank N to what the transformer differs by from that of
--base (of a run: from that of the model that it started from, with the run's own config.model.lora merged).
--format=diffusers writes PEFT's names, --format=wan ComfyUI's. --weights=ROLE of a role that trains adapters writes
these as they are.

With --format=self_forcing, DST is a checkpoint that Self-Forcing and CausVid load: of a run its generator and the
average of it, of a model its transformer. A causal model is written so, or for this package (--format=orbax): the other
layouts' readers let all frames see each other.

--push=OWNER/NAME uploads DST to the Hugging Face hub as well, which is asked first whether it will take it. Where the
same command has written DST before, that is uploaded and nothing is converted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vpae_jax import cli
from vpae_jax.config import parse
from vpae_jax.config_files import load
from vpae_jax.converting import pushing
from vpae_jax.converting.options import SELF_FORCING, WEIGHTS, check, of_the_generator, parser
from vpae_jax.methods import make_method
from vpae_jax.methods.base import Method, all_views
from vpae_jax.run.first_weights import previous_model, previous_moment, read_previous, remembered, resolve_model
from vpae_jax.run.guard import Verdict, compared_scores, verdict
from vpae_jax.run.loras import lora_files
from vpae_jax.run.previews import latest_previews
from vpae_jax.run.student import averaged_view
from vpae_jax.run.workdir import PastRun
from vpae_jax.run.workdir import read_run as read_past_run
from vpae_jax.runtime.progress import working
from vpae_jax.train.checkpoint import read_state
from vpae_jax.types import Note, UserError
from vpae_jax.weights.card import Provenance
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.extraction import extract, format_energies
from vpae_jax.weights.filenames import PRODUCT, SETTINGS
from vpae_jax.weights.find import find_model, is_workdir
from vpae_jax.weights.layout import Contents, write_model
from vpae_jax.weights.loading import read_part
from vpae_jax.weights.lora import Lora, Merged, from_adapters, write_lora
from vpae_jax.weights.lora_card import COMMAND
from vpae_jax.weights.lora_reading import read_lora
from vpae_jax.weights.merging import MERGED_BEFORE, LoraFile, about_base, merged, told
from vpae_jax.weights.names import Layout
from vpae_jax.weights.origin import origin_of
from vpae_jax.weights.parts import LOW, makes_from_image
from vpae_jax.weights.self_forcing import config_of, write_checkpoint
from vpae_jax.weights.settings import Scheduler, read_scheduler
from vpae_jax.weights.student_lora import write_student_lora
from vpae_jax.weights.writing import Format, Values, from_tree, open_values

# Layouts whose readers let all frames see each other, with them.
_BIDIRECTIONAL = {"diffusers": "Diffusers' Wan pipelines let", "wan": "Wan's own program lets"}
CAUSAL_LORA = "the model is causal, which a LoRA file cannot say: who loads it lets all frames see each other"
# What a card says after the guard's verdict on weights that are written all the same.
REFUSED = "; this model has the trained weights all the same (--refused)"


@dataclass(frozen=True)
class Input:
    """What is converted.

    Attributes:
      base: the model whose parts are taken where `parts` has none.
      parts: weights in memory.
      scheduler: how to sample them; None as `base`.
      provenance: where they come from.
      loras: LoRA files that were merged into the base's transformer before it was trained.
      sets: of a run: the transformers that a checkpoint of Self-Forcing's holds, by name.
    """

    base: ModelDirectory
    provenance: Provenance
    parts: Mapping[str, Values] = field(default_factory=dict)
    scheduler: Scheduler | None = None
    loras: tuple[LoraFile, ...] = ()
    sets: Mapping[str, Values] = field(default_factory=dict)

    @property
    def how(self) -> Scheduler:
        """How it is sampled."""
        image = makes_from_image({name: source.config for name, source in self.base.parts.items()})
        return self.scheduler or read_scheduler(self.base.folder, image)


def read_model(source: str, base: str | None, weights: str | None = None) -> Input:
    """A model, completed from another. What of it cannot be read is a `Note`, but for a transformer.

    Raises:
      UserError: no model there, or none that can be read; no such set of weights.
    """
    other = None if base is None else find_model(base)
    model = find_model(source, other, weights)
    origin = origin_of(source, model.folder)
    if other is not None and not origin.model:
        origin = origin_of(str(base), other.folder)
    if not model.parts:
        reasons = (*model.unreadable.values(), *(f"{file}: {why}" for file, why in model.passed_over))
        raise UserError(next(iter(reasons), f"{source}: holds no part of a Wan model and no training run"))
    for name in ("transformer", LOW):  # another's, or none, is not what was asked for
        if name in model.unreadable:
            model.part(name)
    if other is not None:
        unreadable = {**other.unreadable, **model.unreadable}
        for name, reason in unreadable.items():
            if name in other.parts:
                warnings.warn(f"the {name} is taken from --base: {reason}", Note, stacklevel=2)
        if not model.has_tokenizer:
            model = dataclasses.replace(model, tokenizer=other.tokenizer, more_tokenizers=other.more_tokenizers)
        if not any((model.folder / name).exists() for name in ("scheduler", SETTINGS)):
            model = dataclasses.replace(model, folder=other.folder)
        parts = {**other.parts, **model.parts}
        transformer = model.parts.get("transformer")
        if transformer is not None and transformer.config.image_dim is None and "image_encoder" not in model.parts:
            parts.pop("image_encoder", None)  # of the base, which this transformer does not look at
        model = dataclasses.replace(
            model,
            parts=parts,
            unreadable={name: why for name, why in unreadable.items() if name not in parts},
            boundary=other.boundary if model.boundary is None else model.boundary,
            image_processor=model.image_processor or other.image_processor,
        )
    return Input(model, Provenance(source, {} if base is None else {"base": base}, origin=origin))


def sampled_as(config: str) -> Scheduler:
    """How the student of a config is sampled. Raises `UserError` for none, or one that makes no student."""
    experiment = parse(load(config))
    student = make_method(experiment.method).student
    if student is None:
        raise UserError(f"--student={config}: its method makes no student; name the config of one that does")
    return Scheduler.of(student.sampler, experiment.sample_shift)


def read_run(workdir: Path, weights: str | None, base: str | None, refused: bool = False, both: bool = False) -> Input:
    """The model that a run started from, the transformer that it trained, and how to sample that.

    Args:
      refused: whether weights that the run's guard turned down are wanted all the same.
      both: whether the generator is wanted beside its average, where `weights` does not name one of them.

    Raises:
      UserError: a role or average that the checkpoint lacks, or weights that the guard turned down.
    """
    if not of_the_generator(weights):
        raise UserError(f"--weights={weights}: expected one of {', '.join(WEIGHTS)}, ema_DECAY")
    run = read_past_run(workdir)
    decided = _decision(workdir, run, refused)
    model = find_model(resolve_model(run.model_path, workdir) if base is None else base)
    method, state = make_method(run.method), read_state(workdir)
    student, averages = method.student, state["averages"]
    if student is None:
        raise UserError(f"{workdir}: its method {run.method.get('name')} makes no generator to convert")
    if weights is not None and weights not in WEIGHTS:
        student = dataclasses.replace(student, average=weights)
        if averaged_view(averages, student, student.view) == student.view:
            kept = ", ".join(sorted(name.removeprefix(f"{student.view}_") for name in averages)) or "none"
            raise UserError(f"--weights={weights}: the checkpoint has no such average; it has: {kept}")
    names = {"transformer": student.view} | ({} if student.low is None else {LOW: student.low})
    judged = {part: averaged_view(averages, student, name) for part, name in names.items()}
    if weights == "ema" and judged == names:
        raise UserError(f"{workdir}: the checkpoint has no average of the generator; use --weights=generator")
    averaged = weights != "generator" and judged != names
    loras = lora_files(run.lora, workdir)
    held = _Held(method, run, workdir, state["params"], averages, model, loras)
    parts = {part: held.transformer(name) for part, name in (judged if averaged else names).items()}
    facts = {
        "run": run.name,
        "step": int(state["step"]),
        "weights": f"the generator's average ({student.average})" if averaged else "the generator",
        "started from": run.model_path,
        **({MERGED_BEFORE: told(loras)} if loras else {}),
        **({} if decided is None else {"guard": decided.reason + ("" if decided.kept else REFUSED)}),
    }
    boundary = None if student.low is None else student.boundary
    origin = origin_of(run.model_path if base is None else base, model.folder)
    sets: dict[str, Values] = {"generator_ema" if averaged else "generator": parts["transformer"]}
    if both and averaged and weights is None:
        sets["generator"] = held.transformer(names["transformer"])
    return Input(
        dataclasses.replace(model, boundary=boundary),
        Provenance(str(workdir), facts, compared_scores(workdir), origin, latest_previews(workdir)),
        parts,
        Scheduler.of(student.sampler, run.sample_shift),
        loras,
        sets,
    )


def _decision(workdir: Path, run: PastRun, refused: bool) -> Verdict | None:
    """What a run's guard decided. Raises `UserError` where it turned the weights down, or cannot be asked, unless
    `refused` says that they are wanted all the same."""
    try:
        decided = verdict(workdir, run)
    except UserError as error:
        if refused:
            return None
        raise UserError(f"{error}; --refused converts the trained weights, whatever that was") from error
    if decided is not None and not decided.kept and not refused:
        raise UserError(
            f"{workdir}: its guard turned the trained weights down ({decided.reason}); {workdir / PRODUCT} holds the "
            "weights that were kept, and converts as any model (--as-lora then needs "
            f"--base={run.model.get('path', 'MODEL')}); --refused converts the trained ones"
        )
    return decided


@dataclass(frozen=True)
class _Held:
    """What a run holds.

    Attributes:
      method: its method.
      run: its config.
      workdir: its folder.
      params, averages: of its checkpoint.
      model: what it started from.
      loras: what was merged into that model's transformer.
    """

    method: Method
    run: PastRun
    workdir: Path
    params: Mapping[str, Any]
    averages: Mapping[str, Any]
    model: ModelDirectory
    loras: tuple[LoraFile, ...]

    def transformer(self, name: str) -> Values:
        """A view's transformer; adapters are added to the weights that they were trained on."""
        view = all_views(self.method)[name]
        adapters = self.method.roles[view.role].adapters
        if adapters is None and view.average is None:
            return self._values(view.role)
        own = self._weights(view.role) if view.average is None else self.averages[f"{view.role}_{view.average}"]
        if adapters is None:
            return from_tree("transformer", self.model.part("transformer").config, own)
        lora = from_adapters(own, adapters.alpha * view.scale, adapters.rank)
        return Merged(self._values(adapters.on), lora, changed_dtype=np.dtype(np.float32))

    def _values(self, role: str) -> Values:
        """A whole role's transformer: where that is the model's own, with the run's LoRA files merged."""
        values = from_tree("transformer", self.model.part("transformer").config, self._weights(role))
        of_model = role not in self.params and self.method.roles[role].previous(role) is None
        return merged(values, self.loras) if of_model else values

    def _weights(self, role: str) -> Any:
        """A role's weights: trained ones from the checkpoint, frozen ones from where the run took them."""
        if role in self.params:
            return self.params[role]
        earlier = self.method.roles[role].previous(role)
        if earlier is None:
            return read_part(self.model, "transformer", None)[1]
        experiment = parse(self.run.whole)
        if (given := previous_model(experiment, self.workdir)) is not None:
            return read_part(given, "transformer", None)[1]
        moment = previous_moment(experiment, self.workdir, remembered(self.workdir))
        return read_previous(experiment, self.workdir, earlier, None, moment)


def read_adapters(workdir: Path, name: str) -> tuple[Lora, dict[str, str], Scheduler | None]:
    """The adapters that a run trained for a role, what is to be known of the model that they are for, and how they are
    sampled if they are the student's.

    Raises:
      UserError: the run has no such role, or it trains no adapters.
    """
    run = read_past_run(workdir)
    method = make_method(run.method)
    roles, student = method.roles, method.student
    trained = [role for role, spec in roles.items() if spec.trains and spec.adapters is not None]
    if name not in trained:
        raise UserError(f"--weights={name}: {workdir} trains adapters of {', '.join(trained) or 'no role'} only")
    scheduler = None
    if student is not None and all_views(method)[student.view].role == name:
        scheduler = Scheduler.of(student.sampler, run.sample_shift)
        if scheduler.chunks is not None:
            warnings.warn(CAUSAL_LORA, Note, stacklevel=2)
    params = read_state(workdir, items=("params",))["params"][name]
    adapters = roles[name].adapters
    assert adapters is not None
    base = about_base(run.model_path, lora_files(run.lora, workdir))
    return from_adapters(params, adapters.alpha, adapters.rank), base, scheduler


def write_adapters(workdir: Path, name: str, target: Path, form: Layout, dtype: Any, command: str) -> None:
    """Writes the adapters that a run trained for a role as a LoRA file. Raises `UserError` as `read_adapters`."""
    lora, about, scheduler = read_adapters(workdir, name)
    about = {**about, COMMAND: command}
    if scheduler is None:
        write_lora(target, lora, form, dtype, about)
    else:
        model = find_model(resolve_model(about["base"], workdir))
        write_student_lora(target, lora, form, dtype, about, scheduler, model)


def convert(given: Input, target: Path, form: Format, dtype: Any, loras: Sequence[LoraFile], verify: bool) -> None:
    """Writes `target`; see the module's docstring. `loras` are merged into it.

    Raises:
      UserError: a target that exists, a part that neither the input nor its base has, weights that cannot be read, or
        that do not read back as they were written.
    """
    if form in _BIDIRECTIONAL and "transformer" in given.base.parts and given.how.chunks is not None:
        raise UserError(
            f"--format={form}: {given.provenance.source} is a causal model, trained to see earlier frames alone, and "
            f"{_BIDIRECTIONAL[form]} all frames see each other; --format=orbax writes it for this package, "
            f"--format={SELF_FORCING} for Self-Forcing and CausVid"
        )
    if loras:
        _one_transformer(given.base, "--lora")
    with ExitStack() as stack:
        parts = dict(given.parts)
        if loras:
            values = parts.get("transformer") or stack.enter_context(open_values(given.base, "transformer"))
            parts["transformer"] = _with_loras(values, loras, dtype)
        facts = {
            "merged LoRA": told(loras) or None,
            "dtype": None if dtype is None else str(dtype),
        }
        facts = {**given.provenance.facts, **{name: value for name, value in facts.items() if value is not None}}
        provenance = dataclasses.replace(given.provenance, facts=facts)
        without = {name: why for name, why in given.base.unreadable.items() if name not in parts}
        for name, reason in without.items():
            warnings.warn(f"the {name} is left out: {reason}", Note, stacklevel=2)
        contents = Contents(given.base, parts, given.scheduler, provenance=provenance, without=without)
        with working(f"writing {target}"):
            counts = write_model(target, contents, form, dtype=dtype, verify=verify)
        if lacking := [name for name in given.base.lacks(parts) if name not in without]:
            print(f"note: no {', '.join(lacking)} in the source; --base=MODEL makes {target} a whole model")
        for name, count in counts.items():
            print(f"{name}: {count} tensors read back, bit for bit")


def _with_loras(values: Values, loras: Sequence[LoraFile], dtype: Any) -> Values:
    for file, strength in loras:
        values = result = Merged(values, read_lora(file, values.config), strength)
        if dtype is None and result.widens:
            warnings.warn("float8 weights that a LoRA changes are written in bfloat16", Note, stacklevel=3)
    return values


def write_sets(given: Input, target: Path, dtype: Any, loras: Sequence[LoraFile], verify: bool) -> None:
    """Writes a checkpoint of Self-Forcing's, and prints what its config has to say; see the module's docstring.

    Raises:
      UserError: two experts, another suffix than .pt, weights that cannot be read or do not read back as they were
        written, or no PyTorch.
    """
    _one_transformer(given.base, f"--format={SELF_FORCING}")
    with ExitStack() as stack:
        sets = dict(given.sets) or {"generator": stack.enter_context(open_values(given.base, "transformer"))}
        sets = {name: _with_loras(values, loras, dtype) for name, values in sets.items()}
        with working(f"writing {target}"):
            counts = write_checkpoint(target, sets, dtype, given.base if verify else None)
    for name, count in counts.items():
        print(f"{name}: {count} tensors read back, bit for bit")
    if told := config_of(given.how):
        print(f"for Self-Forcing's config: {', '.join(f'{key}: {json.dumps(value)}' for key, value in told.items())}")


def write_difference(
    given: Input, teacher: str | None, target: Path, form: Layout, rank: int, dtype: Any, command: str
) -> None:
    """Writes the transformer's difference from the teacher's as a LoRA file, and prints what it keeps.

    ComfyUI's form has also what no adapter holds: whole differences of biases, norms, modulation, patch embedding.

    Raises:
      UserError: no teacher, transformers of different sizes, a rank below 1, or weights that cannot be read.
    """
    if teacher is None and "transformer" not in given.parts:
        raise UserError("--as-lora: name the model that the LoRA is for with --base")
    base = given.base if teacher is None else find_model(teacher)
    _one_transformer(given.base, "--as-lora")
    if given.how.chunks is not None:
        warnings.warn(CAUSAL_LORA, Note, stacklevel=2)
    with ExitStack() as stack:
        student = given.parts.get("transformer") or stack.enter_context(open_values(given.base, "transformer"))
        values = stack.enter_context(open_values(base, "transformer"))
        loras = given.loras if teacher is None else ()
        values = merged(values, loras)
        found = extract(student, values, rank, differences=form == "wan")
    about = {**about_base(base.path, loras), COMMAND: command}
    write_student_lora(target, found.lora, form, dtype, about, given.how, given.base)
    print(format_energies(found))


def _one_transformer(model: ModelDirectory, option: str) -> None:
    """Raises `UserError` for a model of two experts, each of which would have a LoRA of its own."""
    if model.boundary is not None:
        raise UserError(f"{option}: {model.path} has two experts; convert the folder of one of them")


def main(argv: list[str]) -> None:
    given, command = parser(__doc__).parse_args(argv), pushing.recorded(argv)
    run = is_workdir(Path(given.source))
    role = given.weights if given.as_lora and run and not of_the_generator(given.weights) else None
    check(given, role, command)
    push = None
    if given.push is not None:
        push = pushing.prepare(given.push, given.private, given.source, given.target, not given.as_lora)
    if push is None or not push.done:
        _write(given, run, role, command)
    print(given.target)
    if push is not None:
        push.upload()


def _write(given: argparse.Namespace, run: bool, role: str | None, command: str) -> None:
    """Writes what was asked for.

    Args:
      run: whether the source is a training run.
      role: of a run, whose adapters are written.
      command: what the target is to name as its origin.
    """
    dtype = None if given.dtype is None else np.dtype(given.dtype)
    if role is not None:
        write_adapters(Path(given.source), role, given.target, given.format, dtype, command)
        return
    if run:
        base, both = None if given.as_lora else given.base, given.format == SELF_FORCING
        source = read_run(Path(given.source), given.weights, base, given.refused, both)
    else:
        source = read_model(given.source, given.base, given.weights)
        if given.student is not None:
            source = dataclasses.replace(source, scheduler=sampled_as(given.student))
    told = dataclasses.replace(source.provenance, facts={**source.provenance.facts, COMMAND: command})
    source = dataclasses.replace(source, provenance=told)
    if given.as_lora:
        write_difference(source, given.base, given.target, given.format, given.rank, dtype, command)
    elif given.format == SELF_FORCING:
        write_sets(source, given.target, dtype, given.lora, given.verify)
    else:
        convert(source, given.target, given.format, dtype, given.lora, given.verify)


if __name__ == "__main__":
    cli.run(main)
