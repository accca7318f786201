"""From a suite's result files to the aggregate scores of its leaderboard.

A result file is what VBench writes, `*_eval_results.json`: {dimension: [score, ...]}, one dimension or several. With x
a dimension's score and (low, high) its bounds,

    s      = (x - low) / (high - low)                  normalised
    part   = sum_d w_d s_d / sum_d w_d                 quality, semantic, i2v; of VBench-2.0 five plain means
    total  = sum_p W_p part_p / sum_p W_p

with the constants of scripts/constant.py and the formulas of scripts/cal_final_score.py and cal_i2v_final_score.py in
Vchitect/VBench, and of VBench-2.0/scripts. As there, a dimension without a result has x = 0, which becomes negative by
normalisation if low is positive.

The quality score in the V-PAE paper (2508.21019, Table 1) is another number: the plain mean of VBench-I2V's i2v part
and the six unnormalised quality scores.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpae_jax.files import write_text
from vpae_jax.types import UserError

RESULTS = "*_eval_results.json"
SCORES = "scores.json"
PLAIN = "plain mean"
LARGEST = 2.0  # scores are fractions; VBench-2.0's diversity may be somewhat above 1


@dataclass(frozen=True)
class Dimension:
    """The contribution of a dimension to its part.

    Attributes:
      low, high: bounds of its score, which are mapped to 0 and 1.
      weight: in its part.
    """

    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0

    def normalised(self, score: float) -> float:
        return (score - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Formula:
    """How a suite's scores are aggregated.

    Attributes:
      parts: the dimensions of each part.
      weights: of the parts, in the total.
      plain: the part and the dimensions whose mean the V-PAE paper reports; empty if it reports none.
      ignored: dimensions that the suite measures but does not count.
    """

    parts: Mapping[str, Mapping[str, Dimension]]
    weights: Mapping[str, float]
    plain: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def dimensions(self) -> dict[str, Dimension]:
        """The dimensions of all parts."""
        return {name: dimension for part in self.parts.values() for name, dimension in part.items()}


@dataclass(frozen=True)
class Scores:
    """A row's scores.

    Attributes:
      dimensions: the scores measured by the suite, as fractions.
      missing: dimensions that were not measured, which count as 0.
      parts, total: by the suite's formula.
      plain: the V-PAE paper's mean; None if the paper has none for this suite, or if a score that it needs is missing.
    """

    dimensions: Mapping[str, float]
    missing: tuple[str, ...]
    parts: Mapping[str, float]
    total: float
    plain: float | None


_QUALITY = {
    "subject_consistency": Dimension(0.1462, 1.0),
    "background_consistency": Dimension(0.2615, 1.0),
    "motion_smoothness": Dimension(0.706, 0.9975),
    "dynamic_degree": Dimension(weight=0.5),
    "aesthetic_quality": Dimension(),
    "imaging_quality": Dimension(),
}

FORMULAS: Mapping[str, Formula] = {
    "vbench": Formula(
        {
            "quality": {**_QUALITY, "temporal_flickering": Dimension(0.6293, 1.0)},
            "semantic": {
                "object_class": Dimension(),
                "multiple_objects": Dimension(),
                "human_action": Dimension(),
                "color": Dimension(),
                "spatial_relationship": Dimension(),
                "scene": Dimension(0.0, 0.8222),
                "appearance_style": Dimension(0.0009, 0.2855),
                "temporal_style": Dimension(0.0, 0.364),
                "overall_consistency": Dimension(0.0, 0.364),
            },
        },
        {"quality": 4.0, "semantic": 1.0},
    ),
    "vbench_i2v": Formula(
        {
            "quality": _QUALITY,
            "i2v": {
                "camera_motion": Dimension(weight=0.1),
                "i2v_subject": Dimension(0.1462, 1.0),
                "i2v_background": Dimension(0.2615, 1.0),
            },
        },
        {"quality": 1.0, "i2v": 1.0},
        plain=("i2v", *_QUALITY),
        ignored=("temporal_flickering",),
    ),
    "vbench2": Formula(
        {
            "creativity": dict.fromkeys(("Composition", "Diversity"), Dimension()),
            "commonsense": dict.fromkeys(("Instance_Preservation", "Motion_Rationality"), Dimension()),
            "controllability": dict.fromkeys(
                (
                    "Camera_Motion",
                    "Complex_Landscape",
                    "Complex_Plot",
                    "Dynamic_Attribute",
                    "Dynamic_Spatial_Relationship",
                    "Human_Interaction",
                    "Motion_Order_Understanding",
                ),
                Dimension(),
            ),
            "human fidelity": dict.fromkeys(("Human_Anatomy", "Human_Clothes", "Human_Identity"), Dimension()),
            "physics": dict.fromkeys(("Material", "Mechanics", "Multi-View_Consistency", "Thermotics"), Dimension()),
        },
        dict.fromkeys(("creativity", "commonsense", "controllability", "human fidelity", "physics"), 1.0),
    ),
}


def read_results(path: Path, formula: Formula) -> dict[str, float]:
    """Reads the score of each dimension from a result file, or from all result files in a folder and its subfolders.

    Raises:
      UserError: missing files, a file that is not a result, an unknown dimension, or one with two different scores.
    """
    files = sorted(path.rglob(RESULTS)) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: holds no {RESULTS}; give the folder that was the suite's output path")
    found: dict[str, float] = {}
    origin: dict[str, Path] = {}
    known = (*formula.dimensions, *formula.ignored)
    for file in files:
        for name, value in _read(file).items():
            if name not in known:
                raise UserError(f"{file}: unknown dimension {name!r}; this suite has {', '.join(known)}")
            score = value[0] if isinstance(value, list) and value else None
            if isinstance(score, bool) or not isinstance(score, int | float):
                raise UserError(f"{file}: {name} has no score; expected a list that begins with a number")
            score = float(score)
            if not abs(score) <= LARGEST:  # also NaN, the mean over no videos
                what = "the suite found no videos for it" if math.isnan(score) else "expected a fraction of 1"
                raise UserError(f"{file}: the score of {name} is {score:g}; {what}")
            if found.setdefault(name, score) != score:
                raise UserError(
                    f"{name} is {found[name]:g} in {origin[name]} and {score:g} in {file}; move the file that should "
                    "not count elsewhere"
                )
            origin.setdefault(name, file)
    return found


def add_up(measured: Mapping[str, float], formula: Formula) -> Scores:
    """Aggregates a row's scores from those of its dimensions."""
    parts = {}
    for part, dimensions in formula.parts.items():
        weights = sum(dimension.weight for dimension in dimensions.values())
        terms = (d.weight * d.normalised(measured.get(name, 0.0)) for name, d in dimensions.items())
        parts[part] = sum(terms) / weights
    weights = sum(formula.weights.values())
    total = sum(weight * parts[part] for part, weight in formula.weights.items()) / weights
    missing = tuple(name for name in formula.dimensions if name not in measured)
    plain = None
    if formula.plain and not missing:
        plain = sum(parts[name] if name in parts else measured[name] for name in formula.plain) / len(formula.plain)
    return Scores({n: measured[n] for n in formula.dimensions if n in measured}, missing, parts, total, plain)


def table(rows: Mapping[str, Scores], formula: Formula) -> str:
    """The scores in percent as text, with a column per row: each part's dimensions, the part, and the total."""
    names = [*formula.dimensions, *formula.parts, "total", *([PLAIN] if formula.plain else [])]
    first = max(map(len, names))
    widths = {row: max(len(row), 7) for row in rows}

    def line(name: str, values: Sequence[float | None]) -> str:
        cells = ("-" if value is None else f"{100 * value:.2f}" for value in values)
        return f"{name:{first}}  " + "  ".join(
            f"{cell:>{width}}" for cell, width in zip(cells, widths.values(), strict=True)
        )

    lines = [f"{'':{first}}  " + "  ".join(f"{row:>{width}}" for row, width in widths.items())]
    for part, dimensions in formula.parts.items():
        lines += [line(name, [row.dimensions.get(name) for row in rows.values()]) for name in dimensions]
        lines += [line(part, [row.parts[part] for row in rows.values()]), ""]
    lines.append(line("total", [row.total for row in rows.values()]))
    if formula.plain:
        lines.append(line(PLAIN, [row.plain for row in rows.values()]))
    return "\n".join(lines)


def write_scores(path: Path, suite: str, rows: Mapping[str, Scores], formula: Formula) -> None:
    """Writes all scores as JSON, as fractions; an existing file is replaced once the new one is complete."""
    found: dict[str, Any] = {"suite": suite, "rows": []}
    for name, row in rows.items():
        normalised = {key: formula.dimensions[key].normalised(value) for key, value in row.dimensions.items()}
        found["rows"].append(
            {
                "name": name,
                "dimensions": dict(row.dimensions),
                "normalised": normalised,
                "missing": list(row.missing),
                **row.parts,
                "total": row.total,
                **({"plain_mean": row.plain} if formula.plain else {}),
            }
        )
    write_text(path, json.dumps(found, indent=1) + "\n")


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file or folder; give what the suite has written") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}; give a {RESULTS} of the suite") from error
    if not isinstance(found, dict) or not found:
        raise UserError(f"{file}: holds no scores; give a {RESULTS} of the suite")
    return found
