"""A folder of records in the making, unit by unit.

A unit is there whole or not at all: its shards and notes are written under hidden names and moved to their places, and
`units/00012.json`, which is moved last, makes it done. Shards are named by what is in them, so that two processes that
write the same unit do not touch each other's files. A process that is killed at any moment leaves finished units and
hidden files, which are removed by those who come later; the same command continues with the units that are missing.
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

# What reading JSON that has been damaged, and using it, ends in.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
TOLD = 3  # settings that differ are named, at most
_HIDDEN = re.compile(r"\.(?P<label>unit-\d+|finish)\.(?P<host>.+)\.(?P<pid>\d+)\.(?P<token>[0-9a-f]+)\.tmp")


@dataclass(frozen=True)
class Contents:
    """What a finished unit says of itself.

    Attributes:
      clips: how many it holds.
      rejects: what was refused, in order, without pictures.
      pictures: of some rejects, by their places, as `pages.jpeg` makes them.
      notes: what `UnitWriter.note` was given, in order.
    """

    clips: int
    rejects: tuple[Reject, ...]
    pictures: Mapping[int, str]
    notes: tuple[Any, ...]


class Units:
    """A folder of records that is being written, by one process or several.

    Args:
      folder: made when it is not there.
      identity: what decides the records, as plain JSON: source, encoders, sizes.
      count: number of units.

    Raises:
      UserError: the folder holds records of another identity (naming the settings that differ) or something else, or
        cannot be written.
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
            if others and not path.is_file():  # else another process has just begun
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
        """16 hexadecimal digits of the identity."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    def pending(self, process: int = 0, processes: int = 1) -> list[int]:
        """Units that are not done, or whose files are missing or cut short: those that this process is to write."""
        return [unit for unit in range(process, self.count, processes) if self._facts(unit) is None]

    @contextmanager
    def write(self, unit: int) -> Iterator[UnitWriter]:
        """Where a unit's clips are added. It is done when the block ends, and untouched when it raises.

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
            for kind in ("notes", "units"):  # this order makes the unit done
                (self.folder / kind).mkdir(exist_ok=True)
                (hidden / f"{kind}.json").replace(self._file(kind, unit))

    def read(self, unit: int) -> Contents:
        """What a finished unit says of itself. Raises `UserError` when its files are damaged."""
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
        """Whether all units are done and the folder can be read: `finish` has nothing to add."""
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
        """Writes a text file into the folder, whole or not at all. Raises `UserError` when it cannot be written."""
        with self._workspace("finish") as hidden:
            (hidden / name).write_text(text, encoding="utf-8")
            (hidden / name).replace(self.folder / name)

    def finish(self, null: Arrays, facts: Mapping[str, Any]) -> bool:
        """Makes the folder readable, when all units are done: the negative prompt, the list of rejects, the index last.

        Several processes may call it, at the same time too, and again later.

        Args:
          null: `text` [s, d] and `text_mask` [s] of the negative prompt.
          facts: what else the index says: `text_tokens`, `takes_image`.

        Returns:
          Whether all units are done.
        """
        used: set[str] = set()
        with self._workspace("finish") as hidden:
            # Written as it is read: there may be many thousands of units.
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
        """What the index says of all units but their shards; None if some are not done. Shards and rejects are handed
        over one by one."""
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
        """What a unit's file says, when the unit is done and its shards are whole."""
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
        """A hidden folder of this process, which is removed in the end. The system's refusals become `UserError`s."""
        hidden = self.folder / f".{label}.{here()}.{os.getpid()}.{self._token}.tmp"
        with refused_writes(self.folder):
            hidden.mkdir(parents=True)
            try:
                yield hidden
            except (OSError, UserError) as error:
                if hidden.is_dir():
                    raise
                raise UserError(
                    f"{hidden} was removed by others while it was in use; run the same command again"
                ) from error
            finally:
                shutil.rmtree(hidden, ignore_errors=True)

    def _sweep(self, everything: bool) -> None:
        """Removes what killed processes left: those of this host, and when all is done the other hosts' units too.
        Whether a process lives can be told of those that this one can see, see `files.here`."""
        for entry in self.folder.iterdir():
            if (name := _HIDDEN.fullmatch(entry.name)) is None:
                continue
            if name["host"] != here():
                dead = everything and name["label"] != "finish"
            elif int(name["pid"]) == os.getpid():  # one of the same number before this one, in a restarted container
                dead = name["token"] != self._token
            else:
                dead = not lives(int(name["pid"]))
            if dead:
                shutil.rmtree(entry, ignore_errors=True)
