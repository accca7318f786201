"""Writes a folder of records, one work unit at a time.

A unit exists completely or not at all: its shards and notes are written under hidden names and then moved into place;
`units/00012.json`, which is moved last, marks it as done. Shards are named after their contents, so that two processes
writing the same unit do not overwrite each other's files. A process that is killed leaves finished units and hidden
files, which later processes remove; the same command continues with the missing units.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpae_jax.data.index import (
    IDENTITY,
    INDEX,
    NULL,
    REJECTS,
    SCHEMA,
    check_shard,
    check_shards,
    file_size,
    read_index,
)
from vpae_jax.data.records import Arrays, read_null, to_safetensors
from vpae_jax.encoding.clip_source import Reject
from vpae_jax.encoding.identity import Identity, differences
from vpae_jax.encoding.unit_writer import UnitWriter
from vpae_jax.files import here, lives, refused_writes
from vpae_jax.types import UserError

# Raised when damaged JSON is parsed and used.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
TOLD = 3  # maximum number of differing settings named in a message
_HIDDEN = re.compile(r"\.(?P<label>unit-\d+|finish)\.(?P<host>.+)\.(?P<pid>\d+)\.(?P<token>[0-9a-f]+)\.tmp")


@dataclass(frozen=True)
class Contents:
    """What a finished unit's files say about it.

    Attributes:
      clips: number of clips.
      rejects: the rejects in order, without pictures.
      pictures: pictures of some rejects, by index, encoded by `pages.jpeg`.
      notes: the arguments of `UnitWriter.note`, in order.
    """

    clips: int
    rejects: tuple[Reject, ...]
    pictures: Mapping[int, str]
    notes: tuple[Any, ...]


class Units:
    """A folder of records being written, by one process or several.

    Args:
      folder: created if it does not exist.
      identity: everything that determines the records, as plain JSON: source, encoders, sizes.
      count: number of units.

    Raises:
      UserError: the folder contains records with another identity (the message names the settings that differ) or
        something else, or cannot be written.
    """

    def __init__(self, folder: Path, identity: Identity, count: int) -> None:
        self.folder, self.count = folder, count
        self.identity = json.loads(json.dumps({"schema": SCHEMA, **identity, "units": count}))
        self._token = secrets.token_hex(4)
        path = folder / IDENTITY
        if not path.is_file():
            if (folder / INDEX).is_file():
                raise UserError(f"{folder} holds records of another version; choose another folder")
            others = folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir())
            if others and not path.is_file():  # otherwise another process has just created it
                raise UserError(f"{folder} is not empty and holds no records; choose another folder")
            with self._workspace("finish") as hidden:
                (hidden / IDENTITY).write_text(json.dumps(self.identity, indent=1) + "\n")
                (hidden / IDENTITY).replace(path)
        try:
            found = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: {error}; choose another folder") from error
        if others := list(differences(found, self.identity, "" if isinstance(found, dict) else IDENTITY)):
            more = f"; {len(others) - TOLD} more differ" if len(others) > TOLD else ""
            raise UserError(f"{folder} holds other records: {'; '.join(others[:TOLD])}{more}; choose another folder")
        self._sweep(everything=False)

    @property
    def fingerprint(self) -> str:
        """A hash (16 hexadecimal digits) of the identity."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    def pending(self, process: int = 0, processes: int = 1) -> list[int]:
        """Returns this process's share of the units that are not done, or whose files are missing or cut short."""
        return [unit for unit in range(process, self.count, processes) if self._facts(unit) is None]

    @contextmanager
    def write(self, unit: int) -> Iterator[UnitWriter]:
        """Yields a writer to which a unit's clips are added. The unit is done when the block ends, and unchanged if it
        raises.

        Raises:
          UserError: the files cannot be written.
        """
        with self._workspace(f"unit-{unit:05d}") as hidden:
            writer = UnitWriter(hidden, unit)
            yield writer
            facts = writer.close()
            if self._facts(unit) is not None:  # another process was faster
                return
            for file, place in ((hidden / Path(s["file"]).name, self.folder / s["file"]) for s in facts["shards"]):
                place.parent.mkdir(exist_ok=True)
                file.replace(place)
            for kind in ("notes", "units"):  # the last one marks the unit as done
                (self.folder / kind).mkdir(exist_ok=True)
                (hidden / f"{kind}.json").replace(self._file(kind, unit))

    def read(self, unit: int) -> Contents:
        """Reads what a finished unit's files say about it. Raises `UserError` if they are damaged."""
        facts = self._facts(unit)
        if facts is None:
            raise UserError(f"{self._file('units', unit)} is damaged; run the same encode command again")
        path = self._file("notes", unit)
        try:
            notes = json.loads(path.read_text())
            pictures = {int(place): text for place, text in notes["pictures"].items()}
            rejects = tuple(Reject(**reject) for reject in facts["rejects"])
            return Contents(facts["clips"], rejects, pictures, tuple(notes["notes"]))
        except (OSError, *MALFORMED) as error:
            raise UserError(f"{path} is damaged; remove it and run the same encode command again") from error

    def complete(self) -> bool:
        """Whether all units are done and the folder can be read, so that `finish` has nothing left to do."""
        try:
            index = read_index(self.folder)
            read_null(self.folder, index)
        except UserError:
            return False
        if not (self.folder / REJECTS).is_file():
            return False
        shards: list[Any] = []
        found = self._collect(shards.append, lambda _: None)
        return found is not None and all(index.get(key) == value for key, value in {**found, "shards": shards}.items())

    def put(self, name: str, text: str) -> None:
        """Writes a text file into the folder, atomically. Raises `UserError` if it cannot be written."""
        with self._workspace("finish") as hidden:
            (hidden / name).write_text(text, encoding="utf-8")
            (hidden / name).replace(self.folder / name)

    def finish(self, null: Arrays, facts: Mapping[str, Any]) -> bool:
        """Completes the folder if all units are done: writes the negative prompt, the list of rejects, and finally the
        index.

        Several processes may call it, even at the same time, and repeatedly.

        Args:
          null: `text` [s, d] and `text_mask` [s] of the negative prompt.
          facts: further entries of the index: `text_tokens`, `takes_image`.

        Returns:
          Whether all units are done.
        """
        used: set[str] = set()
        with self._workspace("finish") as hidden:
            # Written while units are read, since there may be many thousands of them.
            with (hidden / REJECTS).open("w") as rejects, (hidden / INDEX).open("w") as index:

                def add_shard(shard: Mapping[str, Any]) -> None:
                    index.write((",\n" if used else "\n") + json.dumps(shard))
                    used.add(shard["file"])

                index.write('{"shards": [')
                found = self._collect(add_shard, lambda reject: rejects.write(json.dumps(reject) + "\n"))
                if found is None:
                    return False
                index.write("\n],\n" + json.dumps({**facts, **found}, indent=1).removeprefix("{\n") + "\n")
            (hidden / NULL).write_bytes(to_safetensors("the negative prompt", null, {}))
            for name in (NULL, REJECTS, INDEX):
                (hidden / name).replace(self.folder / name)
        for path in (self.folder / "shards").glob("*.array_record"):
            if f"shards/{path.name}" not in used:
                path.unlink(missing_ok=True)
        self._sweep(everything=True)
        return True

    def _collect(
        self, shard: Callable[[Mapping[str, Any]], object], reject: Callable[[Mapping[str, Any]], object]
    ) -> dict[str, Any] | None:
        """Returns the entries of the index except the shards; None if some units are not done. `shard` and `reject` are
        called for each shard and reject."""
        kinds, clips = Counter[str](), 0
        for unit in range(self.count):
            if (found := self._facts(unit)) is None:
                return None
            for one in found["shards"]:
                shard(one)
            for one in found["rejects"]:
                kinds[one["kind"]] += 1
                reject(one)
            clips += found["clips"]
        return {
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            "count": clips,
            "rejects": dict(sorted(kinds.items())),
            "identity": self.identity,
        }

    def _facts(self, unit: int) -> dict[str, Any] | None:
        """Returns the content of a unit's file if the unit is done and its shards are complete; else None."""
        try:
            facts = json.loads(self._file("units", unit).read_text())
            check_shards(facts["shards"])
            for shard in facts["shards"]:
                check_shard(self.folder, shard, file_size(self.folder / shard["file"]))
            for reject in facts["rejects"]:
                Reject(**reject)
            whole = facts["clips"] == sum(len(shard["sizes"]) for shard in facts["shards"])
        except (FileNotFoundError, UserError, *MALFORMED):
            return None
        return facts if whole and self._file("notes", unit).is_file() else None

    def _file(self, kind: str, unit: int) -> Path:
        return self.folder / kind / f"{unit:05d}.json"

    @contextmanager
    def _workspace(self, label: str) -> Iterator[Path]:
        """Yields a hidden folder of this process, which is removed in the end. Write errors become `UserError`s."""
        hidden = self.folder / f".{label}.{here()}.{os.getpid()}.{self._token}.tmp"
        with refused_writes(self.folder):
            hidden.mkdir(parents=True)
            try:
                yield hidden
            except (OSError, UserError) as error:
                if hidden.is_dir():
                    raise
                raise UserError(
                    f"{hidden} was removed by another process while in use; run the same command again"
                ) from error
            finally:
                shutil.rmtree(hidden, ignore_errors=True)

    def _sweep(self, everything: bool) -> None:
        """Removes leftovers of killed processes: those of this host and, when everything is done, those of other hosts,
        too. Only processes visible to this one can be checked for being alive (see `files.here`)."""
        for entry in self.folder.iterdir():
            if (name := _HIDDEN.fullmatch(entry.name)) is None:
                continue
            if name["host"] != here():
                dead = everything and name["label"] != "finish"
            elif int(name["pid"]) == os.getpid():  # an earlier process with the same id, in a restarted container
                dead = name["token"] != self._token
            else:
                dead = not lives(int(name["pid"]))
            if dead:
                shutil.rmtree(entry, ignore_errors=True)
