"""A folder of videos with captions beside them, read as a table; and which files below a folder may be read."""

from __future__ import annotations

import errno
import json
import os
import stat
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vpae_jax.encoding.cells import printable, text_of
from vpae_jax.encoding.tables import Digest, Refused, TableRow
from vpae_jax.types import UserError

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".gif")
SUFFIXES += (".wmv", ".flv", ".ts", ".mts", ".m2ts", ".ogv", ".3gp", ".y4m")
CAPTION_KEYS = ("caption", "text", "prompt")
TIME_KEYS = ("start", "end", "cuts")
SIDECAR_BYTES = 1 << 17


class FolderTable:
    """Videos below a folder in the order of their names, hidden ones left out.

    A row has `path`, relative to the folder; `caption`, from NAME.json (under "caption", "text" or "prompt") or, where
    that has none, NAME.txt beside the video NAME.mp4; and what NAME.json says of `start`, `end` and `cuts`, and more.
    Links to folders are not followed; each is a row that is refused. Names are kept as bytes, one after the other.

    Raises:
      UserError: no videos in it; or, when it is scanned, none with a caption.
    """

    def __init__(self, root: Path) -> None:
        self.root = os.path.realpath(root)
        self.names, self.ends = bytearray(), array("q", [0])
        for name in _walk(self.root):
            self.names += os.fsencode(name)
            self.ends.append(len(self.names))
        if len(self.ends) == 1:
            raise UserError(
                f"{root} holds no videos ({' '.join(SUFFIXES)}); give another folder with --videos=FOLDER, "
                f"or list its videos in a table with --manifest=FILE"
            )

    def scan(self, digest: Digest) -> Iterator[TableRow | Refused]:
        captioned, why = False, ""
        for number in range(len(self.ends) - 1):
            name = self._name(number)
            digest.update(os.fsencode(name) + b"\0")
            try:
                digest.update(b"%d\0" % regular_file(self.root, name).st_size)
                for suffix, data in self._sidecars(name):
                    digest.update(suffix.encode() + b"%d\0" % len(data) + data)
            except Refused as refused:
                digest.update(refused.kind.encode() + b"\0")
            if not captioned:
                captioned, reason = self._captioned(name)
                why = why or f"{name!r}: {reason}"
            yield {"path": name}
        if not captioned:
            raise UserError(
                printable(
                    f"{self.root}: none of its {len(self.ends) - 1} videos has a caption ({why}); put captions into "
                    f"NAME.txt beside NAME.mp4, or into a table with --manifest=FILE"
                )
            )

    def read(self, first: int, count: int) -> list[TableRow | Refused]:
        names = map(self._name, range(first, first + count))
        return [{"path": name, **self._described(name)} for name in names]

    def _name(self, number: int) -> str:
        return os.fsdecode(bytes(self.names[self.ends[number] : self.ends[number + 1]]))

    def _described(self, name: str) -> dict[str, Any]:
        """What stands beside a video."""
        found: dict[str, Any] = {"caption": Refused("caption", "no .txt or .json of the same name beside it")}
        try:
            for suffix, data in self._sidecars(name):
                beside = os.path.splitext(os.path.basename(name))[0] + suffix
                text = _decoded(beside, data)
                found = _parsed(beside, text) if suffix == ".json" else {**found, "caption": text}
                if not isinstance(found["caption"], Refused):
                    break
        except Refused as refused:
            found["caption"] = refused
        return found

    def _captioned(self, name: str) -> tuple[bool, str]:
        """Whether a video has a caption, or why not."""
        try:
            text_of(self._described(name), "caption", "caption")
        except Refused as refused:
            return False, refused.reason
        return True, ""

    def _sidecars(self, name: str) -> Iterator[tuple[str, bytes]]:
        for suffix in (".json", ".JSON", ".txt", ".TXT"):
            path = os.path.splitext(name)[0] + suffix
            try:
                size = regular_file(self.root, path).st_size
            except Refused as refused:
                if refused.kind == "missing":
                    continue
                raise Refused("caption", f"{suffix} file beside it: {refused.reason}") from refused
            if size > SIDECAR_BYTES:
                raise Refused("caption", f"{suffix} file beside it has {size} bytes, {SIDECAR_BYTES} at most")
            try:
                with open(os.path.join(self.root, path), "rb") as file:
                    yield suffix.lower(), file.read(SIDECAR_BYTES)
            except OSError as error:
                raise Refused("caption", f"{suffix} file beside it cannot be read: {error.strerror}") from error


def regular_file(root: str, name: str) -> os.stat_result:
    """What is known of a file that lies below a folder, all links followed.

    Args:
      root: the folder, as `os.path.realpath` gives it.
      name: relative to it, or absolute.

    Raises:
      Refused: "path" for one that lies elsewhere, is no file, or cannot be looked at; "missing" for none.
    """
    try:
        real = os.path.realpath(os.path.join(root, name))
        if os.path.commonpath([root, real]) != root:
            raise Refused("path", "lies outside the folder of the videos")
        found = os.stat(real)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Refused("missing", "no such file in the folder of the videos") from error
    except (OSError, ValueError) as error:  # not allowed, a disk that is gone; a NUL or half a character
        why = getattr(error, "strerror", None) or str(error)
        names = isinstance(error, ValueError) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP)
        raise Refused("path", why if names else f"cannot be read: {why}") from error
    if not stat.S_ISREG(found.st_mode):
        raise Refused("path", "is a folder" if stat.S_ISDIR(found.st_mode) else "is no regular file")
    return found


def is_video(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _walk(root: str) -> Iterator[str]:
    """Names of videos, of links to folders, and of folders that cannot be read."""
    waiting = ["/"]  # a folder's name ends in a slash
    while waiting:
        name = waiting.pop()
        if not name.endswith("/"):
            yield name
            continue
        try:
            with os.scandir(os.path.join(root, name.lstrip("/"))) as entries:
                found = [_named(name.lstrip("/"), entry) for entry in entries if not entry.name.startswith(".")]
        except OSError:
            yield name.rstrip("/") or "."
            continue
        waiting += sorted((name for name in found if name), reverse=True)


def _named(folder: str, entry: os.DirEntry) -> str | None:
    name = folder + entry.name
    try:
        if entry.is_dir():
            return name if entry.is_symlink() else name + "/"
    except OSError:
        return name
    return name if is_video(name) else None


def _decoded(beside: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused("caption", f"{beside!r} is not UTF-8") from error


def _parsed(beside: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused("caption", f"{beside!r} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise Refused("caption", f"{beside!r} holds no JSON object")
    caption = next((found[key] for key in CAPTION_KEYS if key in found), None)
    if caption is None or (isinstance(caption, str) and not caption.strip()):
        caption = Refused("caption", f"{beside!r} has no caption under {', '.join(CAPTION_KEYS)}")
    rest = {key: value for key, value in found.items() if key not in (*CAPTION_KEYS, "path")}
    return {**rest, "caption": caption}
