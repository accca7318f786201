"""A unit's files in the making: its clips in shards of one shape each, its rejects and notes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from vpae_jax.data.records import Arrays, BadRecord, LatentShape, pack, sha256, shapes_of, stored, unpack
from vpae_jax.data.shards import WRITING, read_record, starts
from vpae_jax.encoding.clip_source import Reject
from vpae_jax.files import REMEDY
from vpae_jax.pages import jpeg
from vpae_jax.types import UserError


class UnitWriter:
    """Takes a unit's clips and rejects; made by `Units.write`."""

    def __init__(self, hidden: Path, unit: int) -> None:
        self._hidden, self._unit = hidden, unit
        self._shards: dict[LatentShape, _Shard] = {}
        self._rejects: list[dict[str, str]] = []
        self._pictures: dict[int, str] = {}
        self._notes: list[Any] = []

    @property
    def clips(self) -> int:
        """How many were added."""
        return sum(len(shard.sizes) for shard in self._shards.values())

    def add(self, id: str, arrays: Arrays, about: Mapping[str, Any], size: LatentShape | None = None) -> None:
        """Adds a clip, or a prompt alone.

        Args:
          id: unique in the source.
          arrays: as `LatentRecords` gives them back: `latents` [f, h, w, c], `text` [s, d], `text_mask` [s] (or trimmed
            text and no mask), and for image-to-video `image` [n, e] and `frames` [f, h, w, 4 + c]; of any float type.
          about: what else is known of it, as plain JSON.
          size: [f, h, w, c] of the latents that are to be made, of a prompt alone, which has none.

        Raises:
          NotFinite: values that are not finite in bfloat16; the clip is left out.
          UserError: a disk that is full.
        """
        shape, kept = size or arrays["latents"].shape, stored(id, arrays)
        record = pack(id, kept, about)  # before there is a shard for it, which must not stay empty
        if shape not in self._shards:
            name = f"{self._unit:05d}-{'x'.join(map(str, shape))}.array_record"
            self._shards[shape] = _Shard(self._hidden / name, shapes_of(kept), size)
        self._shards[shape].add(id, record, shapes_of(kept))

    def reject(self, reject: Reject) -> None:
        """Lists what is not used, with the reason."""
        if reject.picture is not None:
            self._pictures[len(self._rejects)] = jpeg(reject.picture)
        self._rejects.append({"id": reject.id, "kind": reject.kind, "reason": reject.reason})

    def note(self, value: Any) -> None:
        """Keeps something for the summary, as plain JSON; `Units.read` gives it back."""
        self._notes.append(value)

    def close(self) -> dict[str, Any]:
        """Ends all files. Returns what the unit's file says."""
        shards = [shard.close() for _, shard in sorted(self._shards.items())]
        facts = {"clips": sum(len(shard["sizes"]) for shard in shards), "shards": shards, "rejects": self._rejects}
        (self._hidden / "notes.json").write_text(json.dumps({"notes": self._notes, "pictures": self._pictures}))
        (self._hidden / "units.json").write_text(json.dumps(facts))
        return facts


class _Shard:
    """A shard that is being written, of records with arrays of the same shapes; of prompts alone, for latents of one
    size."""

    def __init__(self, path: Path, shapes: dict[str, list[int]], size: LatentShape | None) -> None:
        self.path, self.shapes, self.size = path, shapes, size
        self.sizes: list[int] = []
        self._writer = ArrayRecordWriter(str(path), WRITING)

    def add(self, id: str, record: bytes, shapes: dict[str, list[int]]) -> None:
        if shapes != self.shapes:
            raise ValueError(f"clip {id!r} has arrays of {shapes}, those before it of {self.shapes}")
        with self._failures():
            self._writer.write(record)
            if not self._writer.ok():
                self._writer.close()  # which says why
        self.sizes.append(len(record))

    def close(self) -> dict[str, Any]:
        """Ends the file, reads all of it back, and names it by its contents."""
        with self._failures():
            self._writer.close()
            reader = ArrayRecordReader(str(self.path))
            found = reader.num_records()
            reader.close()
            if found != len(self.sizes):
                raise RuntimeError(f"{found} of {len(self.sizes)} records are there")
            for start, size in zip(starts(self.sizes), self.sizes, strict=True):
                unpack(read_record(self.path, start, size))
        digest = sha256(self.path)
        named = self.path.with_name(f"{self.path.stem}-{digest[:8]}{self.path.suffix}")
        self.path.rename(named)
        return {
            "file": f"shards/{named.name}",
            "bytes": named.stat().st_size,
            "sha256": digest,
            "shapes": self.shapes,
            "sizes": self.sizes,
            **({} if self.size is None else {"latent_size": list(self.size)}),
        }

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """ArrayRecord says by a RuntimeError, and often late, that the system did not let it write; or not at all, but
        then what is read back is not what was written."""
        try:
            yield
        except (RuntimeError, EOFError, BadRecord) as error:
            reason = " ".join(str(error).split(";")[0].removeprefix("write() failed: ").split())
            raise UserError(f"{self.path.parent.parent}: cannot be written: {reason}; {REMEDY}") from error
