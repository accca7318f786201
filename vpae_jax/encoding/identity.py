"""Identities (plain JSON with everything that determines the records of a folder), and how two of them differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

# Settings by name; the settings of a part are a nested mapping.
Identity = Mapping[str, Any]

# Messages for digests that differ, since the digests themselves are not informative.
DIGESTS = {
    "source.manifest.digest": "the list of videos or their captions have changed",
    "source.digest": "the captions have changed",
    "encoders": "the model has different encoders",
    "teacher.weights": "the teacher has different weights",
}
LONGEST, BEFORE = 80, 20  # characters of a value that are shown, and how many of them before the first difference
_ABSENT = object()


def differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """Yields a message for each setting that differs, with its full name and both values: "source.fps is 8.0 there, 7.0
    here". For digests the message says what they stand for."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in {**here, **there}:
            yield from differences(there.get(key, _ABSENT), here.get(key, _ABSENT), f"{name}.{key}" if name else key)
    elif there != here and name in DIGESTS and _ABSENT not in (there, here):
        yield DIGESTS[name]
    elif there != here:
        one, two = _cut(_told(there), _told(here))
        yield f"{name} is {one} there, {two} here"


def _told(value: Any) -> str:
    return "not set" if value is _ABSENT else repr(value)


def _cut(*texts: str) -> list[str]:
    """Returns both texts; if one is long, only the region where they begin to differ."""
    if max(map(len, texts)) <= LONGEST:
        return list(texts)
    first = next(place for place, letters in enumerate(zip_longest(*texts)) if len(set(letters)) > 1)
    start = max(first - BEFORE, 0)
    end = start + LONGEST
    return ["..." * (start > 0) + text[start:end] + "..." * (len(text) > end) for text in texts]
