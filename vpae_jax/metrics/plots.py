"""Line plots as SVG text that uses the page's colour variables, so that they follow its light and dark themes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure

# Placeholder colours for matplotlib; each is replaced by a variable of the page's style sheet.
INK, LINE = "#010203", "#040506"
SERIES = ("#070809", "#0a0b0c", "#0d0e0f", "#101112", "#131415", "#161718")
KINDS = ("-", "--", ":", "-.")
_VARIABLES = {INK: "--ink", LINE: "--line", **{color: f"--series-{i}" for i, color in enumerate(SERIES)}}
LEGEND_COLUMNS, LEGEND_LINE = 2, 0.19  # height of a legend line in inches


@dataclass(frozen=True)
class Curve:
    """A named line.

    Attributes:
      name: in the legend.
      steps, values: its points.
      color: index of the page's series colour; after the sixth they repeat with the next line style.
      kind: line style: solid, dashed, dotted, or dash-dotted.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    color: int = 0
    kind: int = 0


def line_plot(title: str, curves: Sequence[Curve], identity: str, logarithmic: bool = False, axis: str = "step") -> str:
    """An `<svg>` element.

    Args:
      title: shown above the plot.
      curves: at least one; all share the axes.
      identity: unique among the plots of the page.
      logarithmic: whether to use a logarithmic vertical axis, if every value is positive.
      axis: label of the horizontal axis.
    """
    columns = LEGEND_COLUMNS if max(len(curve.name) for curve in curves) < 26 else 1
    height = 2.4 + LEGEND_LINE * math.ceil(len(curves) / columns)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": identity, "font.family": "sans-serif"}):
        figure = Figure(figsize=(4.2, height), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            turns, color = divmod(curve.color, len(SERIES))
            kind = KINDS[(curve.kind + turns) % len(KINDS)]
            axes.plot(curve.steps, curve.values, kind, color=SERIES[color], linewidth=1.4, label=curve.name)
        if logarithmic and all(value > 0 for curve in curves for value in curve.values):
            axes.set_yscale("log")
        axes.set_title(title, loc="left", color=INK, fontsize=10)
        axes.set_xlabel(axis, color=INK, fontsize=9)
        axes.tick_params(which="both", colors=LINE, labelcolor=INK, labelsize=9)
        axes.grid(color=LINE, linewidth=0.5, alpha=0.5)
        axes.spines[:].set_visible(False)
        look = {"fontsize": 9, "labelcolor": INK, "frameon": False, "handlelength": 2.4}
        figure.legend(loc="outside lower left", ncols=columns, **look)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' width="[^"]*pt" height="[^"]*pt"', ' role="img"', svg, count=1)
    # Identifiers are unique within one SVG only, and one page holds several.
    prefix = re.sub(r"\W", "-", identity)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg
