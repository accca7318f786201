"""An HTML page that summarises an encoding: sample clips, distributions over all clips, and rejects with reasons."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vpae_jax.data.index import INDEX, REJECTS, latent_shape, of_prompts, read_index
from vpae_jax.encoding.units import Units
from vpae_jax.pages import page_template

PAGE, TEMPLATE = "summary.html", "summary.html.jinja"
CLIPS = 48
EXAMPLES = 6  # rejects shown per kind
BINS = 30
# Measurements of clips, with the titles of their histograms.
MEASURES = {
    "motion": "motion: mean difference of successive frames, 0 to 255",
    "brightness": "brightness: mean, 0 to 255",
    "start": "start within the video, seconds",
    "words": "words in the caption",
}


@dataclass
class Spread:
    """The minimum, maximum and number of some values."""

    low: float = math.inf
    high: float = -math.inf
    count: int = 0

    def add(self, value: float) -> None:
        self.low, self.high, self.count = min(self.low, value), max(self.high, value), self.count + 1

    def edges(self) -> Float[np.ndarray, "edges"]:
        """Returns the edges of a histogram's bins."""
        return np.linspace(self.low, self.high, min(BINS, max(5, self.count // 2)) + 1)


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram: position, width and height as fractions, and its tooltip."""

    left: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class Histogram:
    title: str
    low: str
    high: str
    bars: Sequence[Bar]


def report(folder: Path, index: Mapping[str, Any]) -> list[str]:
    """Returns lines that describe a complete folder of records with this index; writes its page if that is out of date.

    Raises:
      UserError: the folder cannot be written.
    """
    page = folder / PAGE
    if not page.is_file() or page.stat().st_mtime_ns < (folder / INDEX).stat().st_mtime_ns:
        write_summary(folder)
    refused = f"; rejected: {rejected(index)}" if index["rejects"] else ""
    what = "prompts" if of_prompts(index) else "clips"
    return [f"records: {folder}: {index['count']} {what}{refused}", f"summary: {page}"]


def rejected(index: Mapping[str, Any]) -> str:
    """Formats the number of rejects by kind: "3 static, 1 unreadable"."""
    return ", ".join(f"{count} {kind}" for kind, count in index["rejects"].items())


def first_reject(folder: Path) -> str:
    """Formats the first reject of a complete folder, which must have one: "b.mp4: no caption"."""
    with (folder / REJECTS).open(encoding="utf-8") as file:
        found = json.loads(next(file))
    return f"{found['id']}: {found['reason']}"


def write_summary(folder: Path) -> Path:
    """Writes `summary.html` into a complete folder of records; returns its path.

    Raises:
      UserError: the folder is not complete, or cannot be written.
    """
    index = read_index(folder)
    identity = dict(index["identity"])
    del identity["schema"]
    units = Units(folder, identity, identity.pop("units"))
    shown: list[Mapping[str, Any]] = []
    spreads: dict[str, Spread] = defaultdict(Spread)
    rejects: dict[str, list[dict[str, Any]]] = defaultdict(list)
    seconds = 0.0
    for number in range(units.count):
        unit = units.read(number)
        for note in unit.notes:
            for name, value in _measures(note).items():
                spreads[name].add(value)
            seconds += note["size"][0] / note["fps"] if "fps" in note else 0.0
        # Clips are taken evenly from all units.
        wanted = -(-CLIPS * (number + 1) // units.count) - len(shown)
        shown += [note for note in unit.notes if "picture" in note or note.get("shown")][: max(wanted, 0)]
        for place, reject in enumerate(unit.rejects):
            if len(rejects[reject.kind]) < EXAMPLES:
                example = {"id": reject.id, "reason": reject.reason, "picture": unit.pictures.get(place)}
                rejects[reject.kind].append(example)
    shapes = Counter[str]()
    for shard in index["shards"]:
        shapes[" x ".join(map(str, latent_shape(shard)[:3]))] += len(shard["sizes"])
    page = page_template(TEMPLATE).render(
        folder=folder.resolve().name,
        index=index,
        what="prompts" if of_prompts(index) else "clips",
        shapes=shapes.most_common(),
        size=_bytes(float(sum(shard["bytes"] for shard in index["shards"]))),
        duration=_duration(seconds),
        refused=sum(index["rejects"].values()),
        clips=shown,
        histograms=_histograms(units, {name: each.edges() for name, each in spreads.items() if each.low < each.high}),
        rejects=[(kind, index["rejects"][kind], some) for kind, some in sorted(rejects.items())],
    )
    units.put(PAGE, page)
    return folder / PAGE


def _measures(note: Mapping[str, Any]) -> dict[str, float]:
    found = {**note, "words": len(note["caption"].split())}
    return {name: float(found[name]) for name in MEASURES if name in found}


def _histograms(units: Units, edges: Mapping[str, Float[np.ndarray, "edges"]]) -> list[Histogram]:
    """Computes histograms. Reads all notes a second time, rather than keeping the values of millions of clips."""
    counts = {name: np.zeros(len(bounds) - 1, np.int64) for name, bounds in edges.items()}
    for number in range(units.count):
        found = [_measures(note) for note in units.read(number).notes]
        for name, bounds in edges.items():
            counts[name] += np.histogram([each[name] for each in found if name in each], bounds)[0]
    return [_histogram(title, counts[name], edges[name]) for name, title in MEASURES.items() if name in edges]


def _histogram(title: str, counts: Int[np.ndarray, "bins"], edges: Float[np.ndarray, "edges"]) -> Histogram:
    span = edges[-1] - edges[0]
    bars = [
        Bar(
            float((low - edges[0]) / span),
            float((high - low) / span),
            float(count / counts.max()),
            f"{low:.4g} to {high:.4g}: {count}",
        )
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
    ]
    return Histogram(title, f"{edges[0]:.4g}", f"{edges[-1]:.4g}", bars)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _duration(seconds: float) -> str:
    """Formats a duration as hours, minutes and seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
