"""Knowledge distillation: regression on clips that a teacher generated from known noise (Luhman & Luhman, 2101.02388).

    L = mean ||x0(theta, eps, 1) - c||^2        c = the teacher's clip of the noise eps, sampled in many guided steps

The warm-up of one-step students: DMD (2311.18828) uses it together with its other terms, DMD2 before its one-step SDXL
student, and DMD2-v before its one-step video student, with 500,000 such pairs. Clips and their noise come from the
records of `python -m vpae_jax.encode --captions=...`, each of which keeps the seed of its clip
(`encoding/synthetic.py`); the noise is drawn from the seed again, on the device.

The squared distance of latents is FastGen's (halved there, to which Adam is invariant); DMD2's is LPIPS of decoded
images. The distance of DMD2-v is unstated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax.lax import stop_gradient

from vpae_jax.flow.draws import noise_of_seeds
from vpae_jax.flow.sampler import ONE_STEP
from vpae_jax.methods.base import Context, Nets, Role, Student, Update
from vpae_jax.methods.common import drift, example_mean, named_keys, predict_x0, real_clips
from vpae_jax.methods.distillation import Distillation
from vpae_jax.types import Batch, Metrics, PerExample


@dataclass(frozen=True)
class KnowledgeDistillation(Distillation):
    """Regression of a one-step student on pairs of noise and clip."""

    known_noise: ClassVar[bool] = True

    @property
    def roles(self) -> Mapping[str, Role]:
        generator = {"generator": self.generator_role}
        return generator if self.generator == "full" else generator | {"teacher": Role("pretrained")}

    @property
    def updates(self) -> tuple[Update, ...]:
        return (Update(("generator",), self.loss),)

    @property
    def student(self) -> Student:
        return self.sampled_by(ONE_STEP)

    def loss(self, nets: Nets, batch: Batch, context: Context) -> tuple[PerExample, Metrics]:
        """L.

        Raises:
          ValueError: a batch without its clips' seeds.
        """
        seeds = batch.seed
        if seeds is None:
            raise ValueError("the clips' noise is not known; the batch needs their seeds")
        batch = self.drop_images(batch, named_keys(context.clips, "images").images)
        clips = real_clips(batch)
        noise = noise_of_seeds(seeds, clips.shape)
        x0 = predict_x0(nets["generator"], noise, jnp.ones(len(clips)), batch.condition)
        return example_mean((x0 - clips) ** 2), drift(stop_gradient(x0), batch.latents)
