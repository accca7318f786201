"""Bases of the methods that make a generator out of a frozen teacher.

    Distillation             a generator (`methods/generator.py`) that starts from the teacher, or from the phase before
    TaughtDistillation       adds a second network that learns from the generator's clips
    FakeScoreDistillation    the second network is a fake score, which follows the distribution of these clips
    FewStepDistillation      a generator of one or several steps, trained at the timesteps at which it is sampled

A student of N steps predicts a clip at each of its timesteps 1 = t_0 > ... > t_{N-1} and re-noises it to the next one
(`flow.solvers.consistency`). *Backward simulation* (DMD2, 2405.14867, section 4.5) trains it on its own trajectory:

    z_0     = eps_0
    z_{k+1} = (1 - t_{k+1}) x0(sg theta, z_k, t_k) + t_{k+1} eps_{k+1}         k < i, with i uniform in 0 ... N-1
    clip    = x0(theta, z_i, t_i)                                              the only differentiated evaluation

All clips of a batch share i. The simpler alternative replaces z_i by a noised real clip, with an i for each clip.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient
from jaxtyping import Float, Int

from vpae_jax.flow import draws
from vpae_jax.flow.sampler import Sampler
from vpae_jax.flow.schedule import add_noise
from vpae_jax.flow.times import TimeDistribution
from vpae_jax.methods.base import Adapters, Context, Nets, Role, SharedClips, Student, Update, View
from vpae_jax.methods.common import (
    Step,
    check_at_least,
    check_choice,
    drop_conditions,
    named_keys,
    predict_x0,
    real_clips,
)
from vpae_jax.methods.generator import GeneratorTraining
from vpae_jax.methods.scores import SCORE_TIMES, DistributionMatching
from vpae_jax.types import Batch, Latents, PRNGKey, Times, UserError

MATCHING = DistributionMatching()


@dataclass(frozen=True)
class Distillation(GeneratorTraining):
    """A method whose role "generator" is distilled from its role "teacher"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(type(self).__name__, {"init": ("pretrained", "previous")}, self)

    def sampled_in(self, steps: int, shift: float) -> Student:
        """The generator as a student of one Euler step, or of several steps that each predict a clip and re-noise it.

        The timesteps are evenly spaced on the raw axis of this shift.
        """
        return self.sampled_by(Sampler.even(steps, shift, solver="consistency" if steps > 1 else "euler"))

    def drop_images(self, batch: Batch, key: PRNGKey) -> Batch:
        """The batch with images and first frames withheld at random."""
        if self.image_dropout == 0:
            return batch
        return replace(batch, condition=drop_conditions(batch, key, 0.0, self.image_dropout))


@dataclass(frozen=True)
class TaughtDistillation(Distillation):
    """A method in which another network, the learner, is trained on the generator's clips.

    Attributes:
      clips: which clips the learner is trained on. "own": the generator makes new ones in each of its updates, for a
        batch of its own. "generator": those of the generator's update, in the same program, with timesteps and noise
        drawn anew in each of the learner's updates. The generator's update then comes first, so that the clips are one
        update old, and a step takes one batch. `docs/methods/less_work.md` has the cost.
    """

    clips: Literal["own", "generator"] = "own"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(type(self).__name__, {"clips": ("own", "generator")}, self)

    @abstractmethod
    def generate(self, nets: Nets, batch: Batch, context: Context, key: PRNGKey) -> Latents:
        """Generates clips, float32.

        Args:
          key: for per-clip draws.
        """

    def make(self, nets: Nets, batch: Batch, context: Context) -> SharedClips:
        """Generates the clips that several updates share."""
        own = draws.numbered(context.clips, jnp.full(1, 2**32 - 1, jnp.uint32))[0]  # the losses split the clips' keys
        keys = named_keys(own, "images", "generate")
        return SharedClips(
            self.generate(nets, self.drop_images(batch, keys.images), context, keys.generate), keys.images
        )

    def with_clips(
        self, batch: Batch, context: Context, images: PRNGKey, make: Callable[[Batch], Latents]
    ) -> tuple[Batch, Latents]:
        """The batch with images withheld, and clips for it: the shared ones, or else those that `make` generates.

        Args:
          images: key that decides which images are withheld from the clips of `make`.
        """
        if context.made is not None:
            return self.drop_images(batch, context.made.images), context.made.x0
        batch = self.drop_images(batch, images)
        return batch, make(batch)

    def ordered_updates(self, learner: Update, generator: Update) -> tuple[Update, ...]:
        """The updates of a step: the learner's, then the generator's; or the generator's, followed by the learner's."""
        if self.clips == "own":
            return learner, generator
        both = replace(generator, makes=self.make, then=(learner,))
        return (replace(learner, ends=generator.starts), both) if generator.starts else (both,)


@dataclass(frozen=True)
class FakeScoreDistillation(TaughtDistillation):
    """A method that matches distributions with a role "fake_score", which is trained on the generator's clips.

    Attributes:
      matching: the distribution-matching gradient.
      fake_rank, fake_scale: rank of the fake score's adapters, if it has any, and alpha / rank.
      fake_loss: space of the fake score's error.
      fake_t: distribution of t' in the fake score's loss.
      fake_updates: updates of the fake score per update of the generator.
    """

    matching: DistributionMatching = MATCHING
    fake_rank: int = 128
    fake_scale: float = 0.5
    fake_loss: Literal["velocity", "x0"] = "velocity"
    fake_t: TimeDistribution = SCORE_TIMES
    fake_updates: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        check_choice(owner, {"fake_loss": ("velocity", "x0")}, self)
        check_at_least(owner, 1, fake_rank=self.fake_rank, fake_updates=self.fake_updates)

    def fake_score_role(self, kind: Literal["lora", "full"]) -> Role:
        """The role "fake_score": adapters on the teacher, which have no effect at first, or a copy of it."""
        if kind == "full":
            return Role("pretrained", True)
        return Role("fresh", True, adapters=Adapters("teacher", self.fake_rank, self.fake_rank * self.fake_scale))

    def aligned(self, kind: Literal["lora", "full"], ida: float) -> Mapping[str, float]:
        """Implicit distribution alignment (SenseFlow, 2506.00523), as `Update.followers`.

        After each update of the generator, the fake score is moved towards it and keeps a fraction `ida` of its own
        weights.

        Raises:
          UserError: `ida` is not in [0, 1), or the two networks differ in shape.
        """
        owner = type(self).__name__
        if not 0 <= ida < 1:
            raise UserError(f"{owner}.ida is {ida}, expected a fraction below 1 (SenseFlow's is 0.97), or 0 for none")
        if not ida:
            return {}
        for name, value in {"fake": kind, "generator": self.generator}.items():
            if value != "full":
                raise UserError(
                    f"{owner}.ida is {ida}, but {name} is {value!r}: only whole networks move towards each other; set "
                    f"{name}='full', or ida=0"
                )
        return {"fake_score": ida}


@dataclass(frozen=True)
class FewStepDistillation(Distillation):
    """A distillation whose generator makes a clip in one evaluation or a few.

    Attributes:
      steps, shift: evaluations of the student, at timesteps that are evenly spaced on the raw axis of this shift.
      inputs: what the generator denoises in training, at one of those timesteps. "simulated": what it meets there when
        it is sampled, from its own earlier steps (see the module's docstring). "noised_real": a noised real clip. A
        one-step student starts from pure noise in both cases.
    """

    steps: int = 4
    shift: float = 5.0
    inputs: Literal["simulated", "noised_real"] = "simulated"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(type(self).__name__, {"inputs": ("simulated", "noised_real")}, self)
        _ = self.student  # raises for an invalid sampler

    @property
    def views(self) -> Mapping[str, View]:
        simulates = self.steps > 1 and self.inputs == "simulated"
        return {"simulator": View("generator", constant=True)} if simulates else {}

    @property
    def student(self) -> Student:
        return self.sampled_in(self.steps, self.shift)

    @property
    def from_noise(self) -> Mapping[str, Any]:
        """Values of its fields with which the generator starts from noise only."""
        return {"inputs": "simulated"} if self.steps > 1 else {}

    def chances(self, step: Step) -> Float[Array, "steps"]:
        """Probability of each of the student's timesteps at a step of the training, the noisiest first."""
        return jnp.full(self.steps, 1 / self.steps)

    def last(self, context: Context) -> Step:
        """Number of earlier steps that are simulated for the batch's clips."""
        key = named_keys(context.batch, "last").last
        return self._chosen(jax.random.uniform(key), context) if self.steps > 1 else 0

    def _chosen(self, uniform: Float[Array, "*b"], context: Context) -> Int[Array, "*b"]:
        """Indices of the student's timesteps that uniform numbers in [0, 1) select."""
        ends = jnp.cumsum(self.chances(context.step))
        return jnp.minimum(jnp.searchsorted(ends, uniform, side="right"), self.steps - 1)

    def constant(self, nets: Nets, batch: Batch, context: Context, key: PRNGKey) -> Latents:
        """The clips of `generate`, not differentiated."""
        return stop_gradient(self.generate(nets, batch, context, key))

    def generate(self, nets: Nets, batch: Batch, context: Context, key: PRNGKey) -> Latents:
        """Generates clips, float32, differentiable only in the last evaluation.

        Args:
          key: for per-clip draws; shared draws come from `context`.
        """
        keys = named_keys(key, "t", "noise")
        grid = jnp.asarray(self.student.sampler.times[:-1], jnp.float32)
        clips, *size = batch.shape
        if self.steps > 1 and self.inputs == "noised_real":
            t = grid[self._chosen(draws.uniform(keys.t, clips), context)]
            x = add_noise(real_clips(batch), draws.normal(keys.noise, batch.shape, jnp.float32), t)
            return predict_x0(nets["generator"], x, t, batch.condition)
        noise = jnp.moveaxis(draws.normal(keys.noise, (clips, self.steps, *size), jnp.float32), 1, 0)

        def at(step: Step) -> Times:
            return jnp.broadcast_to(grid[step], (clips,))

        def earlier(step: Step, x: Latents) -> Latents:
            x0 = predict_x0(nets["simulator"], x, at(step), batch.condition)
            return add_noise(x0, noise[step + 1], at(step + 1))

        last, x = self.last(context), noise[0]
        if self.steps > 1:
            x = stop_gradient(jax.lax.fori_loop(0, last, earlier, x))
        return predict_x0(nets["generator"], x, at(last), batch.condition)
