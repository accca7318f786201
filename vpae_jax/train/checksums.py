"""Checksums of a checkpoint's files: computed after writing, verified before reading.

`checksums.txt` in a checkpoint's folder lists every other file with its size and 64-bit XXH3, as JSON; its last line is
the XXH3 of the preceding content. So any changed byte is detected, and a checkpoint without this file counts as
damaged.

Each process computes the checksums of the files it has written, which are still in its host's page cache; the first
process does so for the remaining files. Before a checkpoint is read, its files are divided among the processes by size,
so that each is read once, regardless of who wrote it and of the number of processes.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from vpae_jax.files import write_text
from vpae_jax.types import UserError

FILE = "checksums.txt"
THREADS = 8  # files that are read concurrently
BUFFER_BYTES = 4 * 2**20
# Orbax's names for files written by a single process: ocdbt.process_3/d/..., array_metadatas/process_3.
_OF_PROCESS = re.compile(r"(?:.+\.)?process_(\d+)")
# Errors that mean damage. Errors of permissions and networks say nothing about the stored data.
_MISSING, _UNREADABLE = (errno.ENOENT, errno.ENOTDIR), (errno.EIO, errno.EISDIR, errno.ELOOP)

# "BYTES XXH3" of each file, by its path in the checkpoint; a checksum has 16 hexadecimal digits.
Sums = Mapping[str, str]


def of_process(folder: Path, index: int) -> Sums:
    """Returns the checksums of the files that only the given process has written, in a completely written checkpoint.

    Args:
      folder: the checkpoint's folder.
      index: index of the process.
    """
    return _sums(folder, [name for name in _files(folder) if _writer(name) == index])


def write(folder: Path, told: Sequence[Sums]) -> None:
    """Writes the checksums of all files: those reported by processes, and newly computed ones of the other files.
    Raises `UserError` if they cannot be written."""
    known = {name: found for some in told for name, found in some.items()}
    rest = _sums(folder, [name for name in _files(folder) if name not in known])
    sums = dict(sorted({**known, **rest}.items()))
    body = json.dumps(sums, indent=1)
    write_text(folder / FILE, f"{body}\n{_digest(body.encode())}\n")


def fault(folder: Path, index: int = 0, count: int = 1) -> str | None:
    """Returns a short description of what is wrong with a checkpoint; None if it is intact.

    Args:
      folder: the checkpoint's folder.
      index, count: which of how many shares of its files to check.

    Raises:
      UserError: a file cannot be read for a reason other than damage, such as missing permissions.
    """
    try:
        content = (folder / FILE).read_bytes()
    except OSError as error:
        return _said_by(error, folder / FILE, FILE)
    body, _, digest = content[:-1].rpartition(b"\n")
    if content[-1:] != b"\n" or digest.decode("ascii", "replace") != _digest(body):
        return f"{FILE} is damaged"
    share = _share(json.loads(body), index, count)
    for name in share:  # cheap, and finds truncated files
        if (wrong := _wrong_size(folder, name, _size(share[name]))) is not None:
            return wrong
    with ThreadPoolExecutor(THREADS) as pool:
        for wrong in pool.map(lambda name: _wrong_sum(folder, name, share[name]), share):
            if wrong is not None:
                pool.shutdown(wait=False, cancel_futures=True)
                return wrong
    return None


def _share(sums: Sums, index: int, count: int) -> dict[str, str]:
    """Returns a contiguous share of the files, with about the same number of bytes for each process."""
    total, before = max(1, sum(map(_size, sums.values()))), 0
    result = {}
    for name, found in sums.items():
        size = _size(found)
        if min(count * (2 * before + size) // (2 * total), count - 1) == index:
            result[name] = found
        before += size
    return result


def _size(found: str) -> int:
    return int(found.partition(" ")[0])


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _writer(name: str) -> int | None:
    found = (_OF_PROCESS.fullmatch(part) for part in name.split("/"))
    return next((int(match[1]) for match in found if match), None)


def _sums(folder: Path, names: Sequence[str]) -> dict[str, str]:
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _sum(folder / name), names), strict=True))


def _wrong_size(folder: Path, name: str, expected: int) -> str | None:
    try:
        size = (folder / name).stat().st_size
    except OSError as error:
        return _said_by(error, folder / name, name)
    return None if size == expected else f"{name} has {size} bytes, expected {expected}"


def _wrong_sum(folder: Path, name: str, expected: str) -> str | None:
    try:
        found = _sum(folder / name)
    except OSError as error:
        return _said_by(error, folder / name, name)
    return None if found == expected else f"{name} has changed since it was written: its checksum differs"


def _sum(path: Path) -> str:
    digest, buffer, size = xxhash.xxh3_64(), memoryview(bytearray(BUFFER_BYTES)), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return f"{size} {digest.hexdigest()}"


def _digest(content: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(content)


def _said_by(error: OSError, path: Path, name: str) -> str:
    if error.errno in _MISSING:
        return f"{name} is missing"
    if error.errno in _UNREADABLE:
        return f"{name} cannot be read: {os.strerror(error.errno)}"
    raise UserError(
        f"{path}: cannot be read: {error.strerror}; once this is resolved, run the same command again"
    ) from error
