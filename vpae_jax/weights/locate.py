"""Resolves a model name to a path: the embedded model, a folder or file, or a Hugging Face hub id."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from vpae_jax.types import UserError

EMBEDDED = "tiny"
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
# Files in repositories that do not belong to models.
_IGNORED = ["*.md", "*.jpg", "*.jpeg", "*.png", "*.gif", "*.mp4", "*.webp", "*.msgpack", "*.h5", "*.onnx", "*.ot"]


def locate(name: str | Path | None) -> Path:
    """The folder or file that a name stands for.

    Args:
      name: "tiny" or None for the model inside this package; a path; or `OWNER/NAME` or `OWNER/NAME@REVISION`,
        which is fetched from the Hugging Face hub, or taken from its local cache (with HF_HUB_OFFLINE=1, only from the
        cache).

    Raises:
      UserError: neither a path nor a repository of this name exists; the hub is unreachable and the repository is not
        in the cache; or the repository has file names that lead out of its folder.
    """
    if name is None or str(name) == EMBEDDED:
        return embedded_model()
    path = Path(name)
    if path.exists():
        return path
    match = HUB_ID.fullmatch(str(name))
    if match is None:
        raise UserError(f"{name}: no such folder or file; expected a model directory, a file of weights, or OWNER/NAME")
    return _fetch(match[1], match[2])


def embedded_model() -> Path:
    """The folder of the tiny model inside this package. Raises `UserError` if it was not installed."""
    folder = Path(str(importlib.resources.files("vpae_jax"))) / "assets" / "tiny"
    if not folder.is_dir():
        raise UserError(
            f"{folder}: the embedded model is missing; install the package again, or name a model directory"
        )
    return folder


def _fetch(repository: str, revision: str | None) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, ignore_patterns=_IGNORED))
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{repository}: no such folder, not in the hub's cache, and the hub cannot be reached; fetch it where "
            "there is a network, or correct the path"
        ) from error
    except (errors.HfHubHTTPError, OSError, ValueError) as error:  # ValueError: a name that leads out of the folder
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{repository}: no such folder, and the hub reports: {reason}") from error
