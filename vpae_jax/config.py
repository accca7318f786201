"""From an `ml_collections` config to frozen dataclasses, once, strictly.

`parse` is the only place where a ConfigDict meets the code: every key must be known, present where it has no default,
and of the right type. A misspelt key is one line that names it and the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

from ml_collections import ConfigDict, FieldReference

from vpae_jax.flow.draws import check_seed
from vpae_jax.types import UserError


def _at_least(config: Any, minimum: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < minimum:
            raise UserError(f"{name} is {getattr(config, name)}, expected at least {minimum}")


@dataclass(frozen=True)
class OptimizerConfig:
    """One role's optimizer.

    Attributes:
      learning_rate: peak step size.
      algorithm: "adam" or "rmsprop".
      b1, b2: decays of Adam's moments.
      rms_decay: decay of RMSProp's second moment, which is not corrected for its start at 0.
      eps: what either adds to its denominator, the root of the second moment.
      weight_decay: decoupled weight decay: the share of each weight, times the step size, that an update takes away.
      clip_norm: global gradient norm above which gradients are scaled down; 0 switches clipping off.
      warmup_steps: updates over which the step size rises linearly from 0.
      decay_steps: updates of a cosine decay to zero, which follows the warm-up; 0 keeps the step size constant.
    """

    learning_rate: float
    algorithm: Literal["adam", "rmsprop"] = "adam"
    b1: float = 0.9
    b2: float = 0.999
    rms_decay: float = 0.9
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 10.0
    warmup_steps: int = 0
    decay_steps: int = 0

    def __post_init__(self) -> None:
        decays = ("b1", "b2", "rms_decay")
        _at_least(self, 0, "learning_rate", *decays, "eps", "weight_decay", "clip_norm", "warmup_steps", "decay_steps")
        for name in decays:
            if getattr(self, name) >= 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected less than 1")


@dataclass(frozen=True)
class ModelConfig:
    """Where weights come from and how they run.

    Attributes:
      path: model directory in any layout, or its id on the Hugging Face hub; "tiny" is the embedded one. This and every
        other path of a config is relative to the folder in which the command is given, but for "{workdir}/...", which
        leads from the run's own folder.
      lora: LoRA files, "FILE,FILE" or "FILE:STRENGTH,FILE:STRENGTH", that are merged into the model directory's
        transformer, in float32, wherever a role starts from it. Empty: there is none.
      preset: sizes of the parts that start from random weights (a key of `vpae_jax.models.presets.PRESETS`).
      dtype: compute precision; trained weights are float32 always.
      frozen_dtype: storage precision of weights that are not trained.
      remat: what the backward pass recomputes of the transformer's blocks: nothing, all but the products of
        activations with weights ("dots"), all but self-attention ("attention"), or everything; "offload" recomputes
        everything, and keeps the blocks' inputs in the host's memory.
      image_encoder: where a discriminator on pixels has its image encoder from: a model directory, as `path`, or
        "KIND:PATH" of another kind (a key of `vpae_jax.run.image_encoders.KINDS`). Empty: `path` itself.
      init_scale: for a transformer that starts from random weights, factors on the parameters whose paths match.
    """

    path: str = "tiny"
    lora: str = ""
    preset: str = "tiny"
    dtype: Literal["float32", "bfloat16"] = "float32"
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full", "attention", "offload"] = "none"
    image_encoder: str = ""
    init_scale: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    Attributes:
      clips: how many distinct clips are rendered.
      seed: decides the clips and their order.
      folder: where encoded clips are kept between runs.
      workers: processes that prepare batches; 0 prepares them in the training process.
      records: folders of latent records, "DIR,DIR" or "DIR=WEIGHT,DIR=WEIGHT"; each a path, or an address in an object
        store, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER. A weight is the share of training clips that come from there,
        up to a common factor; without weights all clips are seen equally often. Empty: clips are encoded from `videos`,
        or rendered.
      videos: a folder of videos that are encoded before the run. Empty: there is none.
      max_bad: share of damaged records that is put up with; the run stops beyond.
      held_out: clips of each folder that are never trained on, at most a fifth of them: for previews, the guard and
        `evaluate`. A folder with several clips of one video has some of them on either side.
      held_out_records: folders of records, as in `records`, whose clips take the place of those; then nothing is held
        out of the others.
    """

    clips: int = 2048
    seed: int = 0
    folder: str = "{workdir}/../data"
    workers: int = 0
    records: str = ""
    videos: str = ""
    max_bad: float = 0.01
    held_out: int = 256
    held_out_records: str = ""

    def __post_init__(self) -> None:
        _at_least(self, 1, "clips")
        _at_least(self, 0, "workers", "max_bad", "held_out")
        check_seed(self.seed)
        if self.max_bad >= 1:
            raise UserError(f"max_bad is {self.max_bad}, expected less than 1")
        if self.records and self.videos:
            raise UserError("records and videos are both given; choose one (--config.data.videos= leaves it out)")
        weighted = [weight is not None for _, weight in self.sources]
        if any(weighted) and not all(weighted):
            raise UserError(f"records is {self.records!r}; give every folder a weight, or none")
        if self.held_out_records and not (self.records or self.videos):
            raise UserError("held_out_records is given without records or videos; rendered digits have their own")
        if any(weight is not None for _, weight in parse_sources(self.held_out_records)):
            raise UserError(f"held_out_records is {self.held_out_records!r}; give folders without weights")

    @property
    def sources(self) -> tuple[tuple[str, float | None], ...]:
        """The folders of `records`, each with its weight; None where it has none."""
        return parse_sources(self.records)


def parse_sources(records: str) -> tuple[tuple[str, float | None], ...]:
    """ "DIR,DIR" or "DIR=WEIGHT,DIR=WEIGHT", taken apart. Raises `UserError` for a weight that is none."""
    return tuple(_source(part) for part in records.split(",")) if records else ()


def _source(text: str) -> tuple[str, float | None]:
    """ "DIR=WEIGHT" or "DIR", taken apart. A "=" that no number follows is part of the name, as in "size=48/". Raises
    `UserError` for a weight that is none."""
    folder, equals, weight = (part.strip() for part in text.rpartition("="))
    try:
        folder, value = (folder, float(weight or math.nan)) if equals else (weight, None)
    except ValueError:
        folder, value = text.strip(), None
    if not folder or not (value is None or 0 < value < math.inf):
        raise UserError(f"records: {text!r} is not a folder, or a folder and its weight (DIR=0.5), a positive number")
    return folder, value


@dataclass(frozen=True)
class MeshConfig:
    """Device counts along the mesh axes (`sharding`); one of them may be -1, "all that remain"."""

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class PreviousConfig:
    """The phase before, whose checkpoint this one starts from.

    Attributes:
      workdir: its workdir, or a model directory whose transformer takes the generator's place. Empty: there is none.
      weights: whether the generator starts from the trained weights or from their average.
      command: the config to run when that checkpoint is missing, for the message.
    """

    workdir: str = ""
    weights: Literal["online", "ema"] = "ema"
    command: str = ""


@dataclass(frozen=True)
class GuardConfig:
    """Keep the phase before when this one ends up worse on held-out clips.

    Attributes:
      enabled: whether the guard decides which weights the student is exported from, where it can judge: of a student
        that starts from the one of a phase before.
    """

    enabled: bool = True


@dataclass(frozen=True)
class Experiment:
    """A whole run.

    Attributes:
      name: the phase's name, for messages.
      method: `name` of a method and its hyper-parameters.
      optimizers: one for each trained role.
      networks: discriminator heads (`models.heads.HeadsConfig`), by role; empty when the method has none.
      steps: how long the run is.
      batch_size: clips a step, over all devices.
      accumulation: parts that a batch is processed in, one after the other, to save memory; the result is the same. -1
        makes parts of one clip a device (along `data` and `fsdp`).
      seed: root of all randomness.
      log_every: steps between two records of metrics.
      sample_every: steps between two previews; 0 makes none.
      score_every: steps between two scores of the student on held-out clips, before the first and after the last step
        too; 0 scores it as far as the guard needs, before the first and after the last step.
      score_clips: held-out clips of a mode (text-to-video and image-to-video) that are made for a score, at most.
      checkpoint_every: steps between two checkpoints.
      checkpoint_minutes: a checkpoint is made, too, after the update that runs when so many minutes have passed since
        the last one; 0 makes none.
      keep: how many checkpoints are kept.
      sample_steps: Euler steps of the teacher's previews.
      sample_guidance: guidance of the teacher's previews.
      sample_shift: shift of the teacher's time grid, and of a one-step student's where it is sampled in more.
      tracker: what gets metrics and previews besides the workdir: "wandb" or "trackio", packages to be installed.
      profile: "FROM:TO", steps (from 1, inclusive) that are profiled into `WORKDIR/profile` for XProf; empty for none.
    """

    name: str
    method: Mapping[str, Any]
    optimizers: Mapping[str, OptimizerConfig]
    steps: int
    batch_size: int
    accumulation: int = 1
    seed: int = 0
    log_every: int = 10
    sample_every: int = 0
    score_every: int = 0
    score_clips: int = 64
    checkpoint_every: int = 100
    checkpoint_minutes: float = 30.0
    keep: int = 2
    sample_steps: int = 50
    sample_guidance: float = 1.0
    sample_shift: float = 1.0
    tracker: Literal["none", "wandb", "trackio"] = "none"
    profile: str = ""
    networks: Mapping[str, Any] = field(default_factory=dict)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    previous: PreviousConfig = PreviousConfig()
    guard: GuardConfig = GuardConfig()

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "batch_size", "log_every", "checkpoint_every", "keep")
        _at_least(self, 1, "sample_steps", "score_clips")
        _at_least(self, 0, "sample_every", "score_every", "checkpoint_minutes")
        check_seed(self.seed)
        if self.accumulation < 1 and self.accumulation != -1:
            raise UserError(f"accumulation is {self.accumulation}, expected at least 1, or -1 for one clip at a time")
        if self.sample_shift <= 0:
            raise UserError(f"sample_shift is {self.sample_shift}, expected a positive number")


def parse(config: Mapping[str, Any] | ConfigDict) -> Experiment:
    """A config file's ConfigDict as an `Experiment`. Raises `UserError` for an unknown, missing or ill-typed key."""
    return build(Experiment, config.to_dict() if isinstance(config, ConfigDict) else config, "config")


def complete(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the defaults of `cls` filled in, recursively: a ConfigDict of them can be overridden in every key.

    Dataclasses become dicts. Fields that may be None become references without a type, so that None and a value can
    replace each other.
    """
    hints = typing.get_type_hints(cls)
    result = dict(values)
    for f in _fields(cls):
        if f.name not in values:
            if f.default is not dataclasses.MISSING:
                result[f.name] = f.default
            elif f.default_factory is not dataclasses.MISSING:
                result[f.name] = f.default_factory()
        if f.name in result:
            result[f.name] = _complete_value(hints[f.name], result[f.name])
    return result


def _complete_value(hint: Any, value: Any) -> Any:
    args = typing.get_args(hint)
    if types.NoneType in args:
        return FieldReference(value, field_type=object)
    if _is_dataclass(hint):
        given = value if isinstance(value, Mapping) else {f.name: getattr(value, f.name) for f in _fields(value)}
        return complete(hint, given)
    if isinstance(value, Mapping) and args:
        return {k: _complete_value(args[1], v) for k, v in value.items()}
    return float(value) if hint is float and type(value) is int else value


def _fields(cls: Any) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(cls) if f.init]


def build(cls: type, values: Mapping[str, Any], path: str) -> Any:
    """Builds a dataclass from a mapping of its fields, recursively.

    Raises:
      UserError: for a key that `cls` does not have (with the nearest one it has), a missing key, a wrong type, or a
        value that `cls` refuses.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in _fields(cls)}
    for key in values:
        if key not in fields:
            raise UserError(f"{path}.{key}: unknown key{nearest(key, fields)}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{path}.{name}: missing; expected {_describe(hints[name])}")
    converted = {k: _convert(hints[k], v, f"{path}.{k}") for k, v in values.items()}
    try:
        return cls(**converted)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def nearest(key: str, known: Iterable[str]) -> str:
    """The tail of an error message: the known key closest to `key`, or the list of all."""
    known = sorted(known)
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known) or 'none'}"


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if isinstance(hint, types.UnionType):
        if value is None and types.NoneType in args:
            return None
        *others, last = (choice for choice in args if choice is not types.NoneType)
        for choice in others:
            try:
                return _convert(choice, value, path)
            except UserError:
                continue
        return _convert(last, value, path)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{path}: {value!r} is not one of {', '.join(map(repr, args))}")
        return value
    if _is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return build(hint, value, path)
    elif origin is tuple and isinstance(value, (list, tuple)):
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(inner) != len(value):
            raise UserError(f"{path}: expected {len(inner)} values, found {len(value)}")
        return tuple(_convert(h, v, f"{path}[{i}]") for i, (h, v) in enumerate(zip(inner, value, strict=True)))
    elif origin is not None and isinstance(value, Mapping) and issubclass(origin, Mapping):
        return {k: _convert(args[1], v, f"{path}.{k}") for k, v in value.items()}
    elif hint is bool or isinstance(value, bool):
        if hint is bool and isinstance(value, bool):
            return value
    elif hint is float:
        if isinstance(value, (int, float)) and math.isfinite(value):
            return float(value)
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise UserError(f"{path}: expected {_describe(hint)}, found {value!r}")


def _is_dataclass(hint: Any) -> TypeGuard[type]:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
