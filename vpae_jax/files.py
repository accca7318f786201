"""Paths of this machine, and files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vpae_jax.types import UserError

REMEDY = "make room there, or choose another destination"
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# What the system says of a write without naming the file; reading never fails so.
_OF_WRITES = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)


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
    """A path of a config: relative to the workdir when it starts with "../", else to the current folder. Raises
    `UserError` for an address."""
    return (workdir / path).resolve() if path.startswith("../") else local_path(path)


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, then puts it there; on failure removes it.

    Raises:
      UserError: the system does not let us write there.
    """
    with refused_writes(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(path)
        try:
            write(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    atomically(path, lambda temporary: temporary.write_text(text))


def temporary_beside(path: Path, suffix: str = "tmp") -> Path:
    """A hidden name beside `path`, of this process."""
    return path.with_name(f".{path.name}.{os.getpid()}.{suffix}")


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


def _concerns(name: Path, path: Path) -> bool:
    """Whether a failing file is the target, in it, one of its temporary names, or a folder that leads to it."""
    own = (path, temporary_beside(path), temporary_beside(path, "old"))
    return any(name.is_relative_to(one) for one in own) or path.is_relative_to(name)


def shown(path: Path) -> str:
    """A path as it will be called when all is written: without the temporary names of folders around it."""
    return re.sub(rf"(^|/)\.([^/]+)\.{os.getpid()}\.tmp(?=/|$)", r"\1\2", str(path))


def _first(error: shutil.Error) -> str:
    """What went wrong with the first file of a folder."""
    found = error.args[0]
    if not isinstance(found, list) or not found:
        return str(found)
    source, _, reason = found[0]
    return f"{source} cannot be copied ({reason})"
