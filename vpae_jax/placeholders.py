"""Placeholders for files that were not really downloaded, recognised by their first bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

HEAD = 512  # bytes that are examined

Kinds = Iterable[tuple[re.Pattern[bytes], str]]


def kinds(*found: tuple[bytes, str]) -> Kinds:
    """Compiles pairs of a regular expression for the beginning of a file and a description of such files."""
    return tuple((re.compile(pattern, re.DOTALL), what) for pattern, what in found)


_KNOWN = kinds(
    (
        rb"version https://git-lfs",
        "is a Git LFS pointer, not the file itself; run `git lfs pull` where it came from",
    ),
    (
        rb"(?i)\s*(?:<!--.*?-->\s*)?<(?:!doctype\s+html|html|head|body)\b",
        "is a web page (HTML), which sites send if a file is missing or needs a login; download the file itself",
    ),
    (rb"\s*<(?:\?xml|Error)\b", "is XML, which stores send if they deny access to a file; download the file itself"),
    (
        rb"\x1f\x8b|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd|BZh\d|.{257}ustar",
        "is an archive; unpack it and give its contents",
    ),
)


def placeholder_kind(head: bytes, more: Kinds = ()) -> str | None:
    """Describes what a file really is, and the remedy; None if it may be what was expected.

    Args:
      head: the file's first `HEAD` bytes, or all bytes of a shorter file.
      more: further kinds to recognise in this context.
    """
    head = head.removeprefix(b"\xef\xbb\xbf")
    return next((what for pattern, what in (*_KNOWN, *more) if pattern.match(head)), None)


def placeholder_at(path: Path) -> str | None:
    """Does the same for a file. Raises `OSError` if it cannot be read."""
    with path.open("rb") as file:
        return placeholder_kind(file.read(HEAD))
