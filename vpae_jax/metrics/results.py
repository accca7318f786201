"""An evaluation's outputs besides its page: metrics as JSON and as text, and sample clips."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vpae_jax.files import write_text
from vpae_jax.media import Frames, read_stream, read_video, write_contact_sheet, write_stream
from vpae_jax.metrics.base import Metric
from vpae_jax.metrics.gallery import stems
from vpae_jax.metrics.rows import SHOWN, TITLES, Row
from vpae_jax.metrics.times import as_json, seconds, speedup, times_less, whole

# Suffix of the row of a many-step model that is sampled in one step nevertheless.
NAIVE = ", one step"
ARROW = "\N{RIGHTWARDS ARROW}"
# Maximum width of side-by-side clips (many decoders are limited to 4096 pixels) and number of frames in a sheet.
MOST_WIDTH, MOST_FRAMES = 4096, 17
TEXT_WIDTH = 120  # characters of a line of scores
Value = TypeVar("Value")


def write_metrics(
    path: Path, metrics: Sequence[Metric], real: Row | None, rows: Sequence[Row], count: int, facts: Mapping[str, str]
) -> None:
    """Writes all metrics as JSON; an existing file is replaced once the new one is complete."""

    def numbers(row: Row) -> dict[str, Any]:
        return {**nested(row.scores), "intervals": nested(row.intervals), "curves": nested(row.curves)}

    found = {
        "clips_a_half": count,
        "facts": dict(facts),
        "meaning": {metric.name: metric.meaning for metric in metrics},
        "goal": {metric.name: metric.goal for metric in metrics},
        "real": None if real is None else numbers(real),
        "rows": [
            {
                "name": row.name,
                **row.settings,
                "evaluations": row.evaluations,
                "times": as_json(row.times),
                **numbers(row),
            }
            for row in rows
        ],
    }
    write_text(path, json.dumps(found, indent=1) + "\n")


def write_samples(folder: Path, rows: Sequence[Row], fps: float) -> None:
    """Writes every row's first clips of each mode, side by side, as a video and as a contact sheet with one line per
    clip; large clips are scaled down.

    Raises:
      UserError: a clip cannot be read, or writing fails.
    """
    begin = stems(rows)
    for row in rows:
        for half, files in row.files.items():
            shown = files[:SHOWN]
            if shown:
                name = f"{begin[row.name]}_{half}"
                write_stream(folder / f"{name}.mp4", _side_by_side(shown), fps)
                lines = [_thinned(read_video(file)) for file in shown]
                write_contact_sheet(folder / f"{name}.png", np.concatenate(lines), columns=len(lines[0]))


def _side_by_side(files: Sequence[Path]) -> Iterator[Frames]:
    """Frames of the clips side by side, one at a time, until the shortest clip ends."""
    for frames in zip(*(read_stream(file) for file in files), strict=False):
        yield np.concatenate([_at_most(frame, MOST_WIDTH // len(files)) for frame in frames], 1)[None]


def _thinned(frames: Frames) -> UInt8[np.ndarray, "lines rows columns 3"]:
    """Evenly spaced frames from first to last, scaled down to fit into a line of a sheet."""
    count = min(len(frames), MOST_FRAMES)
    picked = np.linspace(0, len(frames) - 1, count).round().astype(int)
    return np.stack([_at_most(frames[i], MOST_WIDTH // count) for i in picked])


def _at_most(picture: UInt8[np.ndarray, "height width 3"], width: int) -> UInt8[np.ndarray, "rows columns 3"]:
    """An image scaled down to at most this width, with even height and width if it is scaled."""
    if picture.shape[1] <= width:
        return picture
    size = width // 2 * 2, max(1, round(picture.shape[0] * width / picture.shape[1] / 2)) * 2
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


def table(metrics: Sequence[Metric], rows: Sequence[Row]) -> str:
    """The scores as text, a column for each row; rows that do not fit into a terminal's width follow below."""
    lines = []
    for half in TITLES:
        names = [m.name for m in metrics if any(f"{half}/{m.name}" in row.scores for row in rows)]
        if not names and not any(row.files.get(half) for row in rows):
            continue
        first = max(len(name) for name in (half, "evaluations", *names))
        left = list(rows)
        while left:
            used, shown = first + _column(left[0]), [left.pop(0)]
            while left and used + _column(left[0]) <= TEXT_WIDTH:
                used += _column(left[0])
                shown.append(left.pop(0))
            cells = {
                half: [row.name for row in shown],
                "evaluations": ["-" if row.evaluations is None else str(row.evaluations) for row in shown],
                **{name: [_decimals(row.scores.get(f"{half}/{name}")) for row in shown] for name in names},
            }
            lines.append("")
            for name, values in cells.items():
                texts = [f"{value:>{_column(row)}}" for value, row in zip(values, shown, strict=True)]
                lines.append(f"{name:{first}}{''.join(texts)}")
    return "\n".join(lines[1:])


def _column(row: Row) -> int:
    """The width of a row's column, with the space before it."""
    return 2 + max(len(row.name), 8)


def _decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def headline(rows: Sequence[Row], compared: Metric) -> list[tuple[str, str]]:
    """The numbers at the top of the page: phase 2 in one network evaluation (else phase 1, else the last one-step
    row), compared with many steps."""
    first, single = rows[0], [row for row in rows[1:] if row.evaluations == 1]
    students = [row for row in single if not row.name.endswith(NAIVE)]
    if not students:
        return []
    named = {row.name: row for row in students}
    student = named.get("phase 2") or named.get("phase 1") or students[-1]
    steps, names = f"{first.evaluations} {ARROW} 1", f"{first.name} {ARROW} {student.name}"
    found = [(steps, f"network evaluations per clip, {names}")]
    if (ratio := speedup(first, student, "network")) is not None:
        change = f"{seconds(first.times['network'])} {ARROW} {seconds(student.times['network'])}"
        found.append((times_less(ratio), f"less network time per clip, measured in this run: {change}"))
    if (ratio := speedup(first, student, "whole")) is not None:
        change = f"{seconds(whole(first.times))} {ARROW} {seconds(whole(student.times))}"
        found.append((times_less(ratio), f"less time for a whole clip, all stages included: {change}"))
    naive = [row for row in single if row.name.endswith(NAIVE)]
    for half, name in TITLES.items():
        key = f"{half}/{compared.name}"
        if naive and key in naive[0].scores and key in student.scores:
            change = f"{naive[0].scores[key]:.0f} {ARROW} {student.scores[key]:.0f}"
            label = f"{compared.label}, {name.lower()}: {naive[0].name} {ARROW} {student.name}"
            if key in first.scores:
                label += f"; {first.name} in {first.evaluations}: {first.scores[key]:.0f}"
            found.append((change, label))
    return found


def nested(scores: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """Splits `half/metric` keys into two levels of dictionaries."""
    found: dict[str, dict[str, Value]] = {}
    for key, value in scores.items():
        half, name = key.split("/")
        found.setdefault(half, {})[name] = value
    return found
