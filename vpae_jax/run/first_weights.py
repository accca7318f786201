"""From a method's roles to weights on the mesh: the only place that decides where a role starts (`Role.init`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vpae_jax import sharding
from vpae_jax.config import Experiment, build
from vpae_jax.files import resolve
from vpae_jax.methods.base import Method, Role
from vpae_jax.models import presets
from vpae_jax.models.heads import DiscriminatorHeads, HeadsConfig
from vpae_jax.models.lora import LoRASpec
from vpae_jax.models.pair_encoder import PairEncoder
from vpae_jax.models.wan_dit import WanTransformer, WanTransformerConfig
from vpae_jax.models.wan_vae import WanVAE
from vpae_jax.train.checkpoint import latest_step, read_state
from vpae_jax.train.roles import RoleModels, split, split_lora
from vpae_jax.train.state import places_of
from vpae_jax.types import Params, PRNGKey, UserError
from vpae_jax.weights.loading import read_part
from vpae_jax.weights.locate import locate


def resolve_model(path: str, workdir: Path) -> Path:
    """`files.resolve` for a model, which may be "tiny" or an id of the Hugging Face hub, too."""
    return resolve(path, workdir) if path.startswith("../") else locate(path)


@dataclass(frozen=True)
class Blueprint:
    """All roles' networks, and shapes, dtypes and places of their weights; nothing is allocated.

    Attributes:
      models: how weights become networks.
      trained: of the trained roles, float32.
      frozen: of all others.
      makers: each role's model from a random key, for those that start from random weights.
    """

    models: RoleModels
    trained: dict[str, Params]
    frozen: dict[str, Params]
    makers: Mapping[str, Callable[[PRNGKey], Params]]


def draw_up(experiment: Experiment, method: Method, mesh: Mesh, transformer: WanTransformerConfig) -> Blueprint:
    """Draws up the roles of a run on a mesh, whose devices need not be there.

    Args:
      transformer: sizes of the roles that are transformers.

    Raises:
      UserError: settings that do not fit each other, or weights that the mesh does not divide.
    """
    roles = method.roles
    heads = _heads(experiment, transformer) if any(r.model == "heads" for r in roles.values()) else None
    graphs, trained, frozen, makers = {}, {}, {}, {}
    for name, role in roles.items():
        make = partial(_network, experiment, role, transformer, heads, mesh)
        graphs[name], shapes = _split(nnx.eval_shape(lambda make=make: make(jax.random.key(0))), role)
        dtype = jnp.dtype(jnp.float32 if role.trains != "none" else experiment.model.frozen_dtype)
        places = sharding.param_shardings(shapes, sharding.RULES[role.model], mesh)
        (frozen if role.trains == "none" else trained)[name] = sharding.abstract(shapes, places, dtype)
        makers[name] = partial(_fresh, make, role, dtype, experiment.model.init_scale)
    return Blueprint(RoleModels(roles, graphs, heads.taps if heads else ()), trained, frozen, makers)


def make_weights(
    blueprint: Blueprint, experiment: Experiment, workdir: Path, source: Path | None, names: Iterable[str]
) -> tuple[dict[str, Params], int | None]:
    """First weights of some roles, read or drawn straight into their places.

    Args:
      source: the model directory, for roles that start from it.
      names: which roles.

    Returns:
      the weights by role, and the step of the phase before that they start from (None when they do not).

    Raises:
      UserError: when the previous phase's checkpoint is missing, or lacks a role; says which command makes it.
    """
    roles = {name: blueprint.models.roles[name] for name in names}
    like = {**blueprint.trained, **blueprint.frozen}
    wanted = {name: like[name] for name, role in roles.items() if role.init == "previous"}
    previous, step = read_previous(experiment, workdir, like=wanted) if wanted else ({}, None)
    result: dict[str, Params] = {}
    for name, role in roles.items():
        if role.init == "previous":
            result[name] = previous[name]
        elif role.init == "pretrained":
            if source is None:
                raise UserError(f"role {name} starts from a model directory; set config.model.path")
            result[name] = read_pretrained(source, like[name])
        else:
            index = list(blueprint.models.roles).index(name)
            key = jax.random.fold_in(jax.random.key(experiment.seed), 1000 + index)
            result[name] = jax.jit(blueprint.makers[name], out_shardings=places_of(like[name]))(key)
    return result, step


def read_pretrained(source: Path, like: Params) -> Params:
    """A model directory's transformer, in the dtype and the places of `like`."""
    leaves = {sharding.param_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(like)}
    dtype = next(iter(leaves.values())).dtype
    return read_part(source, "transformer", dtype, lambda path, _: leaves[path].sharding)[1]


def _network(
    experiment: Experiment,
    role: Role,
    transformer: WanTransformerConfig,
    heads: HeadsConfig | None,
    mesh: Mesh,
    key: PRNGKey,
) -> nnx.Module:
    """A role's model with random weights."""
    rngs, model = nnx.Rngs(key), experiment.model
    dtype = jnp.dtype(model.dtype)
    if role.model == "transformer":
        lora = LoRASpec(rank=role.lora_rank, alpha=role.lora_alpha) if role.trains == "lora" else None
        return WanTransformer(transformer, rngs=rngs, dtype=dtype, remat=model.remat, lora=lora, mesh=mesh)
    if role.model == "heads" and heads is not None:
        return DiscriminatorHeads(heads, rngs=rngs, dtype=dtype, mesh=mesh)
    preset = presets.find(model.preset)
    if role.model == "vae":
        return WanVAE(preset.vae, rngs=rngs, dtype=dtype)
    if preset.image_encoder is None:
        raise UserError(f"preset {model.preset!r} has no image encoder to train; choose another")
    return PairEncoder(preset.text_encoder, preset.image_encoder, rngs=rngs)


def _split(model: nnx.Module, role: Role) -> tuple[nnx.GraphDef, Params]:
    """A model's graph and what of its weights belongs to the role."""
    if role.trains == "lora":
        graph, adapters, _ = split_lora(model)
        return graph, adapters
    return split(model)


def _fresh(
    make: Callable[[PRNGKey], nnx.Module], role: Role, dtype: np.dtype, scales: Mapping[str, float], key: PRNGKey
) -> Params:
    _, params = _split(make(key), role)
    if role.model == "transformer" and role.trains != "lora":
        params = _scaled(params, scales)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def _heads(experiment: Experiment, config: WanTransformerConfig) -> HeadsConfig:
    """Sizes of the discriminator heads. Raises `UserError` for heads that do not fit the transformer."""
    heads = build(HeadsConfig, experiment.heads, "config.heads")
    if heads.width != config.width:
        raise UserError(f"config.heads.width is {heads.width}, but the transformer's is {config.width}")
    if heads.taps[-1] > config.num_layers:
        raise UserError(f"config.heads.taps are {heads.taps}, but the transformer has {config.num_layers} blocks")
    return heads


def _scaled(params: Params, factors: Mapping[str, float]) -> Params:
    """Parameters times the factors of the expressions that match them.

    Raises:
      UserError: for an expression that matches nothing.
    """
    unused = set(factors)

    def scale(path: tuple[Any, ...], value: jax.Array) -> jax.Array:
        for expression, factor in factors.items():
            if re.search(expression, sharding.param_path(path)):
                unused.discard(expression)
                value = value * factor
        return value

    scaled = jax.tree_util.tree_map_with_path(scale, params)
    if unused:
        raise UserError(f"config.model.init_scale: {sorted(unused)[0]!r} matches no parameter")
    return scaled


def read_previous(
    experiment: Experiment, workdir: Path, step: int | None = None, like: Mapping[str, Params] | None = None
) -> tuple[Mapping[str, Params], int]:
    """The weights of the phase before, by role, and the step that they are from (by default the newest).

    Args:
      like: shapes with places of the roles that are wanted; None reads all, as numpy arrays.

    Raises:
      UserError: when there is no such checkpoint, which says how to make one, or it lacks a role.
    """
    previous = experiment.previous
    if not previous.workdir:
        raise UserError("config.previous.workdir is empty, but method.init is 'previous'; name the phase before")
    folder = resolve(previous.workdir, workdir)
    if latest_step(folder) is None:
        raise UserError(
            f"{experiment.name} starts from the previous phase, but there is no checkpoint in {folder}; run: "
            f"{previous.command} --workdir={folder}, or set --config.previous.workdir"
        )
    items = ("step", "params", "ema") if previous.weights == "ema" else ("step", "params")
    state = read_state(folder, step, items, like)
    found = {**state["params"], **state.get("ema", {})}
    for role in like or ():
        if role not in found:
            raise UserError(f"{folder} holds no {role} to start from; config.previous.workdir names another method's")
    return found, int(state["step"])
