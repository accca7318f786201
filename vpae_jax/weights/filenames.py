"""The names of a model directory's JSON files, and functions to read and write them."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpae_jax.placeholders import HEAD, placeholder_kind
from vpae_jax.types import UserError
from vpae_jax.weights.safetensors_file import one_line

# `SETTINGS` holds settings that Diffusers has no place for, and does not read.
CONFIG, INDEX, SCHEDULER, SETTINGS = "config.json", "model_index.json", "scheduler_config.json", "vpae_jax.json"
PRODUCT = "model"  # name of the model directory that a run writes into its workdir
# Classes in a causal model's index, which Diffusers does not have: its own would let all frames see each other.
CAUSAL_PIPELINE, CAUSAL_TRANSFORMER = "CausalWanPipeline", "CausalWanTransformer3DModel"
# A key of model_index.json that says how the model is sampled. Diffusers passes over keys that begin like this one, and
# warns of all others that it does not know.
SAMPLING = "_sampling"
VERSION = "0.33.0"  # the first Diffusers release with Wan
MAX_JSON = 2**24  # bytes


def read_bytes(path: Path, limit: int = MAX_JSON) -> bytes:
    """A file's bytes. Raises `UserError` if it cannot be read, is not a regular file, or is larger than `limit`."""
    try:
        # Without O_NONBLOCK, opening a pipe would block until there is a writer.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{path}: is not a regular file, expected a JSON file; remove it or fetch it again")
            raw = file.read(limit + 1)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > limit:
        raise UserError(f"{path}: has more than {limit} bytes, too many for such a file; fetch it again")
    return raw


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises `UserError` as `read_bytes`, for invalid JSON, and for anything but an object."""
    raw = read_bytes(path)
    if (what := placeholder_kind(raw[:HEAD])) is not None:
        raise UserError(f"{path}: {what}")
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {one_line(str(error))}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
