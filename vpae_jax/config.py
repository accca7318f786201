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

from ml_collections import ConfigDict

from vpae_jax.types import UserError


@dataclass(frozen=True)
class OptimizerConfig:
    """One role's optimizer.

    Attributes:
      learning_rate: peak step size.
      algorithm: "adam" (with decoupled decay if `weight_decay` is set) or "rmsprop".
      b1, b2, eps: Adam's moments' decays and its denominator's guard; RMSProp uses `b2` as its decay.
      weight_decay: decoupled weight decay.
      clip_norm: global gradient norm above which gradients are scaled down; 0 switches clipping off.
      warmup_steps: updates over which the step size rises linearly from 0.
      decay_steps: updates at the end of a cosine decay to zero; 0 keeps the step size constant.
    """

    learning_rate: float
    algorithm: Literal["adam", "rmsprop"] = "adam"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 10.0
    warmup_steps: int = 0
    decay_steps: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """Where weights come from and how they run.

    Attributes:
      path: model directory in the Diffusers layout; "tiny" is the embedded one; relative to the workdir's
        parent when it starts with "../".
      preset: sizes of the parts that start from random weights (a key of `vpae_jax.models.presets.PRESETS`).
      dtype: compute precision; trained weights are float32 always.
      frozen_dtype: storage precision of weights that are not trained.
      remat: what the backward pass recomputes of the transformer's blocks: nothing, all but the products of
        activations with weights ("dots"), or everything.
      init_scale: for a transformer that starts from random weights, factors on the parameters whose paths match.
    """

    path: str = "tiny"
    preset: str = "tiny"
    dtype: Literal["float32", "bfloat16"] = "float32"
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    init_scale: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    Attributes:
      kind: "latents" (encoded clips), "pixels" (videos, for the VAE) or "captions" (frames and captions, for the
        encoders).
      clips: how many distinct clips are rendered.
      seed: decides the clips and their order.
      folder: where encoded clips are kept between runs; relative to the workdir's parent when it starts with "../".
      workers: processes that prepare batches; 0 prepares them in the training process.
    """

    kind: Literal["latents", "pixels", "captions"] = "latents"
    clips: int = 2048
    seed: int = 0
    folder: str = "../data"
    workers: int = 0


@dataclass(frozen=True)
class MeshConfig:
    """Device counts along the mesh axes; one of them may be -1, "all that remain"."""

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class PreviousConfig:
    """The phase before, whose checkpoint this one starts from.

    Attributes:
      workdir: its workdir; relative to this run's workdir when it starts with "../". Empty: there is none.
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
      enabled: whether the guard decides which weights the student is exported from.
      clips: held-out clips a mode (text-to-video and image-to-video) that are generated to score the weights.
      every: steps between scores; the last step is always scored.
    """

    enabled: bool = False
    clips: int = 128
    every: int = 0


@dataclass(frozen=True)
class Experiment:
    """A whole run.

    Attributes:
      name: the phase's name; also the default workdir's.
      method: `name` of a method and its hyper-parameters.
      optimizers: one for each trained role.
      heads: discriminator heads (`models.heads.HeadsConfig`); empty when the method has none.
      steps, batch_size, seed: length, clips a step over all devices, root of all randomness.
      log_every, sample_every, checkpoint_every: intervals in steps.
      keep: how many checkpoints are kept.
      sample_guidance: guidance of the teacher's sampled clips.
      sample_shift: shift of the teacher's time grid.
      generator_nfe: network evaluations of the sampled generator (50 for a teacher being trained).
    """

    name: str
    preset: str
    method: Mapping[str, Any]
    optimizers: Mapping[str, OptimizerConfig]
    steps: int
    batch_size: int
    seed: int = 0
    log_every: int = 10
    sample_every: int = 0
    checkpoint_every: int = 100
    keep: int = 2
    sample_guidance: float = 1.0
    sample_shift: float = 1.0
    generator_nfe: int = 1
    heads: Mapping[str, Any] = field(default_factory=dict)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    previous: PreviousConfig = PreviousConfig()
    guard: GuardConfig = GuardConfig()


def parse(config: Mapping[str, Any] | ConfigDict) -> Experiment:
    """A config file's ConfigDict as an `Experiment`. Raises `UserError` for an unknown, missing or ill-typed key."""
    values = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    return build(Experiment, values, "config")


def complete(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the defaults of `cls` filled in, recursively, so that a command line can override every key.

    Dataclasses become dicts; where a field may hold one of several, its class is kept under "kind".
    """
    hints = typing.get_type_hints(cls)
    result = dict(values)
    for f in dataclasses.fields(cls):
        if f.init and f.name not in values:
            if f.default is not dataclasses.MISSING:
                result[f.name] = f.default
            elif f.default_factory is not dataclasses.MISSING:
                result[f.name] = f.default_factory()
        if f.name in result:
            result[f.name] = _complete_value(hints[f.name], result[f.name])
    return result


def _complete_value(hint: Any, value: Any) -> Any:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    choices = [a for a in (typing.get_args(hint) if union else (hint,)) if _is_dataclass(a)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        chosen, value = type(value), {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    elif choices and isinstance(value, Mapping):
        value = dict(value)
        kind = value.pop("kind", choices[0].__name__)
        chosen = next((c for c in choices if c.__name__ == kind), None)
        if chosen is None:
            return {"kind": kind, **value}
    elif isinstance(value, Mapping) and typing.get_args(hint):
        inner = typing.get_args(hint)[1]
        return {k: _complete_value(inner, v) for k, v in value.items()}
    else:
        return value
    kind = {"kind": chosen.__name__} if len(choices) > 1 else {}
    return {**kind, **complete(chosen, value)}


def build(cls: type, values: Mapping[str, Any], path: str) -> Any:
    """Builds a dataclass from a mapping of its fields, recursively.

    Raises:
      UserError: for a key that `cls` does not have (with the nearest one it has), a missing key, or a wrong type.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in values:
        if key not in fields:
            raise UserError(f"{path}.{key}: unknown key{nearest(key, fields)}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{path}.{name}: missing; expected {_describe(hints[name])}")
    return cls(**{k: _convert(hints[k], v, f"{path}.{k}") for k, v in values.items()})


def nearest(key: str, known: Iterable[str]) -> str:
    """The tail of an error message: the known key closest to `key`, or the list of all."""
    known = sorted(known)
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, path, hint)
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


def _convert_union(args: tuple, value: Any, path: str, hint: Any) -> Any:
    if value is None and type(None) in args:
        return None
    choices = {a.__name__: a for a in args if _is_dataclass(a)}
    if choices and isinstance(value, Mapping):
        rest = {k: v for k, v in value.items() if k != "kind"}
        kind = value.get("kind", next(iter(choices)) if len(choices) == 1 else None)
        if kind not in choices:
            raise UserError(f"{path}.kind: {kind!r} is not one of {', '.join(choices)}")
        return build(choices[kind], rest, path)
    for arg in args:
        try:
            return _convert(arg, value, path)
        except UserError:
            continue
    raise UserError(f"{path}: expected {_describe(hint)}, found {value!r}")


def _is_dataclass(hint: Any) -> TypeGuard[type]:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
