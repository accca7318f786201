"""The update programs of a phase with abstract arguments: shapes, dtypes and shardings instead of arrays.

This is the only module of the package that knows how a training run is assembled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vpae_jax import sharding
from vpae_jax.config import Experiment
from vpae_jax.inference import samplers
from vpae_jax.methods import make_method
from vpae_jax.models import presets
from vpae_jax.models.wan_dit import WanTransformerConfig
from vpae_jax.models.wan_vae import WanVAE
from vpae_jax.models.wan_vae_rows import Rows
from vpae_jax.planning.clips import ClipSize
from vpae_jax.train import blueprint as blueprints
from vpae_jax.train.optim import make_optimizer
from vpae_jax.train.roles import check_roles
from vpae_jax.train.state import TrainState, abstract, places_of
from vpae_jax.train.step import make_update
from vpae_jax.types import MASK_CHANNELS, Batch, Condition, UserError

# The values of `config.model.remat` that a search tries, from the least recomputation to the most.
REMATS = ("none", "dots", "attention", "full", "offload")


@dataclass(frozen=True)
class Setting:
    """How a phase is distributed over devices, which is all that a search changes.

    Attributes:
      data, fsdp, context, tensor: sizes of the mesh axes.
      accumulation: number of parts in which a batch is processed.
      remat: `config.model.remat`.
    """

    data: int
    fsdp: int
    context: int
    tensor: int
    accumulation: int
    remat: str

    @property
    def flags(self) -> str:
        """The command-line flags of this setting."""
        mesh = " ".join(f"--config.mesh.{axis}={getattr(self, axis)}" for axis in sharding.AXES)
        parts = f" --config.accumulation={self.accumulation}" if self.accumulation > 1 else ""
        return f"{mesh}{parts} --config.model.remat={self.remat}"


@dataclass(frozen=True)
class Program:
    """One jitted update.

    Attributes:
      name: the roles that it trains, as one word.
      trains: these roles.
      repeats: number of runs in a row; 0 for a program that is not part of a step.
      every: it runs every `every` steps.
      jitted: the update, from `train.step.make_update`.
      arguments: abstract (state, frozen weights, batch, repeat).
    """

    name: str
    trains: tuple[str, ...]
    repeats: int
    every: int
    jitted: Any
    arguments: tuple[Any, ...]

    @property
    def calls(self) -> float:
        """Number of runs per step, on average."""
        return self.repeats / self.every


@dataclass(frozen=True)
class Programs:
    """A phase's updates over one abstract state.

    Attributes:
      updates: in execution order.
      state: what training changes.
      frozen: weights that training does not change.
      batch: one global batch.
      mesh: the devices of all of these.
      preview: decodes one clip between steps.
    """

    updates: tuple[Program, ...]
    state: TrainState
    frozen: Mapping[str, Any]
    batch: Batch
    mesh: Mesh
    preview: Program


def setting_of(experiment: Experiment, mesh: Mesh) -> Setting:
    """The setting of a config on this mesh."""
    sizes: dict[str, int] = {axis: mesh.shape[axis] for axis in sharding.AXES}
    return Setting(**sizes, accumulation=sharding.parts_of_batch(experiment, mesh), remat=experiment.model.remat)


def with_setting(experiment: Experiment, setting: Setting) -> Experiment:
    """The experiment with another setting."""
    mesh = dataclasses.replace(experiment.mesh, **{axis: getattr(setting, axis) for axis in sharding.AXES})
    model = dataclasses.replace(experiment.model, remat=setting.remat)
    return dataclasses.replace(experiment, mesh=mesh, model=model, accumulation=setting.accumulation)


def transformer_of(experiment: Experiment) -> WanTransformerConfig:
    """Sizes of the transformer that the phase trains."""
    return presets.find(experiment.model.preset).transformer


def draw_up(experiment: Experiment, clip: ClipSize, devices: Any) -> Programs:
    """The phase's programs on these devices, which may belong to a machine that does not exist here.

    Raises:
      UserError: for a config that is inconsistent, or does not fit the method or the devices, or a phase that does not
        train on encoded clips.
    """
    method = make_method(experiment.method)
    if method.batch is not Batch:
        raise UserError(f"{experiment.name} does not train on encoded clips; plan phase1, phase2 or teacher")
    check_roles(method, experiment.optimizers)
    mesh = sharding.make_mesh(experiment.mesh, devices)
    blueprint = blueprints.draw_up(experiment, method, mesh, transformer_of(experiment))
    optimizers = {role: make_optimizer(experiment.optimizers[role]) for role in blueprint.trained}
    state = abstract(blueprint.trained, method.roles, optimizers)
    batch = abstract_batch(experiment, clip, mesh, method.known_noise)
    repeat = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    places, parts = places_of(state), sharding.parts_of_batch(experiment, mesh)
    updates = tuple(
        Program(
            update.name,
            tuple(role for one in update.program for role in one.trains),
            update.repeats,
            update.every,
            make_update(update, index, blueprint.models, optimizers, parts, places),
            (state, blueprint.frozen, batch, repeat),
        )
        for index, update in enumerate(method.updates)
        if update.ends is None  # warm-up updates are not part of a step
    )
    return Programs(updates, state, blueprint.frozen, batch, mesh, preview_of(experiment, clip, mesh))


def preview_of(experiment: Experiment, clip: ClipSize, mesh: Mesh) -> Program:
    """The program that decodes a clip for a preview or a score, each device decoding its rows (`run.generation`)."""
    vae = nnx.eval_shape(lambda: WanVAE(presets.find(experiment.model.preset).vae, rngs=nnx.Rngs(0)))
    vae.rows = Rows(mesh)
    graph, weights = nnx.split(vae)
    whole = NamedSharding(mesh, PartitionSpec())
    shapes = (weights, jax.ShapeDtypeStruct((1, *clip.latents), jnp.float32))
    weights, latents = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)
    return Program("preview", (), 0, 1, samplers.decoding, (graph, weights, latents))


def abstract_batch(experiment: Experiment, clip: ClipSize, mesh: Mesh, seeds: bool = False) -> Batch:
    """One global batch, in bfloat16 as from the data pipeline, with clips sharded over `data` and `fsdp`; with their
    noise seeds if `seeds`."""
    preset, b = presets.find(experiment.model.preset), experiment.batch_size
    text, width = clip.text_tokens, preset.transformer.text_dim
    f, h, w, c = clip.latents

    def floats(*shape: int) -> Any:
        return jnp.zeros(shape, jnp.bfloat16)

    def zeros() -> Batch:
        image = frames = None
        if preset.image_encoder is not None:
            image = floats(b, preset.image_encoder.num_tokens, preset.image_encoder.hidden_size)
            frames = floats(b, f, h, w, MASK_CHANNELS + c)
        condition = Condition(floats(b, text, width), jnp.zeros((b, text), bool), image, frames)
        seed = jnp.zeros(b, jnp.uint32) if seeds else None
        return Batch(floats(b, f, h, w, c), condition, floats(text, width), jnp.zeros(text, bool), seed)

    batch = jax.eval_shape(zeros)
    return sharding.abstract(batch, sharding.batch_shardings(batch, mesh))
