"""Writes a work unit's files: its clips in shards, one per shape, its rejects and notes."""

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
    """Collects a unit's clips and rejects; created by `Units.write`."""

    def __init__(self, hidden: Path, unit: int) -> None:
        self._hidden, self._unit = hidden, unit
        self._shards: dict[LatentShape, _Shard] = {}
        self._rejects: list[dict[str, str]] = []
        self._pictures: dict[int, str] = {}
        self._notes: list[Any] = []

    @property
    def clips(self) -> int:
        """The number of clips added."""
        return sum(len(shard.sizes) for shard in self._shards.values())

    def add(self, id: str, arrays: Arrays, about: Mapping[str, Any], size: LatentShape | None = None) -> None:
        """Adds a clip, or a prompt alone.

        Args:
          id: unique in the source.
          arrays: as returned by `LatentRecords`: `latents` [f, h, w, c], `text` [s, d], `text_mask` [s] (or trimmed
            text and no mask), and for image-to-video `image` [n, e] and `frames` [f, h, w, 4 + c]; of any float type.
          about: other information, as plain JSON.
          size: for a prompt alone, which has no latents, the shape [f, h, w, c] of those to generate.

        Raises:
          NotFinite: there are values that are not finite in bfloat16; the clip is not added.
          UserError: the disk is full.
        """
        shape, kept = size or arrays["latents"].shape, stored(id, arrays)
        record = pack(id, kept, about)  # may raise; do this before creating a shard, which must not stay empty
        if shape not in self._shards:
            name = f"{self._unit:05d}-{'x'.join(map(str, shape))}.array_record"
            self._shards[shape] = _Shard(self._hidden / name, shapes_of(kept), size)
        self._shards[shape].add(id, record, shapes_of(kept))

    def reject(self, reject: Reject) -> None:
        """Records a reject with its reason."""
        if reject.picture is not None:
            self._pictures[len(self._rejects)] = jpeg(reject.picture)
        self._rejects.append({"id": reject.id, "kind": reject.kind, "reason": reject.reason})

    def note(self, value: Any) -> None:
        """Stores a note for the summary, as plain JSON; `Units.read` returns it."""
        self._notes.append(value)

    def close(self) -> dict[str, Any]:
        """Finishes all files. Returns the content of the unit's file."""
        shards = [shard.close() for _, shard in sorted(self._shards.items())]
        facts = {"clips": sum(len(shard["sizes"]) for shard in shards), "shards": shards, "rejects": self._rejects}
        (self._hidden / "notes.json").write_text(json.dumps({"notes": self._notes, "pictures": self._pictures}))
        (self._hidden / "units.json").write_text(json.dumps(facts))
        return facts


class _Shard:
    """A shard being written: records whose arrays have the same shapes, or prompts alone for latents of one size."""

    def __init__(self, path: Path, shapes: dict[str, list[int]], size: LatentShape | None) -> None:
        self.path, self.shapes, self.size = path, shapes, size
        self.sizes: list[int] = []
        self._writer = ArrayRecordWriter(str(path), WRITING)

    def add(self, id: str, record: bytes, shapes: dict[str, list[int]]) -> None:
        if shapes != self.shapes:
            raise ValueError(f"clip {id!r} has arrays of shapes {shapes}, but earlier ones have {self.shapes}")
        with self._failures():
            self._writer.write(record)
            if not self._writer.ok():
                self._writer.close()  # raises with the reason
        self.sizes.append(len(record))

    def close(self) -> dict[str, Any]:
        """Finishes the file, reads all of it back, and renames it after its contents."""
        with self._failures():
            self._writer.close()
            reader = ArrayRecordReader(str(self.path))
            found = reader.num_records()
            reader.close()
            if found != len(self.sizes):
                raise RuntimeError(f"only {found} of {len(self.sizes)} records were written")
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
        """Converts write errors to `UserError`. ArrayRecord reports failed writes by a RuntimeError, often late, or not
        at all, in which case reading back fails."""
        try:
            yield
        except (RuntimeError, EOFError, BadRecord) as error:
            reason = " ".join(str(error).split(";")[0].removeprefix("write() failed: ").split())
            raise UserError(f"{self.path.parent.parent}: cannot be written: {reason}; {REMEDY}") from error
