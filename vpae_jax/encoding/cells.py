"""Parses the values in a table's rows (texts, times) and formats them for messages. Invalid values raise `Refused`."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from vpae_jax.encoding.tables import Refused, TableRow

ABOUT_CHARACTERS = 1000
NAME_CHARACTERS = 4096  # the longest path of Linux
CUTS = 10_000

_NUMBER = r"(\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_SECONDS = re.compile(_NUMBER, re.ASCII)
_CLOCK = re.compile(rf"(?:(\d+):)?(\d+):{_NUMBER}", re.ASCII)


def text_of(row: TableRow, column: str, kind: str) -> str:
    """Returns a non-empty text that can be encoded as UTF-8."""
    value = _value(row, column)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Refused(kind, f"no {kind}")
    if not isinstance(value, str):
        raise Refused(kind, f"{kind} {shown(value)} is not text")
    if kind != "caption" and len(value) > NAME_CHARACTERS:
        raise Refused(kind, f"{kind} has {len(value)} characters, expected at most {NAME_CHARACTERS}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Refused(kind, f"{kind} cannot be encoded as UTF-8 (U+{ord(value[error.start]):04X})") from error
    return value


def id_of(row: TableRow, column: str) -> str:
    """Returns an id: a text as in `text_of`, or a whole number."""
    value = row.get(column)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_of(row, column, "id")


def rest_of(row: TableRow, used: Collection[str]) -> dict[str, str | int | float | bool]:
    """Returns the other columns whose values `plain` keeps."""
    rest = {plain(key): plain(value) for key, value in row.items() if key not in used}
    return {str(key): value for key, value in rest.items() if key is not None and value is not None}


def time_of(row: TableRow, column: str | None) -> float | None:
    """Returns a time in seconds, or None for an empty value."""
    if column is None:
        return None
    value = _value(row, column)
    if value is None or value == "":
        return None
    return _seconds(value, column)


def times_of(row: TableRow, column: str | None) -> list[float]:
    """Returns times in seconds from a list, or from a text that lists them, including Python's notation for lists."""
    if column is None:
        return []
    value = _value(row, column)
    if isinstance(value, str):
        value = [part for part in re.split(r"[\s,;\[\]()'\"]+", value) if part]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        value = [value]
    elif not isinstance(value, list | None):
        raise Refused("time", f"{column} {shown(value)} is not a list of times")
    value = value or []
    if len(value) > CUTS:
        raise Refused("time", f"{column} lists {len(value)} times, expected at most {CUTS}")
    return [_seconds(part, column) for part in value]


def _seconds(value: Any, column: str) -> float:
    """Parses a time, which must be finite and not negative."""
    seconds = math.nan
    if isinstance(value, str):
        text = value.strip()
        if _SECONDS.fullmatch(text):
            seconds = float(text)
        elif match := _CLOCK.fullmatch(text):
            seconds = 3600 * float(match[1] or 0) + 60 * float(match[2]) + float(text[match.start(3) :])
    elif isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 53):
        seconds = float(value)
    if not 0 <= seconds < math.inf:
        raise Refused("time", f"{column} {shown(value)} is not a time")
    return seconds


def _value(row: TableRow, column: str) -> Any:
    value = row.get(column)
    if isinstance(value, Refused):
        raise value
    return value


def plain(value: Any) -> str | int | float | bool | None:
    """Returns a value that is short and can be stored as JSON; None for others."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode() if len(value) <= ABOUT_CHARACTERS else None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool) or (isinstance(value, int) and abs(value) < 1 << 63) else None


def shown(value: Any) -> str:
    """Formats a value for a message: short, on one line, with unprintable characters escaped."""
    if isinstance(value, Mapping | list):
        return "of several values"
    text = repr(value[:80] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 100 else text[:97] + "..."


def printable(reason: str) -> str:
    """Formats a reason as one line that can be encoded as UTF-8."""
    return " ".join(reason.encode(errors="backslashreplace").decode().split())
