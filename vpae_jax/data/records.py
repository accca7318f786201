"""Encoded clips on disk: what a distillation trains on, computed once.

A folder of records (`encoding.units` writes it) holds

    index.json                                    schema, fingerprint, shards with their shapes, sizes and checksums
    null.safetensors                              text states and mask of the negative prompt
    shards/00012-21x60x104x16-1f3a.array_record   clips of one unit and one shape of latents
    rejects.jsonl                                 what was not encoded, with the reason
    identity.json, units/, notes/                 what the encoding goes by (`encoding.units`)

A record is one clip in safetensors format, followed by the XXH3 checksum of those bytes (8 bytes). Its floats
are bfloat16; its text states end with the prompt; the mask channels of its condition frames are left out, since whether
a first frame is given shows in the frames; all else that is known of the clip is JSON in the header, under "about".

Records of prompts alone hold a clip's conditions and no latents; their shards say the size of those to be made.
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
# What the system says of a file that is lost or damaged. All else is said of the network, of permissions, of too many
# open files: it passes, and must not decide what is trained on.
LOST = (errno.EIO, errno.ENOENT)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

Value = Shaped[np.ndarray, "..."]
Arrays = Mapping[str, Value]
LatentShape = tuple[int, ...]


class BadRecord(Exception):
    """A record that is damaged, with the reason in one line."""


class NotFinite(UserError):
    """Arrays that no record takes, with the name of one in one line."""


class LatentRecords:
    """Random-access source over a folder of encoded clips, which is a path or an address in an object store.

    Threads may share it, and it may be sent to processes.

    Item i is a dict of numpy arrays, in bfloat16: `latents` [f, h, w, c], `text` [s, d] (zero beyond the prompt's end),
    `text_mask` [s] bool, and for image-to-video `image` [n, e] and `frames` [f, h, w, 4 + c]. Of prompts alone it has,
    in place of latents, the `size` [4] of those that are to be made, int64. Reading one raises
    `BadRecord` when it is damaged: lost, of another checksum, of other shapes than the index says, or not finite; and
    `UserError` when the file system or the store fails, which says nothing of the record.

    Attributes:
      index: what `index.json` says, but for the records' sizes.
      shapes: indices of the clips of each shape of latents, in order.
      of_prompts: whether they are prompts alone, without clips.
      null_text, null_mask: the negative prompt's states [s, d] and mask [s].

    Raises:
      UserError: no such folder, an encoding that has not ended, an index that is damaged or of another schema, a shard
        that is missing or cut short, a negative prompt that is damaged or not finite, a store that cannot be read.
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
        """An item of `from_teacher` records, with `seed`, uint32: of the noise that its clip was sampled from
        (`flow.draws.noise_of_seed`). Raises `BadRecord` as an item."""
        arrays, about = self._checked(index)
        seed = about.get("seed")
        if type(seed) is not int or not 0 <= seed < SEEDS:
            raise BadRecord(f"{self._name(index)}: its seed is {seed!r}")
        return {**arrays, "seed": np.asarray(seed, np.uint32)}

    def _checked(self, index: int) -> tuple[dict[str, Value], dict[str, Any]]:
        """An item, and what else is known of it."""
        shard, arrays, about = self._read(index)
        limit = self.index["text_tokens"]
        if shapes_of(arrays) != shard["shapes"] or len(arrays["text"]) > limit:
            found = {name: value.shape for name, value in arrays.items()}
            raise BadRecord(f"{self._name(index)}: its arrays are {found}, not as the index says")
        for name, value in arrays.items():
            if value.dtype != BFLOAT16:
                raise BadRecord(f"{self._name(index)}: {name} is of {value.dtype}, expected {BFLOAT16}")
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
        """Whether a teacher made the clips, each of noise whose seed its record keeps (`encoding.synthetic`)."""
        return "recipe" in self.index["identity"]

    def about(self, index: int) -> dict[str, Any]:
        """What else is known of a clip: its id and caption, where it comes from. Raises `BadRecord`."""
        about = self._read(index)[2]
        if not isinstance(about.get("caption", ""), str):
            raise BadRecord(f"{self._name(index)}: its caption is no text")
        return about

    def verify(self) -> None:
        """Reads every shard and compares checksums. Raises `UserError` for one that was damaged."""
        for shard in self._shards:
            if sha256(path := self.folder / shard["file"]) != shard["sha256"]:
                raise UserError(f"{path} is damaged; remove it and {again(self.folder)}")

    def _read(self, index: int) -> tuple[Mapping[str, Any], dict[str, Value], dict[str, Any]]:
        """A record's shard and what it holds."""
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
            raise UserError(f"{message}; when that has passed, run the same command again") from error
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
    """What a record keeps of a clip's arrays.

    Args:
      id: for messages.
      arrays: `latents` [f, h, w, c] unless it is a prompt alone, `text` [s, d] and what else is kept of the clip.
        `text_mask` [s], where it is given, tells the prompt's states, which lead, from those that are left out.
        `frames` [f, h, w, 4 + c] come with their mask channels.

    Raises:
      ValueError: frames with another mask than the one that is put back.
    """
    kept = dict(arrays)
    if "text_mask" in kept:
        kept["text"] = kept["text"][: int(kept.pop("text_mask").sum())]
    if "frames" in kept:
        bare = kept["frames"][..., MASK_CHANNELS:]
        if not np.array_equal(with_mask(bare)[..., :MASK_CHANNELS], kept["frames"][..., :MASK_CHANNELS]):
            raise ValueError(f"clip {id!r}: the mask of its condition frames does not give the first frame alone")
        kept["frames"] = bare
    return kept


def pack(id: str, kept: Arrays, about: Mapping[str, Any]) -> bytes:
    """One record's bytes.

    Args:
      id: kept in `about`, in place of one that is there, and used in messages.
      kept: as `stored` gives them.
      about: plain JSON.

    Raises:
      NotFinite: values that are not finite in bfloat16.
    """
    payload = to_safetensors(f"clip {id!r}", kept, {**about, "id": id})
    return payload + checksum(payload)


def checksum(payload: bytes | memoryview) -> bytes:
    """XXH3 of 64 bits, which costs a fourteenth of what CRC32 does; first byte first."""
    return xxhash.xxh3_64_digest(payload)


def unpack(record: UInt8[np.ndarray, "n"]) -> tuple[dict[str, Value], dict[str, Any]]:
    """A record's arrays, as they are stored, which are views of it, and what else it knows. Raises `BadRecord`."""
    payload = record.data[:-TAG_BYTES]
    found, expected = checksum(payload), record[-TAG_BYTES:].tobytes()
    if found != expected:
        raise BadRecord(f"its checksum is {found.hex()}, expected {expected.hex()}")
    return from_safetensors(payload)


def to_safetensors(name: str, arrays: Arrays, about: Mapping[str, Any]) -> bytes:
    """Arrays in safetensors format, floats in bfloat16. Raises `NotFinite` naming `name` if they are not finite."""
    stored = {}
    for key, value in arrays.items():
        value = np.asarray(value)
        if value.dtype == BFLOAT16 or np.issubdtype(value.dtype, np.floating):
            with np.errstate(over="ignore"):  # it becomes infinite, which is said below
                value = value.astype(BFLOAT16)
            if not is_finite(value):
                raise NotFinite(f"{name}: its {key} are not finite in bfloat16; check the encoders' weights")
        stored[key] = np.ascontiguousarray(value)
    return safetensors.numpy.save(stored, {"about": json.dumps(about)})


def from_safetensors(payload: bytes | memoryview) -> tuple[dict[str, Value], dict[str, Any]]:
    """What `to_safetensors` was given; arrays are views of the bytes. Raises `BadRecord` for another format."""
    try:
        start = 8 + int.from_bytes(payload[:8], "little")
        header = json.loads(bytes(payload[8:start]))
        about = json.loads(header.pop("__metadata__")["about"])
        if not isinstance(about, dict):
            raise ValueError("what it knows of its clip is no object")
        arrays = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            flat = np.frombuffer(payload[start + first : start + last], DTYPES[entry["dtype"]])
            arrays[name] = flat.reshape(entry["shape"])
        return arrays, about
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BadRecord(f"not a record: {' '.join(str(error).split())}") from error


def read_null(folder: Location, index: Mapping[str, Any]) -> tuple[Value, Value]:
    """The negative prompt's states [s, d] and mask [s] in a folder of records with this index.

    Raises:
      UserError: they are missing, damaged, not finite, or not of as many tokens and channels as the index says.
    """
    path = folder / NULL
    try:
        data = read_small(path, MAX_NULL)
        if data is None:
            raise BadRecord("it is missing")
        arrays, _ = from_safetensors(data)
        for name, dtype in (("text", BFLOAT16), ("text_mask", np.dtype(bool))):
            if name not in arrays or arrays[name].dtype != dtype or not is_finite(arrays[name]):
                raise BadRecord(f"its {name} is missing, not of {dtype}, or not finite")
        text, mask = arrays["text"], arrays["text_mask"]
        width = index["shards"][0]["shapes"]["text"] if index["shards"] else list(text.shape[1:])
        if text.ndim != 2 or list(text.shape) != [index["text_tokens"], *width] or mask.shape != text.shape[:1]:
            expected = [index["text_tokens"], *width]
            raise BadRecord(f"its text is of {list(text.shape)} and mask {list(mask.shape)}, expected {expected}")
    except (OSError, ValueError, BadRecord) as error:
        raise UserError(f"{path}: {error}; {again(folder)}") from error
    return text, mask


def with_mask(frames: Float[np.ndarray, "f h w c"]) -> Float[np.ndarray, "f h w c_frames"]:
    """Condition frames with their mask before them: 1 on the first latent frame, which is the one that is given. Where
    that is zero throughout, as no picture's latents are, none is given, and the mask is 0."""
    result = np.zeros((*frames.shape[:-1], MASK_CHANNELS + frames.shape[-1]), frames.dtype)
    result[:1, ..., :MASK_CHANNELS] = frames[:1].any()
    result[..., MASK_CHANNELS:] = frames
    return result


def is_finite(value: Value) -> bool:
    """Whether all values are finite. Of bfloat16 the exponent's bits tell it, ten times as fast as NumPy does."""
    if value.dtype == BFLOAT16:
        return bool((np.ascontiguousarray(value).view(np.uint16) & np.uint16(0x7FFF)).max(initial=0) < 0x7F80)
    return not np.issubdtype(value.dtype, np.floating) or bool(np.isfinite(value).all())


def shapes_of(arrays: Arrays) -> dict[str, list[int]]:
    """The shapes that all records of a shard have in common; of text states that is their width."""
    return {name: list(value.shape[1:] if name == "text" else value.shape) for name, value in sorted(arrays.items())}


def sha256(path: Location) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
