"""What lies in the place of a file that was to be fetched: known by its first bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

HEAD = 512  # bytes that tell

Kinds = Iterable[tuple[re.Pattern[bytes], str]]


def kinds(*found: tuple[bytes, str]) -> Kinds:
    """How files begin, as regular expressions, and what is to be said of each."""
    return tuple((re.compile(pattern, re.DOTALL), what) for pattern, what in found)


_KNOWN = kinds(
    (
        rb"version https://git-lfs",
        "is a Git LFS pointer, which only stands for the file; run `git lfs pull` where it came from",
    ),
    (
        rb"(?i)\s*(?:<!--.*?-->\s*)?<(?:!doctype\s+html|html|head|body)\b",
        "is a web page (HTML), as sites send for a file that is not there or needs a login; fetch the file itself",
    ),
    (rb"\s*<(?:\?xml|Error)\b", "is XML, as stores send in place of a file that they refuse; fetch the file itself"),
    (
        rb"\x1f\x8b|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd|BZh\d|.{257}ustar",
        "is an archive; unpack it, and name what it held",
    ),
)


def impostor(head: bytes, more: Kinds = ()) -> str | None:
    """What a file is that begins so, and what to do; None for one that may be what it was taken for.

    Args:
      head: its first `HEAD` bytes, or all of a shorter one.
      more: what else it may be in this place.
    """
    head = head.removeprefix(b"\xef\xbb\xbf")
    return next((what for pattern, what in (*_KNOWN, *more) if pattern.match(head)), None)


def impostor_at(path: Path) -> str | None:
    """The same of a file. Raises `OSError` for one that cannot be read."""
    with path.open("rb") as file:
        return impostor(file.read(HEAD))
