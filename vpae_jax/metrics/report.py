"""The report page of a comparison: clips side by side, scores, times, losses, settings. It loads nothing from outside:
its clips are embedded, or in a folder next to it if they are large."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpae_jax.files import replacing, write_text
from vpae_jax.metrics.base import Metric
from vpae_jax.metrics.gallery import Gallery
from vpae_jax.metrics.plots import Curve, line_plot
from vpae_jax.metrics.rows import SHOWN, TITLES, Report
from vpae_jax.metrics.times import ABSENT, time_table
from vpae_jax.metrics.trainings import differences, training_plots
from vpae_jax.pages import page_template

TEMPLATE = "report.html.jinja"
MOST_EMBEDDED = 40 * 2**20  # maximum bytes of clips embedded in a page; more are stored in a folder next to it
WORST = 3  # number of worst clips per row and metric
SIDE_BY_SIDE = 4  # maximum number of large clips in a line
# Metrics with large values, shown with one decimal.
LARGE = ("kvd", "kvd_i3d", "fvd", "psnr_first")
# Line style of real clips in plots: dashes in the last colour.
REAL_COLOR, DASHED = 5, 1


def write_report(path: Path, report: Report) -> None:
    """Writes the page, and `NAME_files/` next to it if its clips exceed `MOST_EMBEDDED`; an earlier page and folder of
    the same names are replaced once the new ones are complete.

    Raises:
      UserError: a clip's file cannot be read, or writing fails.
    """
    gallery = Gallery(report.all_rows, report.frames)
    halves = [_half(half, report, gallery) for half in TITLES if half in report.captions]
    folder = path.with_name(f"{path.stem}_files")

    def page(clips: Mapping[str, str], pictures: Mapping[str, str]) -> str:
        return page_template(TEMPLATE).render(
            report=report,
            halves=halves,
            small=gallery.small,
            width=gallery.width,
            columns=_columns(len(report.all_rows)),
            clips=clips,
            pictures=pictures,
            times=time_table(report.rows),
            plots=training_plots(report.runs),
            differences=differences(report.runs),
            configs=[json.dumps(run.config, indent=2) for run in report.runs],
        )

    if gallery.bytes > MOST_EMBEDDED:
        with replacing(folder) as temporary:
            write_text(path, page(*gallery.write(temporary, folder.name)))
    else:
        write_text(path, page(*gallery.within()))
        shutil.rmtree(folder, ignore_errors=True)


def _columns(rows: int) -> int:
    """Number of clips of one condition per line, chosen so that the lines are about equally full."""
    return math.ceil(rows / math.ceil(rows / SIDE_BY_SIDE))


def _half(half: str, report: Report, gallery: Gallery) -> dict[str, Any]:
    """The page's content for one mode (`half`)."""
    most = max((len(row.files.get(half, ())) for row in report.all_rows), default=0)
    shown = range(min(SHOWN, most, len(report.captions[half])))
    return {
        "name": half,
        "title": TITLES[half],
        "captions": [report.captions[half][i] for i in shown],
        "shown": [{"row": row, "clips": [gallery.add(row, half, i) for i in shown]} for row in report.all_rows],
        "scores": _scores(half, report),
        "worst": _worst(half, report, gallery),
        "plots": _by_frame(half, report),
    }


def _scores(half: str, report: Report) -> list[dict[str, Any]]:
    """A line for each metric that any row has, with a cell for each row."""
    lines = []
    for metric in report.metrics:
        key = f"{half}/{metric.name}"
        if not any(key in row.scores for row in report.all_rows):
            continue
        values = {row.name: row.scores[key] for row in report.rows if key in row.scores}
        best = metric.best(values, _floor(report, key))
        cells = []
        for row in report.all_rows:
            text = _number(row.scores.get(key), metric)
            # Values that print the same as the best are marked, too.
            equal = row is not report.real and best is not None and text == _number(values[best], metric)
            ends = [_number(end, metric) for end in row.intervals.get(key, ())]
            cells.append({"text": text, "best": equal, "real": row is report.real, "interval": " to ".join(ends)})
        lines.append({"metric": metric, "cells": cells})
    return lines


def _worst(half: str, report: Report, gallery: Gallery) -> list[dict[str, Any]]:
    """The worst clips of every row, for each metric with per-clip values."""
    found = []
    for metric in report.metrics:
        key, rows = f"{half}/{metric.name}", []
        for row in report.rows:
            values = row.each.get(key, ())[: len(row.files.get(half, ()))]
            clips = []
            for i in metric.worst(values, _floor(report, key), WORST):
                real = None if report.real is None else gallery.add(report.real, half, i)
                caption, value = report.captions[half][i], _number(values[i], metric)
                made = gallery.add(row, half, i)
                clips.append({"made": made, "real": real, "index": i, "caption": caption, "value": value})
            if clips:
                rows.append({"row": row, "clips": clips})
        if rows:
            floor = _floor(report, key)
            real = None if floor is None else _number(floor, metric)
            found.append({"metric": metric, "rows": rows, "real": real})
    return found


def _by_frame(half: str, report: Report) -> list[str]:
    """Plots of per-frame metrics."""
    looks = {row.name: (color, 0) for color, row in enumerate(report.rows)}
    if report.real is not None:
        looks[report.real.name] = (REAL_COLOR, DASHED)
    plots = []
    for metric in report.metrics:
        curves = []
        for row in report.all_rows:
            values = row.curves.get(f"{half}/{metric.name}", ())
            if values:
                # Curves over all frames start at frame 0; those without the first frame, or without both ends, at 1.
                first = float(len(values) < report.frames)
                frames = [first + i for i in range(len(values))]
                curves.append(Curve(row.name, frames, values, *looks[row.name]))
        if curves:
            plots.append(line_plot(metric.label, curves, f"{half} {metric.name} by frame", axis="frame"))
    return plots


def _floor(report: Report, key: str) -> float | None:
    """The score of the real clips."""
    return None if report.real is None else report.real.scores.get(key)


def _number(value: float | None, metric: Metric) -> str:
    if value is None:
        return ABSENT
    digits = 1 if metric.name in LARGE else 3
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")
