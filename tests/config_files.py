"""The config files that there are, and the presets of each: found, so that a new one is tested without being listed."""

import importlib
from pathlib import Path

from configs.common import PRESETS
from vpae_jax.types import UserError

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = {
    path.stem: importlib.import_module(f"configs.{path.stem}")
    for path in sorted(FOLDER.glob("*.py"))
    if path.stem != "common"
}


def has(module, preset):
    try:
        module.get_config(preset)
    except UserError as error:
        assert f"preset {preset!r} does not exist" in str(error)
        return False
    return True


OPENINGS = [(name, preset) for name, module in CONFIGS.items() for preset in PRESETS if has(module, preset)]
