"""What an evaluation leaves behind besides its page: numbers as JSON and as text, and sample clips."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from einops import rearrange

from vpae_jax.files import write_text
from vpae_jax.media import write_contact_sheet, write_video
from vpae_jax.metrics.base import Metric
from vpae_jax.metrics.report import TITLES, Row, read_clips

# Ends the name of a many-step model's row that is sampled in one step all the same.
NAIVE = ", one step"
Value = TypeVar("Value")
ARROW, TIMES = "\N{RIGHTWARDS ARROW}", "\N{MULTIPLICATION SIGN}"


def write_metrics(
    path: Path, metrics: Sequence[Metric], real: Row, rows: Sequence[Row], count: int, facts: Mapping[str, str]
) -> None:
    """All numbers as JSON; an existing file is replaced when the new one is complete."""
    found = {
        "clips_a_half": count,
        "facts": dict(facts),
        "meaning": {metric.name: metric.meaning for metric in metrics},
        "goal": {metric.name: metric.goal for metric in metrics},
        "real": None
        if real is None
        else {**nested(real.scores), "intervals": nested(real.intervals), "curves": nested(real.curves)},
        "rows": [
            {
                "name": row.name,
                **row.settings,
                "evaluations": row.evaluations,
                "times": row.times,
                **nested(row.scores),
                "intervals": nested(row.intervals),
                "curves": nested(row.curves),
            }
            for row in rows
        ],
    }
    write_text(path, json.dumps(found, indent=1) + "\n")


def write_samples(folder: Path, rows: Sequence[Row], fps: float) -> None:
    """Every row's first clips, side by side, moving and as a sheet."""
    for row in rows:
        stem = row.name.replace(",", "").replace(" ", "_").replace("/", "_")
        for half, files in row.files.items():
            clips = read_clips(files[:8])
            write_video(folder / f"{stem}_{half}.mp4", rearrange(clips, "b t h w c -> t h (b w) c"), fps)
            frames = rearrange(clips, "b t h w c -> (b t) h w c")
            write_contact_sheet(folder / f"{stem}_{half}.png", frames, columns=clips.shape[1])


def table(metrics: Sequence[Metric], rows: Sequence[Row]) -> str:
    """The scores as text, one row after the other."""
    lines = []
    width = max(len(row.name) for row in rows)
    for half in rows[0].files:
        names = [m.name for m in metrics if any(f"{half}/{m.name}" in row.scores for row in rows)]
        lines += ["", f"{half:{width}}  evaluations  " + "  ".join(f"{name:>13}" for name in names)]
        for row in rows:
            values = [row.scores.get(f"{half}/{name}") for name in names]
            cells = "  ".join(f"{'-' if value is None else f'{value:.3f}':>13}" for value in values)
            lines.append(f"{row.name:{width}}  {'-' if row.evaluations is None else row.evaluations:>11}  {cells}")
    return "\n".join(lines[1:])


def headline(rows: Sequence[Row], compared: Metric) -> list[tuple[str, str]]:
    """The numbers at the page's top: the newest phase in one evaluation, or the last such row, against many steps."""
    first, single = rows[0], [row for row in rows[1:] if row.evaluations == 1]
    students = [row for row in single if not row.name.endswith(NAIVE)]
    if not students:
        return []
    named = {row.name: row for row in students}
    student = named.get("phase 2") or named.get("phase 1") or students[-1]
    steps, names = f"{first.evaluations} {ARROW} 1", f"{first.name} {ARROW} {student.name}"
    found = [(steps, f"network evaluations a clip, {names}")]
    if first.times.get("network") and student.times.get("network"):
        speed = first.times["network"] / student.times["network"]
        found.append((f"{speed:.0f} {TIMES}", "less network time a clip, measured in this run"))
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
    """`half/metric` keys as two levels."""
    found: dict[str, dict[str, Value]] = {}
    for key, value in scores.items():
        half, name = key.split("/")
        found.setdefault(half, {})[name] = value
    return found
