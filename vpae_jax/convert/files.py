"""Safetensors on disk: one file, or shards with an index, read and written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vpae_jax.types import UserError

Array = Shaped[np.ndarray, "..."]
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Tensors:
    """The tensors of a part's folder.

    Attributes:
      files: each tensor's open file.
      where: each tensor's file, as a path for messages.
      shapes: each tensor's shape.
    """

    files: Mapping[str, Any]
    where: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    def __getitem__(self, name: str) -> Array:
        """Reads one tensor; bfloat16 comes as `ml_dtypes.bfloat16`."""
        try:
            return self.files[name].get_tensor(name)
        except (SafetensorError, TypeError) as error:
            raise UserError(f"{self.where[name]}: tensor {name!r} cannot be read: {error}") from error


@contextmanager
def open_tensors(folder: Path, stem: str) -> Iterator[Tensors]:
    """Opens `<stem>.safetensors`, or the shards that `<stem>.safetensors.index.json` lists.

    Raises:
      UserError: no weights; a shard that is missing, truncated or no safetensors file; a tensor that two shards hold,
        or that is not in the shard that the index names.
    """
    index = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict):
            raise UserError(f"{index}: no 'weight_map'; expected an index of safetensors shards")
        paths = [folder / name for name in sorted(set(listed.values()))]
    else:
        listed, paths = None, [single]
    files: dict[str, Any] = {}
    where: dict[str, str] = {}
    with ExitStack() as stack:
        for path in paths:
            handle = stack.enter_context(_open(path))
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                if name in files:
                    raise UserError(f"{path}: tensor {name!r} is also in {where[name]}; remove one")
                files[name], where[name] = handle, str(path)
        if listed is not None:
            for name, file in listed.items():
                if where.get(name) != str(folder / file):
                    raise UserError(f"{index}: tensor {name!r} is listed in {file}, but is not there")
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name, handle in files.items()}
        yield Tensors(files, where, shapes)


def write_tensors(
    folder: Path,
    stem: str,
    sizes: Mapping[str, int],
    tensors: Iterable[tuple[str, Array]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes tensors in order, holding one shard in memory at a time; more than one shard gets an index.

    Args:
      folder: where to write.
      stem: file name without suffix.
      sizes: bytes of each tensor, in the order in which `tensors` brings them.
      tensors: names and values.
      shard_bytes: a shard is closed before it would grow beyond this.
    """
    shard_of: dict[str, int] = {}
    shard, used = 0, 0
    for name, size in sizes.items():
        if used and used + size > shard_bytes:
            shard, used = shard + 1, 0
        shard_of[name], used = shard, used + size
    count = shard + 1
    file_name = f"{stem}.safetensors" if count == 1 else stem + "-{:05d}-of-{:05d}.safetensors"
    pending: dict[str, Array] = {}
    current = 0
    for name, value in tensors:
        if shard_of[name] != current:
            save_file(pending, folder / file_name.format(current + 1, count), metadata={"format": "pt"})
            pending, current = {}, shard_of[name]
        pending[name] = value
    save_file(pending, folder / file_name.format(current + 1, count), metadata={"format": "pt"})
    if count > 1:
        weight_map = {name: file_name.format(number + 1, count) for name, number in shard_of.items()}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `UserError` for a missing file, bad JSON, or anything but an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "np")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; the weights are incomplete") from error
    except SafetensorError as error:
        raise UserError(f"{path}: truncated or not a safetensors file ({error}); fetch it again") from error
