"""The files of a model directory that are not weights: JSON, by these names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpae_jax.types import UserError
from vpae_jax.weights.safetensors_file import one_line

# `SETTINGS` holds what Diffusers has no place for, and does not read.
CONFIG, INDEX, SCHEDULER, SETTINGS = "config.json", "model_index.json", "scheduler_config.json", "vpae_jax.json"
VERSION = "0.33.0"  # the first Diffusers release with Wan


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `UserError` for a file that cannot be read, bad JSON, or anything but an object."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {one_line(str(error))}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
