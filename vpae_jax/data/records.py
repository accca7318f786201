"""Records: clips encoded once and stored on disk, on which a distillation trains.

A folder of records (written by `encoding.units`) contains

    index.json                                    schema, fingerprint, shards with their shapes, sizes and checksums
    null.safetensors                              text states and mask of the negative prompt
    shards/00012-21x60x104x16-1f3a.array_record   clips of one work unit and one latent shape
    rejects.jsonl                                 what was not encoded, with the reason
    identity.json, units/, notes/                 state of the encoding (`encoding.units`)

A record is one clip in safetensors format, followed by the XXH3 checksum of those bytes (8 bytes). Its floats are
bfloat16; its text states are cut off at the end of the prompt; the mask channels of its condition frames are omitted,
since the frames show whether a first frame is given. All other information about the clip is JSON in the header, under
"about".

Records of prompts alone contain a clip's conditions but no latents; the index gives the size of those to generate.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
import xxhash
from jaxtyping import Float, Shaped, UInt8

from vpae_jax.data.index import (
    NULL,
    again,
    check_shard,
    file_size,
    has_clips,
    latent_shape,
    of_prompts,
    read_index,
    read_small,
)
from vpae_jax.data.shards import read_record, starts
from vpae_jax.data.stores import Address, Location
from vpae_jax.flow.draws import SEEDS
from vpae_jax.types import MASK_CHANNELS, UserError
from vpae_jax.weights.safetensors_file import DTYPES

TAG_BYTES = 8
MAX_NULL = 2**28  # bytes of the negative prompt's states, a hundred times those of Wan's text encoder
# Errors for a file that is lost or damaged. Other errors concern the network, permissions or the number of open files:
# they are transient, and must not influence what is trained on.
LOST = (errno.EIO, errno.ENOENT)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

Value = Shaped[np.ndarray, "..."]
Arrays = Mapping[str, Value]
LatentShape = tuple[int, ...]


class BadRecord(Exception):
    """A damaged record; the message is a one-line reason."""


class NotFinite(UserError):
    """Arrays with values that are not finite, which cannot be stored; the message names one of them."""


class LatentRecords:
    """Random access to a folder of records, given by a path or an address in an object store.

    It can be shared by threads and sent to other processes.

    Item i is a dict of numpy arrays, in bfloat16: `latents` [f, h, w, c], `text` [s, d] (zero after the end of the
    prompt), `text_mask` [s] bool, and for image-to-video `image` [n, e] and `frames` [f, h, w, 4 + c]. For prompts
    alone it has, instead of latents, the `size` [4] of those to generate, int64. Reading an item raises `BadRecord` if
    the record is lost or not finite, its checksum is wrong, or its shapes differ from the index; and `UserError` if the
    file system or the store fails, which says nothing about the record.

    Attributes:
      index: content of `index.json`, except the sizes of the records.
      shapes: indices of the clips for each latent shape, in order.
      of_prompts: whether the records are prompts alone, without clips.
      null_text, null_mask: the negative prompt's states [s, d] and mask [s].

    Raises:
      UserError: no such folder, an unfinished encoding, an index that is damaged or of another schema, a shard that is
        missing or cut short, a negative prompt that is damaged or not finite, or a store that cannot be read.
    """

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self.index = read_index(folder)
        self._shards = self.index["shards"]
        size_of = folder.sizes("shards").get if isinstance(folder, Address) else lambda name: file_size(folder / name)
        for shard in self._shards:
            check_shard(folder, shard, size_of(shard["file"]))
        sizes = [shard.pop("sizes") for shard in self._shards]
        counts = [len(some) for some in sizes]
        self._ends = np.cumsum(counts)
        self._sizes = np.array([size for some in sizes for size in some], np.int64)
        self._starts = np.array([start for some in sizes for start in starts(some)], np.int64)
        parts: dict[LatentShape, list[np.ndarray]] = {}
        for shard, count, end in zip(self._shards, counts, self._ends, strict=True):
            parts.setdefault(latent_shape(shard), []).append(np.arange(end - count, end))
        self.shapes: Mapping[LatentShape, np.ndarray] = {shape: np.concatenate(part) for shape, part in parts.items()}
        self.of_prompts = of_prompts(self.index)
        self.null_text, self.null_mask = read_null(folder, self.index)

    def __len__(self) -> int:
        return len(self._sizes)

    def __repr__(self) -> str:
        return f"LatentRecords({str(self.folder)!r}, fingerprint={self.index['fingerprint']})"

    def __getitem__(self, index: int) -> dict[str, Value]:
        return self._checked(index)[0]

    def with_seed(self, index: int) -> dict[str, Value]:
        """Returns an item of `from_teacher` records with its `seed` (uint32), which gives the noise that the clip was
        sampled from (`flow.draws.noise_of_seed`). Raises `BadRecord`."""
        arrays, about = self._checked(index)
        seed = about.get("seed")
        if type(seed) is not int or not 0 <= seed < SEEDS:
            raise BadRecord(f"{self._name(index)}: its seed is {seed!r}")
        return {**arrays, "seed": np.asarray(seed, np.uint32)}

    def _checked(self, index: int) -> tuple[dict[str, Value], dict[str, Any]]:
        """Returns an item after validation, and the other information about it."""
        shard, arrays, about = self._read(index)
        limit = self.index["text_tokens"]
        if shapes_of(arrays) != shard["shapes"] or len(arrays["text"]) > limit:
            found = {name: value.shape for name, value in arrays.items()}
            raise BadRecord(f"{self._name(index)}: its arrays are {found}, which differs from the index")
        for name, value in arrays.items():
            if value.dtype != BFLOAT16:
                raise BadRecord(f"{self._name(index)}: {name} has dtype {value.dtype}, expected {BFLOAT16}")
            if not is_finite(value):
                raise BadRecord(f"{self._name(index)}: {name} is not finite")
        tokens, width = arrays["text"].shape
        text = np.zeros((limit, width), arrays["text"].dtype)
        text[:tokens] = arrays["text"]
        result = {**arrays, "text": text, "text_mask": np.arange(limit) < tokens}
        if "frames" in result:
            result["frames"] = with_mask(result["frames"])
        if not has_clips(shard):
            result["size"] = np.array(shard["latent_size"], np.int64)
        return result, about

    @property
    def from_teacher(self) -> bool:
        """Whether a teacher generated the clips, so that records contain the seeds of their noise
        (`encoding.synthetic`)."""
        return "recipe" in self.index["identity"]

    def about(self, index: int) -> dict[str, Any]:
        """Returns the other information about a clip: its id, caption and origin. Raises `BadRecord`."""
        about = self._read(index)[2]
        if not isinstance(about.get("caption", ""), str):
            raise BadRecord(f"{self._name(index)}: its caption is not text")
        return about

    def verify(self) -> None:
        """Reads every shard and verifies its checksum. Raises `UserError` for a damaged one."""
        for shard in self._shards:
            if sha256(path := self.folder / shard["file"]) != shard["sha256"]:
                raise UserError(f"{path} is damaged; remove it and {again(self.folder)}")

    def _read(self, index: int) -> tuple[Mapping[str, Any], dict[str, Value], dict[str, Any]]:
        """Returns the shard entry of a record, its arrays, and the other information about it."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = self._shards[int(np.searchsorted(self._ends, index, "right"))]
        start, size = int(self._starts[index]), int(self._sizes[index])
        try:
            arrays, about = unpack(read_record(self.folder / shard["file"], start, size))
        except OSError as error:
            message = f"{self._name(index)}: cannot be read: {error.strerror}"
            if error.errno in LOST:
                raise BadRecord(message) from error
            raise UserError(f"{message}; once this is resolved, run the same command again") from error
        except EOFError as error:
            raise BadRecord(f"{self._name(index)}: cannot be read: {error}") from error
        except BadRecord as error:
            raise BadRecord(f"{self._name(index)}: {error}") from error
        return shard, arrays, about

    def _name(self, index: int) -> str:
        number = int(np.searchsorted(self._ends, index, "right"))
        first = int(self._ends[number - 1]) if number else 0
        return f"{self.folder / self._shards[number]['file']}, record {index - first}"


def stored(id: str, arrays: Arrays) -> dict[str, Value]:
    """Reduces a clip's arrays to what its record stores.

    Args:
      id: used in messages.
      arrays: `latents` [f, h, w, c] unless it is a prompt alone, `text` [s, d], and the other arrays of the clip. If
        `text_mask` [s] is given, only the leading text states that it selects are kept. `frames` [f, h, w, 4 + c]
        include their mask channels.

    Raises:
      ValueError: the mask of the frames is not the one that reading would restore.
    """
    kept = dict(arrays)
    if "text_mask" in kept:
        kept["text"] = kept["text"][: int(kept.pop("text_mask").sum())]
    if "frames" in kept:
        bare = kept["frames"][..., MASK_CHANNELS:]
        if not np.array_equal(with_mask(bare)[..., :MASK_CHANNELS], kept["frames"][..., :MASK_CHANNELS]):
            raise ValueError(f"clip {id!r}: the mask of its condition frames does not mark exactly the first frame")
        kept["frames"] = bare
    return kept


def pack(id: str, kept: Arrays, about: Mapping[str, Any]) -> bytes:
    """Serialises one record.

    Args:
      id: stored in `about` (overriding an existing id), and used in messages.
      kept: arrays as returned by `stored`.
      about: plain JSON.

    Raises:
      NotFinite: there are values that are not finite in bfloat16.
    """
    payload = to_safetensors(f"clip {id!r}", kept, {**about, "id": id})
    return payload + checksum(payload)


def checksum(payload: bytes | memoryview) -> bytes:
    """Returns the 64-bit XXH3, big-endian; it costs a fourteenth of CRC32."""
    return xxhash.xxh3_64_digest(payload)


def unpack(record: UInt8[np.ndarray, "n"]) -> tuple[dict[str, Value], dict[str, Any]]:
    """Returns a record's arrays as stored (views of the record), and the other information. Raises `BadRecord`."""
    payload = record.data[:-TAG_BYTES]
    found, expected = checksum(payload), record[-TAG_BYTES:].tobytes()
    if found != expected:
        raise BadRecord(f"its checksum is {found.hex()}, expected {expected.hex()}")
    return from_safetensors(payload)


def to_safetensors(name: str, arrays: Arrays, about: Mapping[str, Any]) -> bytes:
    """Serialises arrays in safetensors format, floats as bfloat16. Raises `NotFinite`, naming `name`, for values that
    are not finite."""
    stored = {}
    for key, value in arrays.items():
        value = np.asarray(value)
        if value.dtype == BFLOAT16 or np.issubdtype(value.dtype, np.floating):
            with np.errstate(over="ignore"):  # overflow gives infinity, which is reported below
                value = value.astype(BFLOAT16)
            if not is_finite(value):
                raise NotFinite(f"{name}: its {key} are not finite in bfloat16; check the encoders' weights")
        stored[key] = np.ascontiguousarray(value)
    return safetensors.numpy.save(stored, {"about": json.dumps(about)})


def from_safetensors(payload: bytes | memoryview) -> tuple[dict[str, Value], dict[str, Any]]:
    """Reverses `to_safetensors`; the arrays are views of the bytes. Raises `BadRecord` for another format."""
    try:
        start = 8 + int.from_bytes(payload[:8], "little")
        header = json.loads(bytes(payload[8:start]))
        about = json.loads(header.pop("__metadata__")["about"])
        if not isinstance(about, dict):
            raise ValueError("the information about its clip is not an object")
        arrays = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            flat = np.frombuffer(payload[start + first : start + last], DTYPES[entry["dtype"]])
            arrays[name] = flat.reshape(entry["shape"])
        return arrays, about
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BadRecord(f"not a record: {' '.join(str(error).split())}") from error


def read_null(folder: Location, index: Mapping[str, Any]) -> tuple[Value, Value]:
    """Reads the negative prompt's states [s, d] and mask [s] from a folder of records with this index.

    Raises:
      UserError: they are missing, damaged, not finite, or differ from the index in their number of tokens or channels.
    """
    path = folder / NULL
    try:
        data = read_small(path, MAX_NULL)
        if data is None:
            raise BadRecord("it is missing")
        arrays, _ = from_safetensors(data)
        for name, dtype in (("text", BFLOAT16), ("text_mask", np.dtype(bool))):
            if name not in arrays or arrays[name].dtype != dtype or not is_finite(arrays[name]):
                raise BadRecord(f"its {name} is missing, not {dtype}, or not finite")
        text, mask = arrays["text"], arrays["text_mask"]
        width = index["shards"][0]["shapes"]["text"] if index["shards"] else list(text.shape[1:])
        if text.ndim != 2 or list(text.shape) != [index["text_tokens"], *width] or mask.shape != text.shape[:1]:
            expected = [index["text_tokens"], *width]
            raise BadRecord(f"its text has shape {list(text.shape)} and mask {list(mask.shape)}, expected {expected}")
    except (OSError, ValueError, BadRecord) as error:
        raise UserError(f"{path}: {error}; {again(folder)}") from error
    return text, mask


def with_mask(frames: Float[np.ndarray, "f h w c"]) -> Float[np.ndarray, "f h w c_frames"]:
    """Prepends the mask to condition frames: 1 on the first latent frame, which is the given one. If that frame is all
    zeros, which no image's latents are, no frame is given and the mask is 0."""
    result = np.zeros((*frames.shape[:-1], MASK_CHANNELS + frames.shape[-1]), frames.dtype)
    result[:1, ..., :MASK_CHANNELS] = frames[:1].any()
    result[..., MASK_CHANNELS:] = frames
    return result


def is_finite(value: Value) -> bool:
    """Whether all values are finite. For bfloat16 this tests the exponent bits, ten times as fast as NumPy."""
    if value.dtype == BFLOAT16:
        return bool((np.ascontiguousarray(value).view(np.uint16) & np.uint16(0x7FFF)).max(initial=0) < 0x7F80)
    return not np.issubdtype(value.dtype, np.floating) or bool(np.isfinite(value).all())


def shapes_of(arrays: Arrays) -> dict[str, list[int]]:
    """Returns the shapes that all records of a shard have in common; for text states only their width."""
    return {name: list(value.shape[1:] if name == "text" else value.shape) for name, value in sorted(arrays.items())}


def sha256(path: Location) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
