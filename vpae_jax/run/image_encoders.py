"""Finds the image encoder of a discriminator on pixels.

A kind of encoder is a function from a path to a `weights.image_encoders.StoredEncoder`. It reads the files that
`config.model.image_encoder` names, and downloads nothing else. The only kind included reads the CLIP tower of a model
directory, which image-to-video models have anyway; `docs/architecture.md` shows how to add another one, such as DINOv2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from vpae_jax.config import Experiment, nearest
from vpae_jax.methods.base import Method
from vpae_jax.run.first_weights import resolve_model
from vpae_jax.types import UserError
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.image_encoders import PART, StoredEncoder, clip

KINDS: Mapping[str, Callable[[Path], StoredEncoder]] = {"clip": clip}


def find(experiment: Experiment, method: Method, source: ModelDirectory | None, workdir: Path) -> StoredEncoder | None:
    """Returns the image encoder of a run; None if the method does not use pixels.

    Args:
      source: the model directory that the run starts from.

    Raises:
      UserError: there is no encoder, no such kind, or the kind rejects the files.
    """
    if all(role.part != PART for role in method.roles.values()):
        return None
    given = experiment.model.image_encoder
    if not given and source is not None:
        return clip(source)
    kind, _, path = given.rpartition(":")
    kind = kind or "clip"
    if kind not in KINDS:
        raise UserError(f"config.model.image_encoder: unknown kind {kind!r} of image encoder{nearest(kind, KINDS)}")
    return KINDS[kind](resolve_model(path, workdir))
