"""What the configs share: presets, and the settings that do not belong to a method.

A config file is `get_config(preset)`; its docstring is its lab notebook. Comments give the reason for each value that
the tiny preset changes.
"""

import dataclasses

from ml_collections import ConfigDict

from vpae_jax.config import Experiment, build, complete, nearest
from vpae_jax.flow.times import TimeDistribution
from vpae_jax.methods import METHODS
from vpae_jax.models import presets
from vpae_jax.models.heads import HeadsConfig, even_taps
from vpae_jax.types import UserError

# In so small a clip the same noise hides more than at 720p, so the tiny presets' timesteps are lower than Wan's.
TINY_TIMES = TimeDistribution(low=0.02, high=0.98)
PRESETS = ("tiny", "t2v-1.3b-480p", "t2v-14b-480p", "t2v-14b-720p", "i2v-14b-480p", "i2v-14b-720p")


def check(preset: str, known: tuple[str, ...] = PRESETS) -> None:
    """Raises `UserError` for a preset that the config does not have."""
    if preset not in known:
        raise UserError(f"preset {preset!r} does not exist{nearest(preset, known)} (known: {', '.join(known)})")


def experiment(preset: str, **values) -> ConfigDict:
    """A whole config: the given values, completed with every default, so that each of their keys can be overridden.

    A command line can add neither optimizers nor patterns of `model.init_scale`.

    Args:
      preset: sizes of the heads, unless `model.preset` is given.
      values: keys of `Experiment`.
    """
    method = dict(values["method"])
    name = method.pop("name")
    values["method"] = {"name": name, **complete(METHODS[name], method)}
    sizes = dataclasses.asdict(presets.find(values.get("model", {}).get("preset", preset)).heads)
    heads = [role for role, used in build(METHODS[name], method, "method").roles.items() if used.part == "heads"]
    given = values.get("networks", {})
    values["networks"] = {role: complete(HeadsConfig, {**sizes, **given.get(role, {})}) for role in heads}
    return ConfigDict(complete(Experiment, values))


def wan(preset: str) -> dict:
    """Settings for 1.3B and 14B that all distillations share: all but the method, its optimizers and the step count."""
    return {
        "preset": preset,
        "batch_size": 32,
        # One clip at a time on every eight devices (four for 1.3B with its twelve heads), so each device has an eighth
        # of a clip's tokens. `python -m vpae_jax.plan` reports what fits where.
        "accumulation": -1,
        "mesh": {"context": 4 if "1.3b" in preset else 8},
        "log_every": 1,
        "sample_every": 50,
        "checkpoint_every": 50,
        "sample_guidance": 5.0,
        "sample_shift": 3.0 if preset.endswith("480p") else 5.0,
        "model": {
            "path": f"models/{preset}",
            "preset": preset.removesuffix("-480p").removesuffix("-720p"),
            "dtype": "bfloat16",
            "frozen_dtype": "bfloat16",
            "remat": "full",
        },
        "data": {"folder": f"data/{preset}"},
    }


def every_block(preset: str) -> tuple[int, ...]:
    """Taps of discriminator heads that read every block of a model, counted from 1."""
    return tuple(range(1, presets.find(preset).transformer.num_layers + 1))


def with_pixel_discriminator(config: ConfigDict) -> ConfigDict:
    """Turns a config's discriminator into one on pixels, whose heads read the image encoder at evenly spaced depths.

    The heads are as wide as the encoder: 1280 for Wan's, the same as heads on 14B transformers.
    """
    preset = presets.find(config.model.preset)
    encoder = preset.image_encoder or presets.CLIP_VIT_H
    config.name += "_pixels"
    config.method.backbone, config.method.noise.kind = "image_encoder", "clean"
    if preset.image_encoder is None:  # a text-to-video model uses that of another model
        config.model.image_encoder = "models/i2v-14b-480p"
    heads = config.networks.heads
    heads.width = heads.hidden = encoder.hidden_size
    heads.num_heads = encoder.num_attention_heads
    heads.taps = even_taps(encoder.num_hidden_layers)
    if heads.kind == "ca_mm":  # an image encoder reads no prompt
        heads.kind = "ca"
    return config


def adam(learning_rate: float, b1: float, b2: float = 0.999, **options) -> dict:
    """Adam's options."""
    return {"learning_rate": learning_rate, "algorithm": "adam", "b1": b1, "b2": b2, **options}
