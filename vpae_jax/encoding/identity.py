"""What decides the records of a folder, as plain JSON, and how two of them differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

# Settings by their names; those of a part lie in a mapping of their own.
Identity = Mapping[str, Any]

# What has changed where one of these differs, which tell nothing by themselves.
DIGESTS = {
    "source.manifest.digest": "the list of videos, or their captions, have changed",
    "source.digest": "the captions have changed",
    "encoders": "the model has other encoders",
    "teacher.weights": "the teacher is another one",
}
LONGEST, BEFORE = 80, 20  # characters of a value that are shown, and of them before the first that differs
_ABSENT = object()


def differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """Each setting that differs, by its full name, with both values: "source.fps is 8.0 there, 7.0 here". Of digests
    what they stand for."""
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
    """Two texts, or where they begin to differ when one is long."""
    if max(map(len, texts)) <= LONGEST:
        return list(texts)
    first = next(place for place, letters in enumerate(zip_longest(*texts)) if len(set(letters)) > 1)
    start = max(first - BEFORE, 0)
    end = start + LONGEST
    return ["..." * (start > 0) + text[start:end] + "..." * (len(text) > end) for text in texts]
