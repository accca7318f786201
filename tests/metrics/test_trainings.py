"""Curves of trainings, and the plots that they are drawn in."""

import re

import pytest

from vpae_jax.metrics import trainings
from vpae_jax.metrics.plots import KINDS, Curve, line_plot
from vpae_jax.metrics.rows import Run
from vpae_jax.metrics.times import ABSENT
from vpae_jax.metrics.trainings import MOST_LINES, differences, training_plots


@pytest.fixture
def drawn(monkeypatch):
    """Titles and curves of what is plotted."""
    found = []

    def watched(title, curves, *how, **more):
        found.append((title, curves))
        return line_plot(title, curves, *how, **more)

    monkeypatch.setattr(trainings, "line_plot", watched)
    return found


def run(name, *losses):
    records = [{"step": step, **{f"{loss}/loss": step / 2 for loss in losses}} for step in (1.0, 2.0, 3.0)]
    return Run(name, records, {})


def test_several_runs_differ_by_colour_and_quantities_by_kind_of_line(drawn):
    svg = training_plots([run("a", "fake", "heads"), run("b", "fake", "heads"), run("c", "heads")])
    ((title, curves),) = drawn
    assert title == "loss" and len(svg) == 1
    looks = {curve.name: (curve.color, curve.kind) for curve in curves}
    assert looks == {"a: fake": (0, 0), "b: fake": (1, 0), "a: heads": (0, 1), "b: heads": (1, 1), "c: heads": (2, 1)}
    for color in range(3):
        assert f"var(--series-{color})" in svg[0]
    assert "stroke-dasharray" in svg[0]


def test_one_run_has_a_colour_for_each_quantity(drawn):
    training_plots([run("a", *"pqrstuvwx")])
    ((_, curves),) = drawn
    assert [(curve.name, curve.color, curve.kind) for curve in curves] == [(n, i, 0) for i, n in enumerate("pqrstuvwx")]


def test_no_plot_of_several_runs_has_too_many_lines(drawn):
    training_plots([run(name, *"pqrst") for name in "abc"])
    assert [len(curves) for _, curves in drawn] == [6, 6, 3]
    assert max(len(curves) for _, curves in drawn) <= MOST_LINES
    assert {curve.kind for _, curves in drawn for curve in curves} == {0, 1}, "kinds begin again with each plot"


def test_a_single_point_and_what_is_not_finite_are_no_curve(drawn):
    records = [{"step": 1.0, "a/loss": 1.0, "b/loss": 1.0}, {"step": 2.0, "a/loss": 2.0, "b/loss": float("nan")}]
    training_plots([Run("one", records, {}), Run("two", [], {})])
    ((_, curves),) = drawn
    assert [curve.name for curve in curves] == ["one: a"]
    assert training_plots([]) == []


def test_settings_that_differ():
    first = {"name": "a", "method": {"k": 3, "taps": [1, 2]}, "same": {"x": 1}, "only": {}, "kind": "3"}
    second = {"name": "b", "method": {"k": 3, "taps": [1, 3], "new": None}, "same": {"x": 1}, "kind": 3}
    assert differences([Run("a", [], first), Run("b", [], second)]) == [
        ("name", ['"a"', '"b"']),
        ("method.taps", ["[1, 2]", "[1, 3]"]),
        ("only", ["{}", ABSENT]),
        ("kind", ['"3"', "3"]),
        ("method.new", [ABSENT, "null"]),
    ]
    assert differences([Run("a", [], first), Run("b", [], first)]) == [] == differences([Run("a", [], first)])


def test_line_plot_takes_the_colours_of_the_page():
    svg = line_plot("loss", [Curve("a", [1.0, 2.0, 3.0], [3.0, 2.0, 1.0])], "one", logarithmic=True)
    assert svg.startswith("<svg") and "var(--series-0)" in svg and "var(--ink)" in svg
    assert not re.search(r"#0[14]0", svg)
    assert svg == line_plot("loss", [Curve("a", [1.0, 2.0, 3.0], [3.0, 2.0, 1.0])], "one", logarithmic=True)
    line_plot("loss", [Curve("a", [1.0, 2.0], [0.0, -1.0])], "two", logarithmic=True)


def test_colours_begin_again_with_other_lines():
    curves = [Curve(str(i), [0.0, 1.0], [0.0, float(i)], color=i) for i in range(8)]
    svg = line_plot("many", curves, "many")
    assert len(KINDS) == 4 and svg.count("stroke-dasharray") >= 2
