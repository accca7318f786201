"""Local paths, and atomic writes: a file appears complete or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vpae_jax.types import UserError

IN_WORKDIR = "{workdir}/"  # prefix of a config's paths that are relative to the run's workdir
REMEDY = "make room there, or choose another destination"
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# Errors of writes that may not name the file; reads never fail with these.
_OF_WRITES = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)
# The hidden name of a file being written ("tmp") or being replaced ("old"): host, process and a random number.
_TEMPORARY = re.compile(r"\.(?P<name>[^/]+)\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.(?P<kind>tmp|old)")


def is_address(text: str) -> bool:
    """Whether a text is an address, such as one in an object store, rather than a path."""
    return _ADDRESS.match(text) is not None


def local_path(text: str) -> Path:
    """Converts a text to a path. Raises `UserError` for an address, which `Path` would turn into a folder "gs:"."""
    if is_address(text):
        raise UserError(
            f"{text}: an address, which only config.data.records may be; give a local or mounted path, and copy from "
            "or to the object store (`gcloud storage cp -r`, `aws s3 cp --recursive`)"
        )
    return Path(text)


def resolve(path: str, workdir: Path) -> Path:
    """Resolves a path of a config: "{workdir}/..." is relative to the run's workdir, any other path to the current
    folder. Raises `UserError` for an address."""
    if path.startswith(IN_WORKDIR):
        return (workdir / path.removeprefix(IN_WORKDIR)).resolve()
    return local_path(path)


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file in the same folder, then renames it to `path`; on failure removes it.

    Raises:
      UserError: the path cannot be written.
    """
    with refused_writes(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(path)
        try:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # never follows an existing link
            write(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, even if the power fails."""

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    atomically(path, write)


def temporary_beside(path: Path, kind: str = "tmp") -> Path:
    """Returns a new hidden name in the folder of `path`, unique to this process and call. Leftovers of killed processes
    for the same path are removed."""
    remove_leftovers(path.parent, path.name)
    return path.with_name(f".{path.name}.{here()}-{os.getpid()}-{secrets.token_hex(4)}.{kind}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name in the folder of `path`, and renames it to `path` on success. On failure it is removed,
    and `path` is left as before.

    Raises:
      UserError: the path cannot be written.
    """
    temporary, old = temporary_beside(path), temporary_beside(path, "old")
    with refused_writes(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if path.is_dir():
                path.rename(old)
            temporary.rename(path)
        finally:
            if old.is_dir() and not path.exists():
                old.rename(path)
            for leftover in (temporary, old):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str | None = None, everything: bool = False) -> None:
    """Removes temporary files and folders that killed processes left in a folder. A previous version that was being
    replaced gets its name back, unless something else has that name.

    Args:
      folder: where to look.
      name: only leftovers of this target; by default of any.
      everything: also remove those of other hosts and of live processes; only if nobody else writes there now.
    """
    for entry in folder.iterdir() if folder.is_dir() else ():
        found = _TEMPORARY.fullmatch(entry.name)
        if found is None or name not in (None, found["name"]):
            continue
        if not everything and (found["host"] != here() or lives(int(found["pid"]))):
            continue
        if found["kind"] == "old" and not (folder / found["name"]).exists():
            entry.rename(folder / found["name"])
        elif entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def here() -> str:
    """Returns 8 hexadecimal digits that identify where process ids are comparable: a hash of the host name, the boot id
    and the process namespace. The host name alone is not enough: containers may share it, and so may machines. Systems
    without /proc provide nothing else."""
    place = socket.gethostname()
    with suppress(OSError):
        place += f" {Path('/proc/sys/kernel/random/boot_id').read_text()} {os.stat('/proc/self/ns/pid').st_ino}"
    return hashlib.sha256(place.encode()).hexdigest()[:8]


def lives(pid: int) -> bool:
    """Whether a process with this id exists here."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to another user
        return True
    return True


@contextmanager
def refused_writes(path: Path) -> Iterator[None]:
    """Converts errors of writing to `path`, or inside it, to a `UserError`; other errors pass through."""
    try:
        yield
    except shutil.Error as error:  # from copying a folder: source, destination and reason for each file
        raise UserError(f"{shown(path)}: cannot be written: {_first(error)}; {REMEDY}") from error
    except OSError as error:
        names = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        if not (any(_concerns(name, path) for name in names) if names else error.errno in _OF_WRITES):
            raise
        raise UserError(f"{shown(path)}: cannot be written: {error.strerror}; {REMEDY}") from error
    except ValueError as error:  # tensorstore's for everything; the system's message comes last
        reason = str(error).partition("\n")[0]
        if "riting" not in reason:
            raise
        reason = " ".join(reason.rsplit(": ", 1)[-1].split(" [")[0].split())
        raise UserError(f"{shown(path)}: cannot be written: {reason}; {REMEDY}") from error


def put_aside(path: Path) -> Path:
    """Renames a damaged file or folder, so that nothing reads it and nothing is lost; returns its new path."""
    names = (path.with_name(f"damaged-{path.name}{more}") for more in ("", *(f"-{n}" for n in range(2, 1000))))
    target = next(name for name in names if not name.exists())
    with refused_writes(path):
        return path.rename(target)


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Locks a file while the body runs. Yields whether this process got the lock. The file is removed at the end."""
    descriptor = _opened(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                yield False
                return
        yield True
        path.unlink(missing_ok=True)  # while still locked: a process that has already opened it will find the clip
    finally:
        os.close(descriptor)


def _opened(path: Path) -> int:
    with refused_writes(path):
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another process has finished and removed the folder
                return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def _concerns(name: Path, path: Path) -> bool:
    """Whether a failing file is the target, inside it, one of its temporary names, or one of its parent folders."""
    return Path(shown(name)).is_relative_to(shown(path)) or path.is_relative_to(name)


def shown(path: Path) -> str:
    """Returns the final form of a path, with the temporary names of its folders replaced by their targets."""
    return "/".join(found["name"] if (found := _TEMPORARY.fullmatch(part)) else part for part in str(path).split("/"))


def _first(error: shutil.Error) -> str:
    """Describes the error of the first file in a folder that could not be copied."""
    found = error.args[0]
    if not isinstance(found, list) or not found:
        return str(found)
    source, _, reason = found[0]
    return f"{source} cannot be copied ({reason})"
