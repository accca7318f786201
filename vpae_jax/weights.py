"""From a method's roles to weights on the mesh: the only place that decides where a role starts (`Role.init`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PyTree

from vpae_jax import sharding
from vpae_jax.config import Experiment, build
from vpae_jax.convert.locate import locate
from vpae_jax.methods.base import Method, Role
from vpae_jax.models import presets
from vpae_jax.models.heads import DiscriminatorHeads, HeadsConfig
from vpae_jax.models.lora import LoRASpec
from vpae_jax.models.pair_encoder import PairEncoder
from vpae_jax.models.wan_dit import WanTransformer, WanTransformerConfig
from vpae_jax.models.wan_vae import WanVAE
from vpae_jax.train.checkpoint import read_state
from vpae_jax.train.roles import RoleModels, split, split_lora
from vpae_jax.types import Params, UserError

HostParams = PyTree[np.ndarray]


def resolve(path: str, workdir: Path) -> Path:
    """A path of a config: relative to the workdir when it starts with "../", else to the current folder."""
    return (workdir / path).resolve() if path.startswith("../") else Path(path)


def resolve_model(path: str, workdir: Path) -> Path:
    """The same for a model, which may be "tiny" or an id of the Hugging Face hub, too."""
    return resolve(path, workdir) if path.startswith("../") else locate(path)


@dataclass(frozen=True)
class Weights:
    """All roles' weights on the mesh.

    Attributes:
      models: how they become networks.
      trained: initial weights of the trained roles.
      frozen: weights of all others.
      previous_step: the step of the phase before that roles start from; None when they do not.
    """

    models: RoleModels
    trained: dict[str, Params]
    frozen: dict[str, Params]
    previous_step: int | None = None


def make_weights(
    experiment: Experiment,
    method: Method,
    workdir: Path,
    mesh: Mesh,
    pretrained: tuple[WanTransformerConfig, Params] | None,
    continuing: bool = False,
) -> Weights:
    """Builds every role's model and brings its first weights onto the mesh.

    Args:
      pretrained: the model directory's transformer, for roles that start from it.
      continuing: the run has a checkpoint of its own, which will replace the trained roles' weights; so the phase
        before is not read, and may be gone.

    Raises:
      UserError: when the previous phase's checkpoint is missing, or lacks a role; says which command makes it.
    """
    roles = method.roles
    preset = presets.find(experiment.model.preset)
    config = pretrained[0] if pretrained else preset.transformer
    heads = _heads(experiment, config) if any(r.model == "heads" for r in roles.values()) else None
    previous, step = {}, None
    if not continuing and any(role.init == "previous" for role in roles.values()):
        previous, step = read_previous(experiment, workdir)
        folder = resolve(experiment.previous.workdir, workdir)
        print(
            f"{experiment.name} starts from step {step} of {folder} ({experiment.previous.weights} weights)", flush=True
        )
    maker = _Maker(experiment, config, heads, pretrained[1] if pretrained else None, previous)
    graphs, trained, frozen = {}, {}, {}
    for index, (name, role) in enumerate(roles.items()):
        key = jax.random.fold_in(jax.random.key(experiment.seed), 1000 + index)
        graphs[name], params = maker.make(name, role, key)
        rules = sharding.TRANSFORMER_RULES if role.model == "transformer" else sharding.REPLICATED
        dtype = jnp.float32 if role.trains != "none" else jnp.dtype(experiment.model.frozen_dtype)
        params = jax.tree.map(lambda p, dtype=dtype: p.astype(dtype), params)
        params = jax.device_put(params, sharding.param_shardings(params, rules, mesh))
        (frozen if role.trains == "none" else trained)[name] = params
    return Weights(RoleModels(roles, graphs, heads.taps if heads else ()), trained, frozen, step)


@dataclass(frozen=True)
class _Maker:
    """Makes one role's graph and first weights."""

    experiment: Experiment
    config: WanTransformerConfig
    heads: HeadsConfig | None
    pretrained: Params | None
    previous: Mapping[str, HostParams]

    def make(self, name: str, role: Role, key: jax.Array) -> tuple[nnx.GraphDef, Params | HostParams]:
        if role.model == "transformer":
            return self.transformer(name, role, key)
        preset, dtype = presets.find(self.experiment.model.preset), jnp.dtype(self.experiment.model.dtype)
        if role.model == "heads" and self.heads is not None:
            model = DiscriminatorHeads(self.heads, rngs=nnx.Rngs(key), dtype=dtype)
        elif role.model == "vae":
            model = WanVAE(preset.vae, rngs=nnx.Rngs(key), dtype=dtype)
        elif preset.image_encoder is not None:
            model = PairEncoder(preset.text_encoder, preset.image_encoder, rngs=nnx.Rngs(key))
        else:
            raise UserError(f"preset {self.experiment.model.preset!r} has no image encoder to train; choose another")
        return split(model)

    def transformer(self, name: str, role: Role, key: jax.Array) -> tuple[nnx.GraphDef, Params | HostParams]:
        model = self.experiment.model
        options: dict[str, Any] = {"dtype": jnp.dtype(model.dtype), "remat": model.remat}
        if role.trains == "lora":
            spec = LoRASpec(rank=role.lora_rank, alpha=role.lora_alpha)
            graph, adapters, _ = split_lora(WanTransformer(self.config, rngs=nnx.Rngs(key), lora=spec, **options))
            return graph, adapters
        if role.init == "fresh":
            graph, params = split(WanTransformer(self.config, rngs=nnx.Rngs(key), **options))
            return graph, _scaled(params, model.init_scale)
        graph = nnx.graphdef(nnx.eval_shape(lambda: WanTransformer(self.config, rngs=nnx.Rngs(0), **options)))
        if role.init == "previous" and self.previous:
            if name not in self.previous:
                folder = self.experiment.previous.workdir
                raise UserError(f"{folder} holds {', '.join(sorted(self.previous))}, but no {name} to start from")
            return graph, self.previous[name]
        if self.pretrained is None:
            raise UserError(f"role {name} starts from a model directory; set config.model.path")
        return graph, self.pretrained


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
    experiment: Experiment, workdir: Path, step: int | None = None
) -> tuple[Mapping[str, HostParams], int]:
    """The weights of the phase before, by role, and the step that they are from (by default the newest).

    Raises:
      UserError: when there is no such checkpoint; says how to make one.
    """
    previous = experiment.previous
    if not previous.workdir:
        raise UserError("config.previous.workdir is empty, but method.init is 'previous'; name the phase before")
    folder = resolve(previous.workdir, workdir)
    try:
        state = read_state(folder, step)
    except UserError as error:
        raise UserError(
            f"{experiment.name} starts from the previous phase, but there is {error}; run: {previous.command} "
            f"--workdir={folder}, or set --config.previous.workdir"
        ) from error
    return {**state["params"], **(state["ema"] if previous.weights == "ema" else {})}, int(state["step"])
