"""The update programs of a phase, with every argument abstract: shapes, dtypes and shardings, no array.

The only module of this package that knows how a training run is put together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vpae_jax import sharding
from vpae_jax.config import Experiment, build
from vpae_jax.methods import make_method
from vpae_jax.methods.base import Method, Role
from vpae_jax.models import presets
from vpae_jax.models.heads import DiscriminatorHeads, HeadsConfig
from vpae_jax.models.lora import LoRASpec
from vpae_jax.models.wan_dit import WanTransformer, WanTransformerConfig
from vpae_jax.planning.clips import ClipSize
from vpae_jax.train.optim import make_optimizer
from vpae_jax.train.roles import RoleModels, check_roles
from vpae_jax.train.state import TrainState, create
from vpae_jax.train.step import make_update
from vpae_jax.types import MASK_CHANNELS, Batch, Condition, UserError

# What a search may set `config.model.remat` to, from the least recomputation to the most.
REMATS = ("none", "dots", "full")


@dataclass(frozen=True)
class Setting:
    """How a phase is laid out over devices, the only thing that a search changes.

    Attributes:
      data, fsdp, context, tensor: the mesh.
      accumulation: parts that a batch is processed in.
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
      name: the role that it trains.
      repeats: how often it runs in a row.
      every: on each how-manieth step it runs.
      jitted: the update, as `train.step.make_update` makes it.
      arguments: abstract (state, frozen weights, batch, repeat).
    """

    name: str
    repeats: int
    every: int
    jitted: Any
    arguments: tuple[Any, ...]

    @property
    def calls(self) -> float:
        """How often it runs a step, on average."""
        return self.repeats / self.every


@dataclass(frozen=True)
class Programs:
    """A phase's updates over one abstract state.

    Attributes:
      updates: in the order in which they run.
      state: what training changes.
      frozen: weights that it does not.
      batch: one global batch.
      mesh: where all of it lies.
    """

    updates: tuple[Program, ...]
    state: TrainState
    frozen: Mapping[str, Any]
    batch: Batch
    mesh: Mesh


def setting_of(experiment: Experiment, mesh: Mesh) -> Setting:
    """The setting that a config asks for on this mesh."""
    sizes: dict[str, int] = {axis: mesh.shape[axis] for axis in sharding.AXES}
    return Setting(**sizes, accumulation=1, remat=experiment.model.remat)


def with_setting(experiment: Experiment, setting: Setting) -> Experiment:
    """The experiment in another setting. Raises `UserError` for one that training cannot run."""
    if setting.accumulation != 1:
        raise UserError(f"accumulation is {setting.accumulation}, but a batch is processed whole; use 1")
    mesh = dataclasses.replace(experiment.mesh, **{axis: getattr(setting, axis) for axis in sharding.AXES})
    model = dataclasses.replace(experiment.model, remat=setting.remat)
    return dataclasses.replace(experiment, mesh=mesh, model=model)


def transformer_of(experiment: Experiment) -> WanTransformerConfig:
    """Sizes of the transformer that the phase trains."""
    return presets.find(experiment.model.preset).transformer


def draw_up(experiment: Experiment, clip: ClipSize, devices: Any) -> Programs:
    """The phase's programs on these devices, which may be those of a machine that is not there.

    Raises:
      UserError: for a config that does not fit itself, the method or the devices, or a phase that does not train on
        encoded clips.
    """
    method = make_method(experiment.method)
    if method.batch is not Batch:
        raise UserError(f"{experiment.name} does not train on encoded clips; plan phase1, phase2 or teacher")
    check_roles(method, experiment.optimizers)
    mesh = sharding.make_mesh(experiment.mesh, devices)
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if experiment.batch_size % shares:
        raise UserError(f"config.batch_size is {experiment.batch_size}, expected a multiple of {shares} (data x fsdp)")
    models, trained, frozen = _roles(experiment, method, mesh)
    optimizers = {role: make_optimizer(experiment.optimizers[role]) for role in trained}
    state = _state(experiment, method, trained, optimizers, mesh)
    batch = abstract_batch(experiment, clip, mesh)
    repeat = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    updates = tuple(
        Program(
            update.trains,
            update.repeats,
            update.every,
            make_update(update, index, models, optimizers[update.trains]),
            (state, frozen, batch, repeat),
        )
        for index, update in enumerate(method.updates)
    )
    return Programs(updates, state, frozen, batch, mesh)


def abstract_batch(experiment: Experiment, clip: ClipSize, mesh: Mesh) -> Batch:
    """One global batch, float32 as the data pipeline makes it; clips lie along `data` and `fsdp`."""
    preset, b = presets.find(experiment.model.preset), experiment.batch_size
    config = preset.transformer
    clips, whole = NamedSharding(mesh, PartitionSpec(("data", "fsdp"))), NamedSharding(mesh, PartitionSpec())

    def struct(shape: tuple[int, ...], where: NamedSharding, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    f, h, w, c = clip.latents
    image = frames = None
    if preset.image_encoder is not None:
        tokens = (preset.image_encoder.image_size // preset.image_encoder.patch_size) ** 2 + 1
        image = struct((b, tokens, preset.image_encoder.hidden_size), clips)
        frames = struct((b, f, h, w, MASK_CHANNELS + c), clips)
    condition = _abstract_of(
        Condition,
        text=struct((b, clip.text_tokens, config.text_dim), clips),
        text_mask=struct((b, clip.text_tokens), clips, jnp.bool_),
        image=image,
        frames=frames,
    )
    return _abstract_of(
        Batch,
        latents=struct((b, f, h, w, c), clips),
        condition=condition,
        null_text=struct((clip.text_tokens, config.text_dim), whole),
        null_mask=struct((clip.text_tokens,), whole, jnp.bool_),
    )


def _abstract_of(cls: type, **fields: Any) -> Any:
    """A dataclass of arrays that holds shapes instead: made past its constructor, which is checked to get arrays."""
    made = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def _roles(experiment: Experiment, method: Method, mesh: Mesh) -> tuple[RoleModels, dict[str, Any], dict[str, Any]]:
    """Every role's graph and abstract weights."""
    preset = presets.find(experiment.model.preset)
    graphs, trained, frozen = {}, {}, {}
    taps: tuple[int, ...] = ()
    for name, role in method.roles.items():
        if role.model == "heads":
            heads = build(HeadsConfig, experiment.heads, "config.heads")
            taps = heads.taps
            graphs[name], params = _abstract(_heads(experiment, heads))
            rules = sharding.REPLICATED
        else:
            graphs[name], params = _transformer(experiment, role, preset.transformer)
            rules = sharding.TRANSFORMER_RULES
        dtype = jnp.float32 if role.trains != "none" else jnp.dtype(experiment.model.frozen_dtype)
        params = jax.tree.map(
            lambda p, s, dtype=dtype: jax.ShapeDtypeStruct(p.shape, dtype, sharding=s),
            params,
            sharding.param_shardings(params, rules, mesh),
        )
        (frozen if role.trains == "none" else trained)[name] = params
    return RoleModels(method.roles, graphs, taps), trained, frozen


def _heads(experiment: Experiment, heads: HeadsConfig) -> Callable[[], nnx.Module]:
    dtype = jnp.dtype(experiment.model.dtype)
    return lambda: DiscriminatorHeads(heads, rngs=nnx.Rngs(0), dtype=dtype)


def _transformer(experiment: Experiment, role: Role, config: WanTransformerConfig) -> tuple[nnx.GraphDef, Any]:
    options: dict[str, Any] = {"dtype": jnp.dtype(experiment.model.dtype), "remat": experiment.model.remat}
    if role.trains == "lora":
        spec = LoRASpec(rank=role.lora_rank, alpha=role.lora_alpha)
        return _abstract(
            lambda: WanTransformer(config, rngs=nnx.Rngs(0), lora=spec, **options), nnx.LoRAParam, nnx.Param
        )
    return _abstract(lambda: WanTransformer(config, rngs=nnx.Rngs(0), **options))


def _abstract(make: Callable[[], nnx.Module], *kinds: type) -> tuple[nnx.GraphDef, Any]:
    """A model's graph and its abstract weights, those of the first kind if there are several."""
    graph, weights, *_ = nnx.split(nnx.eval_shape(make), *(kinds or (nnx.Param,)))
    return graph, nnx.to_pure_dict(weights)


def _state(
    experiment: Experiment,
    method: Method,
    trained: Mapping[str, Any],
    optimizers: Mapping[str, optax.GradientTransformation],
    mesh: Mesh,
) -> TrainState:
    """The abstract train state: moments and averages lie where their weights do, all else everywhere."""

    def start(params: Mapping[str, Any]) -> tuple[Any, ...]:
        state = create(experiment.seed, params, method.roles, optimizers)
        return state.step, state.key, state.opt, state.ema

    step, key, moments, averages = jax.eval_shape(start, trained)
    whole = NamedSharding(mesh, PartitionSpec())

    def like(struct: jax.ShapeDtypeStruct, weight: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=weight.sharding)

    def everywhere(struct: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=whole)

    opt = {
        role: optax.tree_map_params(optimizers[role], like, tree, trained[role], transform_non_params=everywhere)
        for role, tree in moments.items()
    }
    return _abstract_of(
        TrainState,
        step=everywhere(step),
        key=everywhere(key),
        params=dict(trained),
        opt=opt,
        ema={role: jax.tree.map(like, tree, trained[role]) for role, tree in averages.items()},
    )
