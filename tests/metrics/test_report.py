"""The page: one file that loads nothing, with every clip, score, curve and setting in it."""

import base64
import functools
import json
import re
from html.parser import HTMLParser

import av
import numpy as np
import pytest
from moving_patterns import patterns

from vpae_jax.metrics.base import Metric
from vpae_jax.metrics.plots import Curve, line_plot
from vpae_jax.metrics.report import REST_FRAMES, ZOOM, Report, Row, Run, video_uri, write_report
from vpae_jax.metrics.results import NAIVE, headline, table, write_metrics, write_samples
from vpae_jax.tasks.video.scores import METRICS

CLIPS = 3


@functools.cache
def clips():
    return patterns(CLIPS, height=48, width=48)


def row(name, evaluations, kvd, seconds=None, **scores):
    values = {"kvd": kvd, "sharpness": 1.0, **scores}
    halves = ("t2v", "i2v")
    found = {f"{half}/{key}": value for half in halves for key, value in values.items()}
    return Row(name, evaluations, found, {half: clips() for half in halves}, {"model": "a/b"}, seconds, seconds)


@pytest.fixture
def report():
    records = [{"step": s, "generator/loss": 1 / s, "heads/loss": 2.0, "heads/grad_norm": s} for s in (1.0, 2.0, 3.0)]
    config = {"name": "phase1", "seed": 17, "text": "</script><b>"}
    return Report(
        title="A <title> & more",
        summary="What was compared.",
        headline=[("95 x", "faster")],
        metrics=METRICS,
        real=row("real", None, 1.0),
        rows=[
            row("teacher", 100, 12.0, 0.9, psnr_first=30.0),
            row("teacher" + NAIVE, 1, 900.0, 0.01, psnr_first=20.0),
            row("student", 1, 40.0, 0.009, psnr_first=30.0),
        ],
        captions={half: ["a one moves up", "a <two> moves left", "an eight moves down"] for half in ("t2v", "i2v")},
        count=128,
        fps=8.0,
        runs=[Run("phase 1", records, config, "a note"), Run("phase 2", records, {}, "")],
        facts={"jax": "1.2.3"},
    )


class Page(HTMLParser):
    """Collects elements, and complains of what is not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.videos, self.ids, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in ("meta", "col", "br", "path", "use"):
            self.open.append(tag)
        if tag == "video":
            self.videos.append(values)
        if "id" in values:
            self.ids.append(values["id"])

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        if tag not in ("meta", "col", "br", "path", "use"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page(report, tmp_path):
    path = tmp_path / "report.html"
    write_report(path, report)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    text = path.read_text()
    page = Page(text)
    assert len(page.videos) == 2 * 4, "every row in both halves"
    assert all({"autoplay", "loop", "muted"} <= set(video) for video in page.videos)
    assert len(page.ids) == len(set(page.ids)), "two plots of one name must not share identifiers"
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text), "nothing is loaded from elsewhere"
    assert "@import" not in text
    words = "".join(page.text)
    for expected in ("A <title> & more", "a <two> moves left", "95 x", "a note", '"seed": 17', "1.2.3", "</script><b>"):
        assert expected in words
    assert text.count("<svg") == 4
    assert "prefers-color-scheme: dark" in text


def test_the_best_of_each_column_is_marked(report, tmp_path):
    write_report(tmp_path / "report.html", report)
    text = (tmp_path / "report.html").read_text()
    assert text.count('<td class="best">12.0</td>') == 2, "KVD of the teacher, in both halves"
    assert text.count('<td class="best">30.0</td>') == 4, "equal values are equally good"
    assert '<td class="best">900.0</td>' not in text
    assert '<td class="best">1.0</td>' not in text, "real clips do not compete"


def test_metric_best():
    values = {"a": 0.5, "b": 1.1, "c": 3.0}
    assert Metric("m", "m", "more", "").best(values, None) == "c"
    assert Metric("m", "m", "less", "").best(values, None) == "a"
    assert Metric("m", "m", "real", "").best(values, 1.0) == "b"
    assert Metric("m", "m", "real", "").best(values, None) is None
    assert Metric("m", "m", "more", "").best({}, None) is None


def test_video_uri_is_the_clips_side_by_side(tmp_path):
    uri = video_uri(clips(), 8.0)
    (tmp_path / "clip.mp4").write_bytes(base64.b64decode(uri.removeprefix("data:video/mp4;base64,")))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    wide = 48 * ZOOM + 2
    assert frames.shape == (9 + REST_FRAMES, 48 * ZOOM, CLIPS * wide, 3)
    for i, clip in enumerate(clips()):
        found = frames[:9, ::ZOOM, i * wide + 1 : (i + 1) * wide - 1 : ZOOM].astype(int)
        assert np.abs(found - clip).mean() < 6


def test_line_plot_takes_the_colours_of_the_page():
    svg = line_plot("loss", [Curve("a", [1.0, 2.0, 3.0], [3.0, 2.0, 1.0])], "one", logarithmic=True)
    assert svg.startswith("<svg") and "var(--series-0)" in svg and "var(--ink)" in svg
    assert not re.search(r"#0[14]0", svg)
    assert svg == line_plot("loss", [Curve("a", [1.0, 2.0, 3.0], [3.0, 2.0, 1.0])], "one", logarithmic=True)
    line_plot("loss", [Curve("a", [1.0, 2.0], [0.0, -1.0])], "two", logarithmic=True)


def test_headline_compares_the_newest_phase_or_the_last_student(report):
    phases = [
        row("phase 1", 1, 50.0),
        row("phase 2", 1, 41.0),
        row("phase 2, four steps", 4, 3.0),
        row("another", 1, 2.0),
    ]
    meanings = [meaning for _, meaning in headline([*report.rows, *phases], METRICS[0])]
    assert meanings[0].endswith("phase 2")
    assert headline([*report.rows, phases[0], phases[3]], METRICS[0])[0][1].endswith("phase 1")
    numbers = dict((meaning, number) for number, meaning in headline(report.rows, METRICS[0]))
    assert numbers["less network time a clip, measured in this run"].startswith("100 ")
    against_one = next(meaning for meaning, number in numbers.items() if number.startswith("900 "))
    assert numbers[against_one].endswith(" 40")
    first = report.rows[0]
    assert against_one.endswith(f"; {first.name} in {first.evaluations}: {first.scores['t2v/kvd']:.0f}")
    assert headline(report.rows[:2], METRICS[0]) == []


def test_metrics_json(report, tmp_path):
    write_metrics(tmp_path / "metrics.json", METRICS, report.real, report.rows, 128, {"jax": "1"})
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["clips_a_half"] == 128
    assert found["real"]["t2v"]["kvd"] == 1.0
    assert [r["name"] for r in found["rows"]] == ["teacher", "teacher, one step", "student"]
    assert found["rows"][0]["i2v"]["psnr_first"] == 30.0
    assert found["rows"][0]["evaluations"] == 100
    assert found["rows"][2]["diffusion_seconds_a_clip"] == 0.009
    assert found["rows"][2]["model"] == "a/b"


def test_samples_and_table(report, tmp_path):
    write_samples(tmp_path, report.rows, 8.0)
    names = {file.name for file in tmp_path.iterdir()}
    assert {"teacher_one_step_t2v.mp4", "student_i2v.png", "student_i2v.mp4"} <= names
    assert len(names) == 3 * 2 * 2
    lines = table(METRICS, [report.real, *report.rows]).splitlines()
    assert len(lines) == 2 * 5 + 1
    assert lines[4].split()[:3] == ["student", "1", "40.000"]
