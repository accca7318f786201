"""What a training method is: roles, views, updates, a student, and pure losses over networks.

A method is a frozen dataclass whose fields are the paper's hyper-parameters. It does not depend on any model, optimizer
or file:

    roles     sets of weights: where each starts, whether it is trained, which averages of it are kept
    views     networks that the losses call: a role's weights, an average of them, adapters at some scale
    updates   what is trained in each step, in order: one or more roles, by one loss
    student   which network, or pair of experts, is the result, and how it is sampled

A loss receives all networks as callables already bound to their weights, so it can be tested against a Gaussian whose
velocity is known in closed form:

    loss(nets, batch, context) -> (loss of each clip [b], metrics)

`nets` maps the name of every view to its network. Each role is a view under its own name, each average of a role is one
under `<role>_<average>`, and the method's `views` are added to these. Gradients are taken only with respect to the
roles that the update trains.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from vpae_jax.flow.chunks import Chunks
from vpae_jax.flow.rollout import Recurrent
from vpae_jax.flow.sampler import ONE_STEP, Sampler
from vpae_jax.types import (
    Condition,
    Features,
    FrameTimes,
    Latents,
    Memory,
    Metrics,
    PerExample,
    PRNGKey,
    Times,
    UserError,
    Video,
    pytree,
)

EMA = "ema"  # the usual name of the only average of a role
Nets = Mapping[str, Any]


@pytree
class SharedClips:
    """Generated clips that several updates learn from.

    Attributes:
      x0: the clips, float32.
      images: the keys by which images were withheld from them.
    """

    x0: Latents
    images: PRNGKey


@pytree
class Context:
    """What a loss receives besides networks and batch.

    Attributes:
      step: completed steps.
      clips: one key for each clip, from which everything drawn for the clip comes (`flow.draws`).
      batch: one key for the whole batch, for draws that its clips share: an exit step, a phase.
      made: the clips to learn from, if the update has `Update.makes` or follows one that has; None for a loss that
        generates its own.
    """

    step: Int[Array, ""]
    clips: PRNGKey
    batch: PRNGKey
    made: SharedClips | None = None


LossFn = Callable[[Nets, Any, Context], tuple[PerExample, Metrics]]
MakeFn = Callable[[Nets, Any, Context], SharedClips]


@runtime_checkable
class Velocity(Protocol):
    """A flow network: maps noisy latents at timestep t in [0, 1] (1 = noise) to the velocity v = eps - x0."""

    def __call__(self, x: Latents, t: Times, condition: Condition) -> Latents: ...


@runtime_checkable
class FeatureExtractor(Protocol):
    """The features that discriminator heads read of a clip in latents: a network's hidden states after the blocks
    `taps`, counted from 1."""

    def features(self, x: Latents, t: Times, condition: Condition, taps: tuple[int, ...]) -> Features:
        """Only the hidden states; the forward pass stops at the last tapped block."""
        ...


@runtime_checkable
class Backbone(Velocity, FeatureExtractor, Protocol):
    """A flow network whose hidden states can be read."""

    def velocity_and_features(
        self, x: Latents, t: Times, condition: Condition, taps: tuple[int, ...]
    ) -> tuple[Latents, Features]:
        """Both from one forward pass."""
        ...


@runtime_checkable
class Reader(Backbone, Protocol):
    """A backbone whose last layer can be applied to the hidden states of any block."""

    def readings(self, features: Features, x: Latents, t: Times) -> tuple[Latents, ...]:
        """The network's last layer applied to each tap's hidden states: the velocity at (x, t) if the tapped block were
        the last one."""
        ...


@runtime_checkable
class CausalNetwork(Recurrent, Protocol):
    """A causal velocity network on chunks of latent frames (`models.wan_causal.CausalWan`)."""

    def __call__(self, x: Latents, t: FrameTimes, condition: Condition) -> Latents:
        """The velocity of a clip with a timestep for each frame; a chunk sees the earlier ones as they are in `x`."""
        ...

    def recall(self, x: Latents, t: FrameTimes, condition: Condition, past: Memory) -> Latents:
        """The velocity of a clip; each chunk sees itself, and earlier frames from the memory of a whole clip."""
        ...

    def remember(self, x: Latents, t: FrameTimes, condition: Condition) -> Memory:
        """The memory of a whole clip."""
        ...


@runtime_checkable
class CausalBackbone(Backbone, Protocol):
    """A backbone that can also be evaluated as a causal network."""

    def causal(self, chunks: Chunks) -> CausalNetwork:
        """The same weights, for clips in chunks."""
        ...


@runtime_checkable
class FrameDecoder(Protocol):
    """A video autoencoder that can decode a few frames of a clip."""

    def decode_at(self, latents: Latents, frame: Int[Array, ""]) -> Video:
        """The first video frame and those of latent frame `frame`, in [-1, 1] (`models.wan_vae`)."""
        ...


@runtime_checkable
class PixelEncoder(Protocol):
    """A network that reads pixels."""

    def features(self, video: Video, place: Float[Array, ""], taps: tuple[int, ...]) -> Features:
        """Hidden states after the blocks `taps`, counted from 1.

        Args:
          video: frames of clips, in [-1, 1], of any size.
          place: position of the square crop along the longer edge, from 0 (top or left) to 1.
        """
        ...


@runtime_checkable
class Heads(Protocol):
    """Discriminator heads: map hidden states to k logits per clip, high for real.

    Attributes:
      taps: blocks of the backbone whose hidden states they read, counted from 1.
    """

    @property
    def taps(self) -> tuple[int, ...]: ...

    def __call__(self, features: Features) -> Float[Array, "b k"]: ...


@dataclass(frozen=True)
class Adapters:
    """Low-rank weights added to those of another role (LoRA, 2106.09685).

    Attributes:
      on: the role whose linear layers they adapt, frozen or trained.
      rank: of each pair of matrices.
      alpha: numerator of their scale, alpha / rank.
      targets: regular expression that is searched in the paths of linear layers to select those that get adapters; None
        selects all attention and feed-forward layers of the blocks.
    """

    on: str
    rank: int
    alpha: float
    targets: str | None = None


@dataclass(frozen=True)
class Average:
    """An exponential moving average of a role's weights, in float32.

    Attributes:
      decay: weight of the old average in each update, in [0, 1].
      start: the step from which it averages; before that it equals the weights.
    """

    decay: float
    start: int = 0


def averages(decay: float, others: Sequence[float] = ()) -> dict[str, Average]:
    """A role's averages: the usual one, or none at a decay of 0; and others, called "ema_DECAY"."""
    return ({EMA: Average(decay)} if decay else {}) | {f"{EMA}_{other:g}": Average(other) for other in others}


@dataclass(frozen=True)
class Role:
    """One set of weights in memory.

    Attributes:
      start: where they come from: "pretrained" (the model directory), "fresh" (random; adapters then start
        without effect), "previous" (the role of the same name in the checkpoint of the phase before) or
        "previous:<role>".
      trains: whether they are trained. Frozen weights are in no optimizer and no checkpoint.
      part: which part of a model directory they are, or "heads". Heads read the hidden states of the image encoder if
        the method has such a role, otherwise those of a transformer.
      outputs: for heads: number of logits in place of each single one, varying fastest in what the heads return.
      adapters: given if the role consists only of low-rank weights on another role.
      averages: by name.
    """

    start: str
    trains: bool = False
    part: Literal["transformer", "heads", "vae", "decoder", "encoders", "image_encoder"] = "transformer"
    outputs: int = 1
    adapters: Adapters | None = None
    averages: Mapping[str, Average] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kind, _, name = self.start.partition(":")
        if kind not in ("pretrained", "fresh", "previous") or (name and kind != "previous"):
            raise UserError(f"Role.start is {self.start!r}, expected pretrained, fresh, previous or previous:<role>")

    def previous(self, name: str) -> str | None:
        """The role of the phase before that this one, called `name`, starts from; None for another start."""
        kind, _, other = self.start.partition(":")
        return (other or name) if kind == "previous" else None


@dataclass(frozen=True)
class View:
    """A network that losses call.

    Attributes:
      role: the role whose weights it has; a role of adapters is applied to the role that they adapt.
      average: name of an average to use instead of the weights.
      scale: for adapters, a factor on alpha / rank; 0 is the network without them.
      constant: never differentiated, not even in an update that trains the role.
    """

    role: str
    average: str | None = None
    scale: float = 1.0
    constant: bool = False


@dataclass(frozen=True)
class Update:
    """One optimizer update: one loss that trains one or more roles, each with its own optimizer.

    Attributes:
      trains: the roles whose weights change.
      loss: the pure loss; see the module's docstring.
      every: number of steps between two runs, counted from `starts`.
      repeats: number of consecutive runs in a step, each on a batch of its own.
      starts: the first step on which it runs (a discriminator's warm-up delays the generator).
      delay: the method's field that `starts` comes from, for messages.
      followers: other trained roles that move towards the trained one after each update: by name, the fraction of their
        own weights that they keep, in [0, 1).
      ends: the first step on which it no longer runs; None for never.
      makes: generates the clips that this update and those of `then` learn from. Only this update differentiates them.
      then: updates that follow in the same program, on the same batch and the same clips, which are constants to them.
        Only their `trains`, `loss`, `repeats` (each with draws of its own) and `followers` are used.
    """

    trains: tuple[str, ...]
    loss: LossFn
    every: int = 1
    repeats: int = 1
    starts: int = 0
    delay: str = ""
    followers: Mapping[str, float] = field(default_factory=dict)
    ends: int | None = None
    makes: MakeFn | None = None
    then: tuple[Update, ...] = ()

    @property
    def name(self) -> str:
        """The roles, for metrics and messages: "fake_score+heads"."""
        return "+".join(self.trains)

    @property
    def program(self) -> tuple[Update, ...]:
        """This update and those that follow it in its program."""
        return self, *self.then


@dataclass(frozen=True)
class Student:
    """The result of a method: a network, or two experts for two ranges of timesteps, and how it is sampled.

    Attributes:
      view: the network; with two experts, the one for timesteps from `boundary` on.
      sampler: solver, timesteps and guidance.
      average: the average that is scored and exported instead of the weights; None for the weights themselves. With two
        experts it applies to those that keep one.
      low: the view of the expert for timesteps below `boundary`; None for a single network.
      boundary: see `low`.
    """

    view: str = "generator"
    sampler: Sampler = ONE_STEP
    average: str | None = EMA
    low: str | None = None
    boundary: float = 0.0


class Method(ABC):
    """A training method. Implementations are frozen dataclasses.

    Previews show a role called "teacher" next to the student.

    Attributes:
      batch: type of its training data: `Batch`, `PixelBatch` or `CaptionedFrames`.
      whole_batch: whether its loss compares the clips of a batch with each other, so that a batch cannot be processed
        in parts.
      known_noise: whether it needs `Batch.seed`: clips that a teacher generated, with the noise that they started from.
    """

    batch: ClassVar[type]
    whole_batch: ClassVar[bool] = False
    known_noise: ClassVar[bool] = False

    @property
    def without_clips(self) -> Mapping[str, Any] | None:
        """Values of its fields with which no loss reads a real clip, so that it can train on prompts only; None if its
        equations always contain real clips."""
        return None

    @property
    def needs_clips(self) -> bool:
        """Whether it trains on real clips (`Batch.latents`), given the values of its fields."""
        values = self.without_clips
        return values is None or any(getattr(self, name) != value for name, value in values.items())

    @property
    @abstractmethod
    def roles(self) -> Mapping[str, Role]: ...

    @property
    @abstractmethod
    def updates(self) -> tuple[Update, ...]: ...

    @property
    def views(self) -> Mapping[str, View]:
        """Networks in addition to each role and each of its averages."""
        return {}

    @property
    def student(self) -> Student | None:
        """None for a method that trains no generator."""
        return None


def all_views(method: Method) -> dict[str, View]:
    """Every network of a method by name: its roles, their averages, and its own views."""
    views = {name: View(name) for name in method.roles}
    for name, role in method.roles.items():
        views |= {f"{name}_{average}": View(name, average) for average in role.averages}
    return views | dict(method.views)
