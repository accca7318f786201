"""Describes a run's roles on a mesh without allocating anything: networks, and the shapes, dtypes and shardings of all
weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vpae_jax import sharding
from vpae_jax.config import Experiment, build
from vpae_jax.methods.base import Adapters, Method, Role, all_views
from vpae_jax.models import presets
from vpae_jax.models.heads import DiscriminatorHeads, HeadsConfig
from vpae_jax.models.lora import LoRASpec
from vpae_jax.models.pair_encoder import PairEncoder
from vpae_jax.models.pixels import PixelCLIPConfig, PixelEncoderConfig, Preprocessing
from vpae_jax.models.tiny_decoder import TinyDecoder
from vpae_jax.models.wan_dit import WanTransformer, WanTransformerConfig
from vpae_jax.models.wan_vae import WanVAE, WanVAEConfig
from vpae_jax.train.roles import RoleModels, split, split_lora
from vpae_jax.types import Params, PRNGKey, UserError


@dataclass(frozen=True)
class Blueprint:
    """All roles' networks, and the shapes, dtypes and shardings of their weights.

    Attributes:
      models: how weights become networks.
      trained: abstract weights of the trained roles, float32.
      frozen: abstract weights of the other roles.
      makers: functions that create a role's weights from a random key, for roles that start from random weights.
    """

    models: RoleModels
    trained: dict[str, Params]
    frozen: dict[str, Params]
    makers: Mapping[str, Callable[[PRNGKey], Params]]

    @property
    def held(self) -> dict[str, Params]:
        """Abstract weights of all roles."""
        return {**self.trained, **self.frozen}


@dataclass(frozen=True)
class PixelParts:
    """Sizes of the frozen parts used by a discriminator on pixels: the autoencoder, which decodes latents (and is also
    the target of a small decoder), and the image encoder, which reads frames."""

    vae: WanVAEConfig
    image_encoder: PixelEncoderConfig

    @classmethod
    def of(cls, preset: presets.Preset) -> PixelParts:
        """Returns the sizes of a preset. For text-to-video models, which have no image encoder, it is that of Wan's
        image-to-video models."""
        clip = preset.image_encoder or presets.CLIP_VIT_H
        side = clip.image_size
        return cls(preset.vae, PixelCLIPConfig(clip, Preprocessing(side, (side, side))))


def draw_up(
    experiment: Experiment,
    method: Method,
    mesh: Mesh,
    transformer: WanTransformerConfig,
    looked_by: PixelParts | None = None,
) -> Blueprint:
    """Describes the roles of a run on a mesh, whose devices need not exist.

    Args:
      transformer: sizes of the roles that are transformers.
      looked_by: sizes of a frozen autoencoder or image encoder, if the method has one; by default the preset's.

    Raises:
      UserError: settings that do not fit together, or weights whose sizes are not divisible by the mesh.
    """
    roles = method.roles
    looked_by = looked_by or PixelParts.of(presets.find(experiment.model.preset))
    graphs, trained, frozen, makers = {}, {}, {}, {}
    for name, role in roles.items():
        make = partial(_network, experiment, method, name, transformer, looked_by, mesh)
        graphs[name], shapes = _split(nnx.eval_shape(lambda make=make: make(jax.random.key(0))), role)
        dtype = jnp.dtype(jnp.float32 if role.trains else experiment.model.frozen_dtype)
        places = sharding.param_shardings(shapes, sharding.RULES[role.part], mesh)
        (trained if role.trains else frozen)[name] = sharding.abstract(shapes, places, dtype)
        makers[name] = partial(_fresh, make, role, dtype, experiment.model.init_scale)
    return Blueprint(RoleModels(roles, all_views(method), graphs), trained, frozen, makers)


def _network(
    experiment: Experiment,
    method: Method,
    name: str,
    transformer: WanTransformerConfig,
    looked_by: PixelParts,
    mesh: Mesh,
    key: PRNGKey,
) -> nnx.Module:
    """Creates a role's model with random weights."""
    rngs, model, role = nnx.Rngs(key), experiment.model, method.roles[name]
    dtype = jnp.dtype(model.dtype)
    if role.part == "transformer":
        lora = None if role.adapters is None else _lora(role.adapters)
        return WanTransformer(transformer, rngs=rngs, dtype=dtype, remat=model.remat, lora=lora, mesh=mesh)
    if role.part == "heads":
        pixels = any(other.part == "image_encoder" for other in method.roles.values())
        encoder = looked_by.image_encoder if pixels else None
        heads = _heads(experiment, name, transformer, encoder)
        return DiscriminatorHeads(heads, role.outputs, rngs=rngs, dtype=dtype, mesh=mesh)
    if role.part == "image_encoder":
        return looked_by.image_encoder.make(rngs, dtype)
    preset = presets.find(model.preset)
    if role.part == "vae":
        return WanVAE(preset.vae if role.trains else looked_by.vae, rngs=rngs, dtype=dtype)
    if role.part == "decoder":
        return TinyDecoder(preset.decoder, rngs=rngs, dtype=dtype)
    if preset.image_encoder is None:
        raise UserError(f"preset {model.preset!r} has no image encoder to train; choose another")
    return PairEncoder(preset.text_encoder, preset.image_encoder, rngs=rngs)


def _lora(adapters: Adapters) -> LoRASpec:
    chosen = {} if adapters.targets is None else {"targets": adapters.targets}
    return LoRASpec(adapters.rank, adapters.alpha, **chosen)


def _split(model: nnx.Module, role: Role) -> tuple[nnx.GraphDef, Params]:
    """Returns a model's graph, and those of its weights that belong to the role."""
    if role.adapters is None:
        return split(model)
    graph, adapters, _ = split_lora(model)
    return graph, adapters


def _fresh(
    make: Callable[[PRNGKey], nnx.Module], role: Role, dtype: np.dtype, scales: Mapping[str, float], key: PRNGKey
) -> Params:
    _, params = _split(make(key), role)
    if role.part == "transformer" and role.adapters is None:
        params = _scaled(params, scales)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def _heads(
    experiment: Experiment, name: str, transformer: WanTransformerConfig, encoder: PixelEncoderConfig | None
) -> HeadsConfig:
    """Returns the sizes of a role's discriminator heads. Raises `UserError` if they do not fit what they read: the
    image encoder if there is one, else the transformer."""
    where = f"config.networks.{name}"
    if name not in experiment.networks:
        raise UserError(f"{where}: missing; the method trains discriminator heads with this name")
    heads = build(HeadsConfig, experiment.networks[name], where)
    if encoder is None:
        read, width, depth = "transformer", transformer.width, transformer.num_layers
    else:
        read, width, depth = "image encoder", encoder.width, encoder.depth
    if heads.width != width:
        raise UserError(f"{where}.width is {heads.width}, but the {read}'s is {width}")
    if heads.taps[-1] > depth:
        raise UserError(f"{where}.taps are {heads.taps}, but the {read} has {depth} blocks")
    if encoder is not None and heads.kind == "ca_mm":
        raise UserError(f"{where}.kind is 'ca_mm', but the image encoder reads no prompt; set it to 'ca' or 'conv'")
    return heads


def _scaled(params: Params, factors: Mapping[str, float]) -> Params:
    """Multiplies parameters by the factors of the regular expressions that match their paths.

    Raises:
      UserError: an expression matches nothing.
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
