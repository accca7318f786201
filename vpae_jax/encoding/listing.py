"""Reads a folder of videos and caption files as a table, and checks which files below a folder may be read."""

from __future__ import annotations

import errno
import json
import os
import stat
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vpae_jax.encoding.cells import printable, text_of
from vpae_jax.encoding.tables import CONVERT, Digest, Refused, TableRow, not_utf8
from vpae_jax.placeholders import HEAD, placeholder_kind
from vpae_jax.types import UserError

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".gif")
SUFFIXES += (".wmv", ".flv", ".ts", ".mts", ".m2ts", ".ogv", ".3gp", ".y4m")
CAPTION_KEYS = ("caption", "text", "prompt")
TIME_KEYS = ("start", "end", "cuts")
SIDECAR_BYTES = 1 << 17
SIDECARS = (".json", ".JSON", ".Json", ".txt", ".TXT", ".Txt")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2", ".ppm", ".svg")
IN_A_TABLE = "list videos and captions in a table, with --manifest=FILE of python -m vpae_jax.encode"
FOLLOWED = "give a folder that holds both, or a copy with its links followed (`cp -rL`)"


class Linked(Refused):
    """A link that is not followed; the reason names its target and the remedy."""


class FolderTable:
    """The videos below a folder, sorted by name, without hidden ones.

    A row has `path`, relative to the folder; `caption`, from NAME.json (under "caption", "text" or "prompt") or else
    from NAME.txt next to the video NAME.mp4; and `start`, `end`, `cuts` and anything else in NAME.json. Links to
    folders are not followed; each is a rejected row. Names are stored in one byte array, to save memory.

    Args:
      root: the folder.
      flag: the flag that named it, for messages.

    Raises:
      UserError: the folder has no videos; or, when scanned, none that is readable and has a caption.
    """

    def __init__(self, root: Path, flag: str = "--videos") -> None:
        self.root, self.flag = os.path.realpath(root), flag
        self.names, self.ends = bytearray(), array("q", [0])
        for name in _walk(self.root):
            self.names += os.fsencode(name)
            self.ends.append(len(self.names))
        if len(self.ends) == 1:
            image = next(_walk(self.root, IMAGES), None)
            images = f", only images such as {image!r}" if image else ""
            raise UserError(
                printable(
                    f"{root} contains no videos ({' '.join(SUFFIXES)}){images}; give another folder with "
                    f"{flag}=FOLDER, or {IN_A_TABLE}"
                )
            )

    def scan(self, digest: Digest) -> Iterator[TableRow | Refused]:
        usable, first = False, ("", Refused("", ""))
        for number in range(len(self.ends) - 1):
            name = self._name(number)
            digest.update(os.fsencode(name) + b"\0")
            try:
                digest.update(b"%d\0" % regular_file(self.root, name).st_size)
                for suffix, data in self._sidecars(name):
                    digest.update(suffix.encode() + b"%d\0" % len(data) + data)
            except Refused as refused:
                digest.update(refused.kind.encode() + b"\0")
            if not usable:
                why = self._unused(name)
                usable = why is None
                first = first if first[0] or why is None else (name, why)
            yield {"path": name}
        if not usable:
            raise UserError(printable(f"{self.root}: {self._none_used(*first)}"))

    def _unused(self, name: str) -> Refused | None:
        """Returns why a video is not used, judging by its name and its caption files; None if it may be."""
        try:
            regular_file(self.root, name)
            text_of(self._described(name), "caption", "caption")
        except Refused as refused:
            return refused
        return None

    def _none_used(self, name: str, why: Refused) -> str:
        """Formats the message that no video is used, with the reason of the first."""
        none = f"none of its {len(self.ends) - 1} videos"
        if isinstance(why, Linked):
            return f"{none} can be read: {'' if why.kind == 'caption' else repr(name) + ' '}{why.reason}"
        if why.kind != "caption":
            return f"{none} can be read: {name!r} {why.reason}; give another folder with {self.flag}=FOLDER"
        remedy = f"put captions into NAME.txt next to NAME.mp4, or {IN_A_TABLE}"
        return f"{none} has a caption ({name!r}: {why.reason}); {remedy}"

    def read(self, first: int, count: int) -> list[TableRow | Refused]:
        names = map(self._name, range(first, first + count))
        return [{"path": name, **self._described(name)} for name in names]

    def _name(self, number: int) -> str:
        return os.fsdecode(bytes(self.names[self.ends[number] : self.ends[number + 1]]))

    def _described(self, name: str) -> dict[str, Any]:
        """Reads the caption files of a video."""
        found: dict[str, Any] = {"caption": Refused("caption", "no .txt or .json file of the same name next to it")}
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

    def _sidecars(self, name: str) -> Iterator[tuple[str, bytes]]:
        for suffix in SIDECARS:
            path = os.path.splitext(name)[0] + suffix
            beside = os.path.basename(path)
            try:
                size = regular_file(self.root, path).st_size
            except Refused as refused:
                if refused.kind == "missing" and not isinstance(refused, Linked):
                    continue
                raise type(refused)("caption", f"{beside!r} {refused.reason}") from refused
            if size > SIDECAR_BYTES:
                raise Refused("caption", f"{beside!r} has {size} bytes, expected at most {SIDECAR_BYTES}")
            try:
                with open(os.path.join(self.root, path), "rb") as file:
                    yield suffix.lower(), file.read(SIDECAR_BYTES)
            except OSError as error:
                raise Refused("caption", f"{beside!r} cannot be read: {error.strerror}") from error


def regular_file(root: str, name: str, what: str = "the videos") -> os.stat_result:
    """Returns the status of a file that must lie below a folder, after following all links.

    Args:
      root: the folder, as returned by `os.path.realpath`.
      name: path of the file, relative to the folder or absolute.
      what: what the folder contains, for messages.

    Raises:
      Refused: "path" if the file lies elsewhere, is not a regular file or is not accessible; "missing" if it does not
        exist. The exception is a `Linked` if a link is the cause.
    """
    path = os.path.join(root, name)
    try:
        real = os.path.realpath(path)
        if not _within(root, real):
            if not _within(root, os.path.normpath(path)):
                raise Refused("path", f"lies outside the folder of {what}")
            raise Linked("path", f"is a link to {real!r}, outside the folder of {what}; {FOLLOWED}")
        found = os.stat(real)
    except (FileNotFoundError, NotADirectoryError) as error:
        if os.path.islink(path):
            raise Linked("missing", f"is a link to {real!r}, which does not exist; download or copy it") from error
        raise Refused("missing", f"no such file in the folder of {what}") from error
    except (OSError, ValueError) as error:  # no permission, a disk that is gone; a NUL or half a character
        why = getattr(error, "strerror", None) or str(error)
        names = isinstance(error, ValueError) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP)
        raise Refused("path", why if names else f"cannot be read: {why}") from error
    if stat.S_ISDIR(found.st_mode) and os.path.islink(path):
        raise Linked("path", f"is a link to the folder {real!r}, which is not followed; {FOLLOWED}")
    if not stat.S_ISREG(found.st_mode):
        raise Refused("path", "is a folder" if stat.S_ISDIR(found.st_mode) else "is not a regular file")
    return found


def _within(root: str, path: str) -> bool:
    return os.path.commonpath([root, path]) == root


def is_video(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _walk(root: str, suffixes: Sequence[str] = SUFFIXES) -> Iterator[str]:
    """Yields the names of files with the given suffixes, of links to folders, and of folders that cannot be read."""
    waiting = ["/"]  # names of folders end in a slash
    while waiting:
        name = waiting.pop()
        if not name.endswith("/"):
            yield name
            continue
        try:
            with os.scandir(os.path.join(root, name.lstrip("/"))) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
                found = [_named(name.lstrip("/"), entry, suffixes) for entry in visible]
        except OSError:
            yield name.rstrip("/") or "."
            continue
        waiting += sorted((name for name in found if name), reverse=True)


def _named(folder: str, entry: os.DirEntry, suffixes: Sequence[str]) -> str | None:
    name = folder + entry.name
    try:
        if entry.is_dir():
            return name if entry.is_symlink() else name + "/"
    except OSError:
        return name
    return name if os.path.splitext(name)[1].lower() in suffixes else None


def _decoded(beside: str, data: bytes) -> str:
    if what := placeholder_kind(data[:HEAD]):
        raise Refused("caption", f"{beside!r} {what}")
    if wide := not_utf8(data):
        raise Refused("caption", f"{beside!r} {wide}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused("caption", f"{beside!r} is not UTF-8; {CONVERT}") from error


def _parsed(beside: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused("caption", f"{beside!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise Refused("caption", f"{beside!r} does not contain a JSON object")
    caption = next((found[key] for key in CAPTION_KEYS if key in found), None)
    if caption is None or (isinstance(caption, str) and not caption.strip()):
        caption = Refused("caption", f"{beside!r} has no caption under {', '.join(CAPTION_KEYS)}")
    rest = {key: value for key, value in found.items() if key not in (*CAPTION_KEYS, "path")}
    return {**rest, "caption": caption}
