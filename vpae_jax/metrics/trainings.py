"""Training curves of one run, or of several overlaid; and the settings in which several runs differ."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from vpae_jax.metrics.plots import Curve, line_plot
from vpae_jax.metrics.rows import Run
from vpae_jax.metrics.times import ABSENT

MOST_LINES = 8  # maximum number of lines in a plot of several runs


def training_plots(runs: Sequence[Run]) -> list[str]:
    """Plots of related quantities. With several runs, colour shows the run, line style the quantity."""
    plots = []
    for title, members in _groups(runs).items():
        names = [name for name in members if any(len(_points(run, name)[0]) > 1 for run in runs)]
        size = max(1, MOST_LINES // len(runs) if len(runs) > 1 else len(names))
        for start in range(0, len(names), size):
            curves = _curves(runs, names[start : start + size])
            identity = f"{' '.join(run.name for run in runs)} {title} {start}"
            plots.append(line_plot(title, curves, identity, logarithmic="gradient" in title))
    return plots


def _groups(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The quantities of each plot, by its title."""
    names = sorted({name for run in runs for record in run.records for name in record} - {"step"})
    return {
        "loss": [n for n in names if n.endswith("/loss")],
        "gradient norm": [n for n in names if n.endswith("/grad_norm")],
        "gradient of each loss term at x0": [n for n in names if n.endswith("_grad")],
        "latents against the data's": [n for n in names if n.endswith(("/x0_mean_drift", "/x0_std_ratio"))],
        "held-out KVD": [n for n in names if n.startswith("held_out/") and n.endswith("/kvd")],
    }


def _curves(runs: Sequence[Run], names: Sequence[str]) -> list[Curve]:
    if len(runs) == 1:
        return [Curve(_short(name), *_points(runs[0], name), color=i) for i, name in enumerate(names)]
    found = []
    for kind, name in enumerate(names):
        for color, run in enumerate(runs):
            steps, values = _points(run, name)
            if steps:
                found.append(Curve(f"{run.name}: {_short(name)}", steps, values, color, kind))
    return found


def _points(run: Run, name: str) -> tuple[list[float], list[float]]:
    points = [(r["step"], r[name]) for r in run.records if name in r and math.isfinite(r[name])]
    return [float(step) for step, _ in points], [float(value) for _, value in points]


def _short(name: str) -> str:
    """A curve's name without what is already in the plot's title."""
    for ending in ("/loss", "/grad_norm", "_grad", "/kvd"):
        name = name.removesuffix(ending)
    return name.removeprefix("held_out/").replace("_", " ").replace("/", ": ")


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings that differ between runs: a dotted key, and its value in each run, as JSON."""
    found = [_flat(run.config) for run in runs]
    keys = list(dict.fromkeys(key for config in found for key in config))
    values = [(key, [config.get(key, ABSENT) for config in found]) for key in keys]
    return [(key, each) for key, each in values if len(set(each)) > 1]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings, flattened to dotted keys."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = json.dumps(value, ensure_ascii=False)
    return found
