"""What a training method is: roles, updates, and pure losses over callables.

A method is a frozen dataclass whose fields are the paper's hyper-parameters. It names the networks that take part
(`roles`) and, in order, what is trained each step (`updates`). Its losses receive networks as callables already bound
to their weights, so a loss can be tested against a Gaussian whose velocity is known in closed form, and no method
knows of models, optimizers or files.

    loss(trainable, others, batch, key) -> (per-example loss [b], metrics)

`trainable` is the network of the role being trained and is the only one that the step differentiates. `others` maps
every role's name to its network as a constant, `"<role>_ema"` to the same network with its averaged weights for each
role that keeps an average, and `"step"` to the number of completed steps. `key` is one key for each clip, from which
all that is drawn for the clip comes (`flow.draws`), or one key for all, which is folded with their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from vpae_jax.types import Condition, Features, Latents, Metrics, PerExample, Times

LossFn = Callable[[Any, Mapping[str, Any], Any, Any], tuple[PerExample, Metrics]]


@runtime_checkable
class Velocity(Protocol):
    """A flow network: noisy latents at time t in [0, 1] (1 = noise) to the velocity v = eps - x0."""

    def __call__(self, x: Latents, t: Times, condition: Condition) -> Latents: ...


@runtime_checkable
class Backbone(Velocity, Protocol):
    """A flow network whose hidden states can be read; the forward pass stops at the last tapped block."""

    def features(self, x: Latents, t: Times, condition: Condition) -> Features: ...


@runtime_checkable
class Head(Protocol):
    """Discriminator heads: hidden states to one logit a clip, high for real."""

    def __call__(self, features: Features) -> PerExample: ...


@dataclass(frozen=True)
class Role:
    """One network of a method.

    Attributes:
      init: where its weights come from: "pretrained" (the model directory), "fresh" (random), or "previous" (the
        checkpoint of the phase before, which must hold a role of the same name).
      trains: which of its weights are trained: all, only its low-rank adapters, or none.
      model: which part of the pipeline it is.
      lora_rank: rank of the adapters when `trains` is "lora".
      lora_alpha: numerator of the adapters' scale alpha / rank.
      ema: decay of the float32 average of its weights; None keeps no average.
      base: for adapters, the frozen role whose weights they sit on.
    """

    init: Literal["pretrained", "fresh", "previous"]
    trains: Literal["all", "lora", "none"] = "none"
    model: Literal["transformer", "heads", "vae", "encoders"] = "transformer"
    lora_rank: int = 0
    lora_alpha: float = 0.0
    ema: float | None = None
    base: str | None = None


@dataclass(frozen=True)
class Update:
    """One optimizer update of one role.

    Attributes:
      trains: the role whose weights change.
      loss: the pure loss; see the module's docstring.
      every: it runs every so many steps, counted from `starts`.
      repeats: how many times in a row it runs, each on fresh noise.
      starts: the first step on which it runs (a discriminator's head start delays the generator).
    """

    trains: str
    loss: LossFn
    every: int = 1
    repeats: int = 1
    starts: int = 0


@runtime_checkable
class Method(Protocol):
    """A training method. Implementations are frozen dataclasses.

    A role called "generator" is what is sampled, scored and exported; one called "teacher" is shown beside it.

    Attributes:
      batch: what it trains on: `Batch`, `PixelBatch` or `CaptionedFrames`.
    """

    batch: ClassVar[type]

    @property
    def roles(self) -> Mapping[str, Role]: ...

    @property
    def updates(self) -> tuple[Update, ...]: ...
