"""The config files that there are, and the presets of each: found, so that a new one is tested without being listed."""

import importlib

from vpae_jax.config_files import bundled
from vpae_jax.configs.common import PRESETS
from vpae_jax.types import UserError

CONFIGS = {name: importlib.import_module(f"vpae_jax.configs.{name}") for name in bundled()}


def has(module, preset):
    try:
        module.get_config(preset)
    except UserError as error:
        assert f"preset {preset!r} does not exist" in str(error)
        return False
    return True


OPENINGS = [(name, preset) for name, module in CONFIGS.items() for preset in PRESETS if has(module, preset)]
