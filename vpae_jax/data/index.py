"""The index of a folder of records. It may come from elsewhere, so it is fully validated when it is read."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NoReturn

from vpae_jax.data.stores import Address, Location
from vpae_jax.placeholders import HEAD, placeholder_kind
from vpae_jax.types import UserError

SCHEMA = 2
INDEX, NULL, REJECTS, IDENTITY = "index.json", "null.safetensors", "rejects.jsonl", "identity.json"
MAX_INDEX = 2**28  # bytes, enough for about 20 million clips
_FINGERPRINT, _SHA256 = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"shards/[\w.-]+\.array_record", re.ASCII)  # any name, but inside the folder
_VIDEO_AXES = 4  # of latents and frames, of which all shards share only the number of channels

# A condition that a value must satisfy, and its description.
Rule = tuple[Callable[[Any], bool], str]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_size(value: Any) -> bool:
    return _is_count(value) and value > 0


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(size) is int and 0 < size < 2**63 for size in value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= 100


def _are_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_name(kind) and _is_count(count) for kind, count in value.items())


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_size, value))


def _is_video_shape(value: Any) -> bool:
    return _is_shape(value) and len(value) == _VIDEO_AXES


def _have_text(value: Any) -> bool:
    known = isinstance(value, dict) and "text" in value and all(map(_is_shape, value.values()))
    return known and len(value["text"]) == 1


def _are_shapes(value: Any) -> bool:
    return _have_text(value) and _is_video_shape(value.get("latents"))


def _are_of_prompts(value: Any) -> bool:
    return _have_text(value) and "latents" not in value


def _matches(pattern: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


_OF_INDEX: Mapping[str, Rule] = {
    "schema": (lambda value: type(value) is int, "a number"),
    "fingerprint": (_matches(_FINGERPRINT), "16 hexadecimal digits"),
    "identity": (lambda value: isinstance(value, dict), "an object"),
    "count": (_is_count, "a number of clips"),
    "rejects": (_are_counts, "numbers of rejects by kind"),
    "text_tokens": (_is_size, "a number of tokens"),
    "takes_image": (lambda value: isinstance(value, bool), "true or false"),
    "shards": (lambda value: isinstance(value, list), "a list"),
}
_OF_SHARD: Mapping[str, Rule] = {
    "file": (_matches(_FILE), "shards/NAME.array_record"),
    "bytes": (_is_size, "a number of bytes"),
    "sha256": (_matches(_SHA256), "64 hexadecimal digits"),
    "shapes": (_are_shapes, "shapes by name, four numbers of latents and one of text among them"),
    "sizes": (_are_sizes, "sizes of records"),
}
# For a shard of prompts alone, whose records have no clips but the size of those to generate.
_OF_PROMPTS: Mapping[str, Rule] = {
    **_OF_SHARD,
    "latent_size": (_is_video_shape, "four numbers, the size of the latents to generate"),
    "shapes": (_are_of_prompts, "shapes by name, one number of text and no latents among them"),
}


def read_index(folder: Location) -> dict[str, Any]:
    """Reads and validates the index of a folder of records, including that its shards lie in the folder, are at least
    as large as their records, and all have the same arrays.

    Raises:
      UserError: the index is missing, damaged, or of another schema; or a store cannot be read.
    """
    path = folder / INDEX
    try:
        data = read_small(path, MAX_INDEX)
        if data is None:
            _say_why_there_is_none(folder)
        index = json.loads(data)
        _check(index, {"schema": _OF_INDEX["schema"]}, "")
        if index["schema"] == SCHEMA:
            _check(index, _OF_INDEX, "")
            check_shards(index["shards"])
            if (found := sum(len(shard["sizes"]) for shard in index["shards"])) != index["count"]:
                raise ValueError(f"count is {index['count']}, its shards have {found} records")
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not an index of records ({reason}); {again(folder)}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; {again(folder)}") from error
    if index["schema"] != SCHEMA:
        raise UserError(
            f"{path}: schema {index['schema']}, expected {SCHEMA}; encode the clips again into another folder"
        )
    return index


def check_shards(shards: list[Any]) -> None:
    """Raises `ValueError` for an invalid shard entry, or for shards whose records have different arrays."""
    for number, shard in enumerate(shards):
        where = f"shards[{number}]"
        _check(shard, _OF_PROMPTS if isinstance(shard, dict) and "latent_size" in shard else _OF_SHARD, where)
        if (total := sum(shard["sizes"])) > shard["bytes"]:
            raise ValueError(f"{where}.sizes are {total} bytes together, but the file has {shard['bytes']}")
        if (found := common(shard)) != (expected := common(shards[0])):
            raise ValueError(f"{where}.shapes have {_shown(found)}, but those of shards[0] {_shown(expected)}")


def common(shard: Mapping[str, Any]) -> dict[str, list[int]]:
    """Returns what the records of all shards have in common: the shapes of their arrays, but only the number of
    channels of arrays that vary with the clip's size. For prompts alone, `latent_size` stands for the latents."""
    shapes = shard["shapes"] if has_clips(shard) else {**shard["shapes"], "latent_size": shard["latent_size"]}
    return {name: shape[-1:] if len(shape) == _VIDEO_AXES else shape for name, shape in sorted(shapes.items())}


def has_clips(shard: Mapping[str, Any]) -> bool:
    """Whether a shard's records contain clips, rather than prompts alone."""
    return "latent_size" not in shard


def latent_shape(shard: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the shape [f, h, w, c] of a shard's latents or, for prompts alone, of the latents to generate."""
    return tuple(shard["shapes"]["latents"] if has_clips(shard) else shard["latent_size"])


def of_prompts(index: Mapping[str, Any]) -> bool:
    """Whether the records of a non-empty folder are prompts alone."""
    return any(not has_clips(shard) for shard in index["shards"])


def check_shard(folder: Location, shard: Mapping[str, Any], size: int | None) -> None:
    """Raises `UserError` for a shard that is missing (`size` is None) or whose size differs from the index."""
    if size != shard["bytes"]:
        path, found = folder / shard["file"], "is missing" if size is None else f"has {size} bytes"
        with suppress(OSError):
            if size is not None and size <= HEAD:
                read_small(path, HEAD)  # raises if it is a placeholder
        raise UserError(f"{path} {found}, expected {shard['bytes']} bytes; {again(folder)}")


def file_size(path: Location) -> int | None:
    """Returns the size of a file in bytes; None if it does not exist. Raises `UserError` if a store cannot be read."""
    if isinstance(path, Address):
        return path.size()
    return path.stat().st_size if path.is_file() else None


def read_small(path: Location, most: int) -> bytes | None:
    """Reads a whole file; returns None if it does not exist.

    Raises:
      ValueError: the file has more than `most` bytes.
      OSError: the system cannot read it.
      UserError: a store cannot be read, or the file is a placeholder for another.
    """
    size = file_size(path)
    if size is None:
        return None
    if size > most:
        raise ValueError(f"it has {size} bytes, at most {most} are read")
    data = path.read_range(0, size) if isinstance(path, Address) else path.read_bytes()
    if what := placeholder_kind(data[:HEAD]):
        raise UserError(f"{path}: {what}")
    return data


def again(folder: Location) -> str:
    """Returns the remedy for a folder that is incomplete or damaged."""
    return "run the same encode command again" + (", then copy the folder again" if isinstance(folder, Address) else "")


def _say_why_there_is_none(folder: Location) -> NoReturn:
    if file_size(folder / IDENTITY) is not None:
        raise UserError(f"{folder}: its encoding is not finished; {again(folder)} to continue it")
    raise UserError(f"{folder} contains no encoded clips ({INDEX} is missing); encode some, or choose another folder")


def _check(value: Any, rules: Mapping[str, Rule], where: str) -> None:
    """Raises `ValueError` for a value that is not an object, or that violates the rules."""
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'it'} is {_shown(value)}, expected an object")
    for key, (holds, expected) in rules.items():
        name = f"{where}.{key}" if where else key
        if key not in value:
            raise ValueError(f"{name} is missing")
        if not holds(value[key]):
            raise ValueError(f"{name} is {_shown(value[key])}, expected {expected}")


def _shown(value: Any) -> str:
    """Formats a value from a file for a one-line message."""
    text = reprlib.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
