"""Checksums of a checkpoint's files: taken when they are written, compared before they are read.

`checksums.txt` in a checkpoint's folder names every other file with its size and its XXH3 of 64 bits, as JSON; its last
line is the XXH3 of what stands before. So a byte that changes anywhere is found, and a checkpoint without the file is
taken for a damaged one.

A process sums what it has written itself, which its host still holds in memory; the first one sums what is left. Before
a checkpoint is read, its files are shared out by their sizes: each is read once, whoever wrote it and however many
processes there are.
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
THREADS = 8  # files that are read at the same time
BUFFER_BYTES = 4 * 2**20
# Orbax's names for what one of several processes writes by itself: ocdbt.process_3/d/..., array_metadatas/process_3.
_OF_PROCESS = re.compile(r"(?:.+\.)?process_(\d+)")
# What the system says of a file that is not there, or is none. Permissions and networks say nothing of what is stored.
_MISSING, _UNREADABLE = (errno.ENOENT, errno.ENOTDIR), (errno.EIO, errno.EISDIR, errno.ELOOP)

# "BYTES XXH3" of each file, by its path in the checkpoint; a sum has 16 hexadecimal digits.
Sums = Mapping[str, str]


def of_process(folder: Path, index: int) -> Sums:
    """Of the files that one process has written by itself, in a checkpoint that is all written.

    Args:
      folder: of the checkpoint.
      index: which process.
    """
    return _sums(folder, [name for name in _files(folder) if _writer(name) == index])


def write(folder: Path, told: Sequence[Sums]) -> None:
    """Puts down the sums of all files: those that processes have told, and of what none of them has. Raises `UserError`
    when they cannot be written."""
    known = {name: found for some in told for name, found in some.items()}
    rest = _sums(folder, [name for name in _files(folder) if name not in known])
    sums = dict(sorted({**known, **rest}.items()))
    body = json.dumps(sums, indent=1)
    write_text(folder / FILE, f"{body}\n{_digest(body.encode())}\n")


def fault(folder: Path, index: int = 0, count: int = 1) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if nothing is.

    Args:
      folder: of the checkpoint.
      index, count: the share of its files that is looked at, which one of how many.

    Raises:
      UserError: a file that cannot be read for a reason that is not the checkpoint's, as a lack of permission.
    """
    try:
        content = (folder / FILE).read_bytes()
    except OSError as error:
        return _said_by(error, folder / FILE, FILE)
    body, _, digest = content[:-1].rpartition(b"\n")
    if content[-1:] != b"\n" or digest.decode("ascii", "replace") != _digest(body):
        return f"{FILE} is damaged"
    share = _share(json.loads(body), index, count)
    for name in share:  # costs nothing, and finds what was cut short
        if (wrong := _wrong_size(folder, name, _size(share[name]))) is not None:
            return wrong
    with ThreadPoolExecutor(THREADS) as pool:
        for wrong in pool.map(lambda name: _wrong_sum(folder, name, share[name]), share):
            if wrong is not None:
                pool.shutdown(wait=False, cancel_futures=True)
                return wrong
    return None


def _share(sums: Sums, index: int, count: int) -> dict[str, str]:
    """Files that follow each other, about as many bytes for each process."""
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
    return None if found == expected else f"{name} is not what was written: its checksum is another one"


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
        f"{path}: cannot be read: {error.strerror}; when that has passed, run the same command again"
    ) from error
