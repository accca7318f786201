"""One page that shows a comparison: clips side by side, scores, losses, settings. It loads nothing from outside."""

from __future__ import annotations

import base64
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from vpae_jax.files import write_text
from vpae_jax.media import write_video
from vpae_jax.metrics.base import Clips, Metric
from vpae_jax.metrics.plots import Curve, line_plot
from vpae_jax.pages import page_template

TEMPLATE = "report.html.jinja"
TITLES = {"t2v": "Text to video", "i2v": "Image to video"}
# Enlargement within the file; the page enlarges further without smoothing.
ZOOM = 2
# A loop rests on its last frame, so that the eye finds the beginning.
REST_FRAMES = 3
SEAM = 64
ABSENT = "\N{EN DASH}"
# Metrics whose numbers are large.
LARGE = ("kvd", "kvd_i3d", "fvd", "psnr_first")


@dataclass(frozen=True)
class Row:
    """One way of making clips, or the real ones.

    Attributes:
      name: what the page calls it.
      evaluations: of the network, for one clip; None for real clips.
      scores: `half/metric` to value.
      clips: the first few of each half, for the conditions in their order.
      settings: what else decides the clips.
      seconds: wall seconds a clip, everything included.
      diffusion_seconds: of these, the network's.
      intervals: `half/metric` to the ends of its 95 % interval over clips.
      curves: `half/metric` to its values frame by frame, of all frames, of all but the first, or but both ends.
    """

    name: str
    evaluations: int | None
    scores: Mapping[str, float]
    settings: Mapping[str, Any] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    files: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    each: Mapping[str, Sequence[float]] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training whose curves are shown.

    Attributes:
      name: of the phase.
      records: its scalars, one mapping a logged step, with `step`.
      config: as plain JSON values.
      note: a line of its own, such as what a guard decided.
    """

    name: str
    records: Sequence[Mapping[str, float]]
    config: Mapping[str, Any]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """All that the page shows.

    Attributes:
      title, summary: heading, and what was compared in one or two sentences.
      headline: a few (number, what it is) pairs.
      metrics: the table's columns.
      real: the real clips; their scores are the floor.
      rows: what is compared.
      captions: of the shown clips, by half.
      count: clips a half behind each score.
      fps: frames a second.
      runs: trainings.
      facts: versions, commands and the like.
    """

    title: str
    summary: str
    headline: Sequence[tuple[str, str]]
    metrics: Sequence[Metric]
    real: Row
    rows: Sequence[Row]
    captions: Mapping[str, Sequence[str]]
    count: int
    fps: float
    frames: int = 1
    runs: Sequence[Run] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def write_report(path: Path, report: Report) -> None:
    """Writes the page; an existing one is replaced when the new one is complete."""
    page = page_template(TEMPLATE, seconds=_seconds).render(
        report=report,
        halves=[_half(half, title, report) for half, title in TITLES.items() if half in report.captions],
        runs=[_run(run) for run in report.runs],
    )
    write_text(path, page)


def video_uri(clips: Clips, fps: float) -> str:
    """Clips side by side as one H.264 data URI, enlarged without smoothing, resting on the last frame."""
    # Half a line on either side of every clip keeps each under the middle of its caption.
    margin = ((0, 0), (0, 0), (0, 0), (1, 1), (0, 0))
    framed = np.pad(clips.repeat(ZOOM, 2).repeat(ZOOM, 3), margin, constant_values=SEAM)
    strip = rearrange(framed, "b t h w c -> t h (b w) c")
    strip = np.concatenate([strip, np.repeat(strip[-1:], REST_FRAMES, 0)])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        write_video(file, strip, fps)
        return "data:video/mp4;base64," + base64.b64encode(file.read_bytes()).decode()


def read_clips(files):
    import av

    out = []
    for f in files:
        with av.open(str(f)) as c:
            out.append(np.stack([x.to_ndarray(format="rgb24") for x in c.decode(video=0)]))
    return np.stack(out)


def _half(half: str, title: str, report: Report) -> dict[str, Any]:
    """The videos and the table of one half."""
    rows = [row for row in (report.real, *report.rows) if row is not None]
    metrics = [m for m in report.metrics if any(f"{half}/{m.name}" in row.scores for row in rows)]
    table = [{"row": row, "cells": []} for row in rows]
    for metric in metrics:
        key = f"{half}/{metric.name}"
        values = {row.name: row.scores[key] for row in report.rows if key in row.scores}
        best = metric.best(values, report.real.scores.get(key) if report.real else None)
        for line in table:
            row = line["row"]
            text = _number(row.scores.get(key), metric)
            # What reads the same as the best is as good.
            equal = best is not None and row.name in values and text == _number(values[best], metric)
            ends = [_number(end, metric) for end in row.intervals.get(key, ())]
            line["cells"].append({"text": text, "best": equal, "interval": " to ".join(ends)})
    shown = [
        {"row": row, "uri": video_uri(read_clips(row.files[half][:8]), report.fps)} for row in rows if half in row.files
    ]
    return {
        "title": title,
        "metrics": metrics,
        "table": table,
        "shown": shown,
        "captions": report.captions[half][:8],
        "plots": _by_frame(half, report),
    }


def _by_frame(half: str, report: Report) -> list[str]:
    """Plots of what becomes of metrics from frame to frame."""
    rows, plots = [row for row in (report.real, *report.rows) if row is not None], []
    for name, label in {metric.name: metric.label for metric in report.metrics}.items():
        curves = []
        for row in rows:
            values = row.curves.get(f"{half}/{name}", ())
            if values and half in row.files:
                first = int(len(values) < report.frames)
                curves.append(Curve(row.name, range(first, first + len(values)), values))
        if curves:
            plots.append(line_plot(label, curves, f"{half} {name} by frame", axis="frame"))
    return plots


def _run(run: Run) -> dict[str, Any]:
    """The plots and the settings of one training."""
    names = sorted({name for record in run.records for name in record} - {"step"})
    groups = {
        "loss": [n for n in names if n.endswith("/loss")],
        "gradient norm": [n for n in names if n.endswith("/grad_norm")],
        "gradient of each loss term at x0": [n for n in names if n.endswith("_grad")],
        "latents against the data's": [n for n in names if n.endswith(("/x0_mean_drift", "/x0_std_ratio"))],
        "held-out KVD": [n for n in names if n.startswith("held_out/") and n.endswith("/kvd")],
    }
    plots = []
    for title, members in groups.items():
        curves = [Curve(_short(name), *_points(run.records, name)) for name in members]
        if any(len(curve.steps) > 1 for curve in curves):
            plots.append(line_plot(title, curves, f"{run.name} {title}", logarithmic="gradient" in title))
    return {"name": run.name, "note": run.note, "plots": plots, "config": json.dumps(run.config, indent=2)}


def _points(records: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    points = [(r["step"], r[name]) for r in records if name in r and math.isfinite(r[name])]
    return [float(step) for step, _ in points], [float(value) for _, value in points]


def _short(name: str) -> str:
    """A curve's name without what the plot's title says already."""
    for ending in ("/loss", "/grad_norm", "_grad", "/kvd"):
        name = name.removesuffix(ending)
    return name.removeprefix("held_out/").replace("_", " ").replace("/", ": ")


def _number(value: float | None, metric: Metric) -> str:
    if value is None:
        return ABSENT
    if metric.name in LARGE:
        return f"{value:.1f}".replace("-", "\N{MINUS SIGN}")
    return f"{value:.3f}"


def _seconds(value: float | None) -> str:
    """Seconds with three digits that count."""
    if value is None:
        return ABSENT
    return f"{value:.3g} s" if value >= 0.1 else f"{1000 * value:.3g} ms"
