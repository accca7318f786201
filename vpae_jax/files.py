"""Paths of this machine, and files that are there whole or not at all."""

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

IN_WORKDIR = "{workdir}/"  # begins a path that a preset gives relative to wherever its runs are
REMEDY = "make room there, or choose another destination"
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# What the system says of a write without naming the file; reading never fails so.
_OF_WRITES = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)
# A hidden name of what is being written, or was there before; which process gave it, and a number that none can guess.
_TEMPORARY = re.compile(r"\.(?P<name>[^/]+)\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.(?P<kind>tmp|old)")


def is_address(text: str) -> bool:
    """Whether a text is an address, as of an object store, and no path."""
    return _ADDRESS.match(text) is not None


def local_path(text: str) -> Path:
    """A path. Raises `UserError` for an address, of which `Path` would make a folder here that is called "gs:"."""
    if is_address(text):
        raise UserError(
            f"{text}: an address, as only config.data.records may be; give a local or mounted path, and copy from or "
            "to the object store (`gcloud storage cp -r`, `aws s3 cp --recursive`)"
        )
    return Path(text)


def resolve(path: str, workdir: Path) -> Path:
    """A path of a config: "{workdir}/..." leads from the run's own folder, any other is what a shell makes of it.
    Raises `UserError` for an address."""
    if path.startswith(IN_WORKDIR):
        return (workdir / path.removeprefix(IN_WORKDIR)).resolve()
    return local_path(path)


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, then puts it there; on failure removes it.

    Raises:
      UserError: the system does not let us write there.
    """
    with refused_writes(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(path)
        try:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # never through another's link
            write(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all, even if the power fails."""

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    atomically(path, write)


def temporary_beside(path: Path, kind: str = "tmp") -> Path:
    """A hidden name beside `path`, of this process, and another one each time. What killed processes left of the same
    path is removed."""
    remove_leftovers(path.parent, path.name)
    return path.with_name(f".{path.name}.{here()}-{os.getpid()}-{secrets.token_hex(4)}.{kind}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it on success; removed on any failure, with `path` as before.

    Raises:
      UserError: the system does not let us write there.
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
    """Removes temporary files and folders that killed processes left in a folder; what was there before gets its name
    back, if nothing has it.

    Args:
      folder: where.
      name: of what was to be written; by default of anything.
      everything: whether nobody else writes there now, so that no process has to be dead, or of this machine.
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
    """Where process numbers mean what they mean here, as 8 hexadecimal digits: of the machine's name, and of which of
    its starts and process namespaces this is. Containers may share the first, and machines may have the same; systems
    without /proc tell no more."""
    place = socket.gethostname()
    with suppress(OSError):
        place += f" {Path('/proc/sys/kernel/random/boot_id').read_text()} {os.stat('/proc/self/ns/pid').st_ino}"
    return hashlib.sha256(place.encode()).hexdigest()[:8]


def lives(pid: int) -> bool:
    """Whether there is a process of this number here."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


@contextmanager
def refused_writes(path: Path) -> Iterator[None]:
    """Turns the system's refusals to write at `path`, or in it, into a `UserError`; other errors stay as they are."""
    try:
        yield
    except shutil.Error as error:  # of a copied folder: source, destination and reason of each file
        raise UserError(f"{shown(path)}: cannot be written: {_first(error)}; {REMEDY}") from error
    except OSError as error:
        names = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        if not (any(_concerns(name, path) for name in names) if names else error.errno in _OF_WRITES):
            raise
        raise UserError(f"{shown(path)}: cannot be written: {error.strerror}; {REMEDY}") from error
    except ValueError as error:  # tensorstore's for everything; what the system said comes last
        reason = str(error).partition("\n")[0]
        if "riting" not in reason:
            raise
        reason = " ".join(reason.rsplit(": ", 1)[-1].split(" [")[0].split())
        raise UserError(f"{shown(path)}: cannot be written: {reason}; {REMEDY}") from error


def put_aside(path: Path) -> Path:
    """Renames a damaged file or folder, so that nothing reads it and nothing of it is lost; returns its new path."""
    names = (path.with_name(f"damaged-{path.name}{more}") for more in ("", *(f"-{n}" for n in range(2, 1000))))
    target = next(name for name in names if not name.exists())
    with refused_writes(path):
        return path.rename(target)


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Locks a file while the body runs; whether nobody else has. The file is removed at the end."""
    descriptor = _opened(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                yield False
                return
        yield True
        path.unlink(missing_ok=True)  # while it is locked: who has opened it already will find the clip there
    finally:
        os.close(descriptor)


def _opened(path: Path) -> int:
    with refused_writes(path):
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another process has come to its end, and removed the folder
                return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def _concerns(name: Path, path: Path) -> bool:
    """Whether a failing file is the target, in it, one of its temporary names, or a folder that leads to it."""
    return Path(shown(name)).is_relative_to(shown(path)) or path.is_relative_to(name)


def shown(path: Path) -> str:
    """A path as it will be called when all is written: without the temporary names of folders around it."""
    return "/".join(found["name"] if (found := _TEMPORARY.fullmatch(part)) else part for part in str(path).split("/"))


def _first(error: shutil.Error) -> str:
    """What went wrong with the first file of a folder."""
    found = error.args[0]
    if not isinstance(found, list) or not found:
        return str(found)
    source, _, reason = found[0]
    return f"{source} cannot be copied ({reason})"
