"""Base of the methods that train a role "generator": where it starts, which of its weights are trained, its average.

Low-rank adapters are applied to a frozen role "teacher", which the method must then have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vpae_jax.flow.sampler import Sampler
from vpae_jax.methods.base import EMA, Adapters, Method, Role, Student, averages
from vpae_jax.methods.common import check_at_least, check_choice, check_decay, check_fraction
from vpae_jax.types import Batch, UserError


@dataclass(frozen=True)
class GeneratorTraining(Method):
    """A method that trains a role "generator".

    Attributes:
      init: where the generator starts: the model directory, or the generator of the phase before.
      generator: which weights are trained: all of the generator's, or low-rank adapters on the teacher, whose weights
        are then shared.
      generator_rank, generator_scale: rank of the adapters, and alpha / rank.
      ema: decay of the generator's average, which is then scored and exported; 0 for none.
      more_emas: decays of further averages, one of which can be exported instead after training: `convert
        --weights=ema_0.99`. Each takes 4 bytes per trained parameter, sharded as the weights are.
      image_dropout: probability that image and first frame are withheld, for a student of both tasks.
    """

    batch: ClassVar[type] = Batch

    init: Literal["pretrained", "previous"] = "pretrained"
    generator: Literal["full", "lora"] = "full"
    generator_rank: int = 128
    generator_scale: float = 0.5
    ema: float = 0.995
    more_emas: tuple[float, ...] = ()
    image_dropout: float = 0.0

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_choice(owner, {"generator": ("full", "lora")}, self)
        check_at_least(owner, 1, generator_rank=self.generator_rank)
        check_decay(owner, ema=self.ema)
        if len({*self.more_emas, self.ema}) <= len(self.more_emas) or not all(
            0 < decay < 1 for decay in self.more_emas
        ):
            raise UserError(
                f"{owner}.more_emas is {self.more_emas}, expected different decays between 0 and 1, without ema"
            )
        check_fraction(owner, image_dropout=self.image_dropout)

    @property
    def generator_role(self) -> Role:
        """The role "generator"; adapters have no effect at first."""
        kept = averages(self.ema, self.more_emas)
        if self.generator == "full":
            return Role(self.init, trains=True, averages=kept)
        rank = self.generator_rank
        start = "fresh" if self.init == "pretrained" else self.init
        return Role(start, True, adapters=Adapters("teacher", rank, rank * self.generator_scale), averages=kept)

    def sampled_by(self, sampler: Sampler) -> Student:
        """The generator as the student, or its average if one is kept."""
        return Student("generator", sampler, average=EMA if self.ema else None)
