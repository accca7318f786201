"""Converts an `ml_collections` config to frozen dataclasses, once and strictly.

`parse` is the only place where a ConfigDict meets the code: every key must be known, must be present if it has no
default, and must have the right type. A misspelt key gives a one-line error that names it and the closest known key.
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
    """The optimizer of one role.

    Attributes:
      learning_rate: peak learning rate.
      algorithm: "adam" or "rmsprop".
      b1, b2: decay rates of Adam's first and second moment, in [0, 1).
      rms_decay: decay rate of RMSProp's second moment, in [0, 1); there is no bias correction.
      eps: added to the denominator (the square root of the second moment), for either algorithm.
      weight_decay: decoupled weight decay: an update subtracts learning_rate x weight_decay x weight.
      clip_norm: global gradient norm above which gradients are scaled down; 0 disables clipping.
      warmup_steps: updates over which the learning rate rises linearly from 0; 0 for no warm-up.
      decay_steps: updates of a cosine decay to 0 after the warm-up; 0 keeps the learning rate constant.
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
    """Where weights come from, and how the networks are computed.

    Attributes:
      path: the pretrained model: a model directory in any supported layout, or OWNER/NAME on the Hugging Face hub;
        "tiny" is the embedded model. This and every other path of a config is relative to the current folder, except
        that "{workdir}/..." is relative to the run's workdir.
      lora: LoRA files, `FILE,FILE` or `FILE:STRENGTH,FILE:STRENGTH`, merged in float32 into the model directory's
        transformer for every role that starts from it. Empty for none.
      preset: sizes of the parts that start from random weights (a key of `vpae_jax.models.presets.PRESETS`).
      dtype: compute precision of the networks; trained weights are always stored in float32.
      frozen_dtype: storage precision of weights that are not trained.
      remat: what the backward pass recomputes in the transformer's blocks, to save memory: "none"; "dots", everything
        but the products of activations with weights; "attention", everything but self-attention; "full", everything;
        "offload", everything, with the blocks' inputs kept in host memory.
      image_encoder: the image encoder of a discriminator on pixels: a model directory, as for `path`, or "KIND:PATH"
        (KIND is a key of `vpae_jax.run.image_encoders.KINDS`). Empty for that of `path`.
      init_scale: factors on the random initial weights of a transformer, by regular expressions on parameter paths.
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
    """The training data: records, or a folder of videos, or (if both are empty) rendered digits.

    Attributes:
      clips: number of distinct clips of rendered digits; unused with `records` or `videos`.
      seed: seed of the rendered digits.
      folder: folder in which clips encoded before a run (digits, or `videos`) are kept and reused by later runs.
      workers: processes that prepare batches; 0 uses threads of the training process, which is enough for records.
      records: folders of latent records to train on, "DIR,DIR" or "DIR=WEIGHT,DIR=WEIGHT"; each is a path or an
        address in an object store, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER. Weights are the relative shares of
        training clips from each folder; without weights, all clips are seen equally often.
      videos: a folder of captioned videos to encode before the run, at the model's own size. Empty for none.
      max_bad: maximum tolerated fraction of corrupt records, in [0, 1); with more, the run stops.
      held_out: clips of each folder that are never trained on but used for previews, scores, the guard and `evaluate`;
        at most a fifth of the folder. If a video gave several clips, some may be on either side.
      held_out_records: separate folders of records to use as held-out clips, as in `records` but without weights;
        then nothing is held out of the training folders.
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
            raise UserError(
                "held_out_records is given without records or videos; leave it out, rendered digits have their own"
            )
        if any(weight is not None for _, weight in parse_sources(self.held_out_records)):
            raise UserError(f"held_out_records is {self.held_out_records!r}; give folders without weights")

    @property
    def sources(self) -> tuple[tuple[str, float | None], ...]:
        """The folders of `records`, each with its weight; None where it has none."""
        return parse_sources(self.records)


def parse_sources(records: str) -> tuple[tuple[str, float | None], ...]:
    """Parses "DIR,DIR" or "DIR=WEIGHT,DIR=WEIGHT". Raises `UserError` for an invalid weight."""
    return tuple(_source(part) for part in records.split(",")) if records else ()


def _source(text: str) -> tuple[str, float | None]:
    """Parses "DIR=WEIGHT" or "DIR". An "=" that is not followed by a number is part of the name, as in "size=48/".
    Raises `UserError` for an invalid weight."""
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
    """Numbers of devices along the axes of the mesh (`vpae_jax.sharding`).

    Attributes:
      data: devices along the data-parallel axis; weights are replicated along it.
      fsdp: devices over which clips are divided and weights are sharded; -1, which one axis may have, means all
        remaining devices.
      context: devices over which the tokens of a clip are divided; weights are sharded over these, too.
      tensor: devices over which attention heads and hidden units are divided.
    """

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class PreviousConfig:
    """The previous phase, from whose checkpoint this one starts.

    Attributes:
      workdir: workdir of the previous phase, or a model directory whose transformer is taken instead. Empty for none.
      weights: whether to start from that phase's trained weights ("online") or from their average ("ema").
      command: the command for the previous phase, shown in the error message if its checkpoint is missing.
    """

    workdir: str = ""
    weights: Literal["online", "ema"] = "ema"
    command: str = ""


@dataclass(frozen=True)
class GuardConfig:
    """Exports the weights a phase started from if it ends up worse on held-out clips.

    Attributes:
      enabled: whether the guard decides which weights are exported. It only applies to students that start from the
        student of a previous phase.
    """

    enabled: bool = True


@dataclass(frozen=True)
class Experiment:
    """A whole run: one phase of training.

    Attributes:
      name: name of the phase, used in messages.
      method: `name` of a method and its hyper-parameters.
      optimizers: one optimizer per trained role.
      networks: discriminator heads (`models.heads.HeadsConfig`) by role; empty if the method has none.
      steps: training steps in total.
      batch_size: clips per batch, over all devices; every update draws its own batch.
      accumulation: number of parts into which a batch is split, processed one after the other to save memory; the
        result is the same. -1 splits it into parts of one clip per device (along `data` and `fsdp`).
      seed: seed of all randomness in the run, including the order of clips.
      log_every: steps between two records of metrics.
      sample_every: steps between two previews; 0 disables previews.
      score_every: steps between two scores of the student on held-out clips, including before the first and after the
        last step. With 0 it is scored only if the guard needs it, before the first and after the last step.
      score_clips: maximum number of held-out clips generated per mode (text-to-video, image-to-video) for a score.
      checkpoint_every: steps between two checkpoints.
      checkpoint_minutes: also write a checkpoint after the current update once this many minutes have passed since the
        last one; 0 disables this.
      keep: number of checkpoints to keep.
      sample_steps: Euler steps of the teacher's previews.
      sample_guidance: guidance of the teacher's previews; 1 for none.
      sample_shift: shift of the teacher's time grid, and of a one-step student's when it is sampled in several steps.
      tracker: experiment tracker that also gets metrics and previews: "none", "wandb" or "trackio" (to be installed).
      profile: steps "FROM:TO" (from 1, both included) to profile into `WORKDIR/profile` for XProf; empty for none.
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
    """Converts a config to an `Experiment`. Raises `UserError` for an unknown, missing or ill-typed key."""
    return build(Experiment, config.to_dict() if isinstance(config, ConfigDict) else config, "config")


def complete(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `values` with the defaults of `cls` filled in recursively, so that every key of the resulting ConfigDict
    can be overridden.

    Dataclasses become dicts. Fields that may be None become untyped references, so that None and a value can replace
    each other.
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

    Args:
      path: where the mapping is in the config, for messages.

    Raises:
      UserError: for a key that `cls` does not have (naming the closest one it has), a missing key, a wrong type, or a
        value that `cls` rejects.
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
    """Returns the end of an error message: the known key closest to `key`, or the list of all."""
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
