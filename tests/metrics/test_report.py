"""The page: clips, scores, worst clips, times, trainings and settings, in one file or with a folder beside it."""

import base64
import dataclasses
import json
import os
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import open_browser
from full_disk import limited
from moving_patterns import patterns

from vpae_jax.media import read_image, read_video, write_video
from vpae_jax.metrics import report as page_module
from vpae_jax.metrics.base import Metric
from vpae_jax.metrics.report import MOST_EMBEDDED, write_report
from vpae_jax.metrics.rows import Report, Row, Run
from vpae_jax.metrics.times import ABSENT, TIMES
from vpae_jax.tasks.video.scores import METRICS
from vpae_jax.types import UserError

CLIPS, FRAMES, FPS = 5, 9, 8.0
HALVES = ("t2v", "i2v")
CAPTIONS = ["a one moves up", "a <two> moves left", "an eight & a nine", "a four", "a five"]
VOID = ("meta", "col", "br", "path", "use", "img", "rect")


def row(folder, name, evaluations, kvd, clips=CLIPS, size=(48, 48), **more):
    """A row with clips of its own, which are all different."""
    files = {}
    for seed, half in enumerate(HALVES):
        files[half] = [folder / name / half / f"{i}.mp4" for i in range(clips)]
        made = patterns(clips, sum(map(ord, name)) + seed, FRAMES, *size)
        for file, clip in zip(files[half], made, strict=True):
            write_video(file, clip, FPS)
    scores = {f"{half}/{key}": value for half in HALVES for key, value in {"kvd": kvd, "sharpness": 1.0}.items()}
    return Row(name, evaluations, scores, {"model": "a/b"}, files=files, **more)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    records = [{"step": s, "generator/loss": 1 / s, "heads/loss": 2.0, "heads/grad_norm": s} for s in (1.0, 2.0, 3.0)]
    config = {"name": "phase1", "steps": 200, "seed": 17, "method": {"name": "vpae", "text": "</script><b>"}}
    second = {"name": "phase2", "steps": 1600, "seed": 17, "method": {"name": "vpae"}}
    each = {
        "t2v/sharpness": [1.0, 0.4, 1.1, 1.9, float("nan")],
        "t2v/psnr_first": [30.0, 20.0, 10.0, 40.0, 50.0],
        "t2v/lpips_first": [0.1, 0.2, 0.3, 0.4, 0.0],
    }
    teacher = row(
        folder,
        "teacher",
        100,
        12.0,
        intervals={"t2v/kvd": (9.5, 14.25)},
        curves={"t2v/flow": [3.0] * (FRAMES - 1), "t2v/color_distance": [1.0] * FRAMES},
        times={"text": 0.1, "network": 2.0, "decode": 0.4, "first call": 321.0, "peak memory": 3.0 * 2**30},
    )
    student = row(
        folder,
        "student/1",
        1,
        40.0,
        each=each,
        curves={"t2v/flow": [2.0] * (FRAMES - 1), "t2v/interpolation_error": [2.0] * (FRAMES - 2)},
        times={"text": 0.1, "network": 0.02, "decode": 0.4},
    )
    return Report(
        title="A <title> & more",
        summary="What was compared.",
        headline=[("95 x", "faster")],
        metrics=METRICS,
        real=row(folder, "real", None, 1.0, clips=3),
        rows=[teacher, student, row(folder, "student_1", 1, 12.01)],
        captions=dict.fromkeys(HALVES, CAPTIONS),
        count=128,
        frames=FRAMES,
        fps=FPS,
        runs=[Run("phase 1", records, config, "a note", 8000), Run("phase 2", records, second, "")],
        facts={"jax": "1.2.3"},
    )


@pytest.fixture
def untrained(report):
    """The same without plots of trainings, which take the most time."""
    return dataclasses.replace(report, runs=[])


class Element:
    """A tag with what is in it."""

    def __init__(self, tag, attrs):
        self.tag, self.attrs, self.inside = tag, dict(attrs), []

    @property
    def text(self):
        return "".join(one if isinstance(one, str) else one.text for one in self.inside)

    def all(self, tag, **attrs):
        """Elements in their order; `class_` and `data_group` stand for class and data-group."""
        for one in self.inside:
            if isinstance(one, Element):
                wanted = {name.strip("_").replace("_", "-"): value for name, value in attrs.items()}
                if one.tag == tag and all(one.attrs.get(name) == value for name, value in wanted.items()):
                    yield one
                yield from one.all(tag, **attrs)


class Page(HTMLParser):
    """A page as elements; complains of what is not closed."""

    def __init__(self, path):
        super().__init__()
        self.root = Element("page", {})
        self.open, self.ids = [self.root], []
        self.feed(path.read_text())
        self.close()
        assert self.open == [self.root]
        (clips,) = self.root.all("script", id="clips")
        self.clips = json.loads(clips.text)

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(self.open[-1].inside[-1])

    def handle_startendtag(self, tag, attrs):
        self.open[-1].inside.append(Element(tag, attrs))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].inside.append(data)

    def after(self, tag, title):
        """The first element of a kind that comes after a heading."""
        found = next(self.root.all("main")).inside
        place = next(i for i, one in enumerate(found) if isinstance(one, Element) and one.text == title)
        inside = Element("rest", {})
        inside.inside = found[place:]
        return next(inside.all(tag))


def written(report, folder):
    write_report(folder / "report.html", report)
    return Page(folder / "report.html")


def large(report):
    """The first condition of the same, in clips that are not enlarged."""
    folder = next(iter(report.rows[0].files.values()))[0].parents[2]
    rows = [
        dataclasses.replace(
            row(folder / "large", one.name, one.evaluations, 1.0, clips=2, size=(96, 176)), times=one.times
        )
        for one in report.all_rows
    ]
    captions = {half: CAPTIONS[:2] for half in HALVES}
    return dataclasses.replace(report, real=rows[0], rows=rows[1:], captions=captions)


def test_one_page_holds_everything(report, tmp_path):
    page = written(report, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    text = (tmp_path / "report.html").read_text()
    assert not re.findall(r'(?:src|href|poster)="(?!data:|#)', text), "nothing is loaded from elsewhere"
    assert "@import" not in text and "prefers-color-scheme: dark" in text
    assert len(page.ids) == len(set(page.ids)), "two plots of one name must not share identifiers"
    for expected in ("A <title> & more", *CAPTIONS, "95 x", "a note", '"seed": 17', "1.2.3", "</script><b>"):
        assert expected in page.root.text
    assert "<two>" not in text and "</script><b>" not in text


def test_each_clip_is_in_the_page_as_it_was_written(untrained, tmp_path):
    """A column a condition: all rows below each other in one group, which play together."""
    page = written(untrained, tmp_path)
    assert next(page.root.all("body")).attrs["class"] == "small"
    for half in HALVES:
        for index in range(CLIPS):
            cells = list(page.root.all("td", data_group=f"{half} {index}"))
            videos = [list(cell.all("video")) for cell in cells]
            for one, found in zip(untrained.all_rows, videos, strict=True):
                if index >= len(one.files[half]):  # the real row holds fewer
                    assert found == []
                    continue
                (video,) = found
                clip = base64.b64decode(page.clips[video.attrs["data-clip"]].removeprefix("data:video/mp4;base64,"))
                assert clip == one.files[half][index].read_bytes()
                assert video.attrs["aria-label"] == f"{one.name}: {CAPTIONS[index]}"
                assert {"muted", "playsinline"} <= set(video.attrs) and "src" not in video.attrs


def test_a_clip_is_shown_by_its_middle_frame_before_it_plays(untrained, tmp_path):
    page = written(untrained, tmp_path)
    video = next(next(page.root.all("td", data_group="t2v 0")).all("video"))
    file = tmp_path / "picture.jpg"
    file.write_bytes(base64.b64decode(video.attrs["poster"].removeprefix("data:image/jpeg;base64,")))
    clip = read_video(untrained.real.files["t2v"][0]).astype(int)
    apart = [np.abs(read_image(file) - frame).mean() for frame in clip]
    assert int(np.argmin(apart)) == FRAMES // 2


def test_scores_with_their_intervals(report, tmp_path):
    table = written(report, tmp_path).after("table", "Scores, text to video")
    head, *lines = table.all("tr")
    names = [th.text for th in head.all("th")]
    assert names == ["realheld-out clips", "teacher100 evaluations", "student/11 evaluation", "student_11 evaluation"]
    kvd = next(line for line in lines if line.text.strip().startswith("KVD"))
    assert [td.text for td in kvd.all("td")] == ["1.0", "12.09.5 to 14.2", "40.0", "12.0"]
    marked = [td.attrs.get("class") for td in kvd.all("td")]
    assert marked == ["real", "best", None, "best"], "what reads the same is as good; real clips do not compete"


def test_worst_clips_are_those_farthest_from_the_goal(untrained, tmp_path):
    """Of the student: least sharpness away from 1 is best (real), most PSNR, least LPIPS. NaN is no value."""
    page = written(untrained, tmp_path)
    (folded,) = (d for d in page.root.all("details") if d.text.startswith("Worst clips of each model, text"))
    metrics = list(folded.all("details"))
    assert [d.attrs["name"] for d in metrics] == ["worst t2v"] * 3, "opening one closes the others"
    assert all("open" not in d.attrs for d in [folded, *metrics])
    expected = {"sharpness": [3, 1, 2], "psnr_first": [2, 1, 0], "lpips_first": [3, 2, 1]}
    student = untrained.rows[1]
    for metric, order in expected.items():
        figures = [f for f in page.root.all("figure") if f.attrs["data-group"].startswith(f"t2v {metric} ")]
        assert [int(f.attrs["data-group"].split()[-1]) for f in figures] == order
        for figure, index in zip(figures, order, strict=True):
            assert f"{student.each[f't2v/{metric}'][index]:.{1 if metric == 'psnr_first' else 3}f}" in figure.text
            assert f"clip {index}" in figure.text and CAPTIONS[index] in figure.text
            clips = [base64.b64decode(page.clips[v.attrs["data-clip"]].split(",")[1]) for v in figure.all("video")]
            beside = untrained.real.files["t2v"][index : index + 1]  # where there is one
            assert clips == [file.read_bytes() for file in (student.files["t2v"][index], *beside)]


def test_curves_begin_with_the_frame_that_they_are_of(untrained, monkeypatch, tmp_path):
    drawn, line_plot = {}, page_module.line_plot

    def watched(title, curves, *how, **more):
        drawn[title] = {curve.name: list(curve.steps) for curve in curves}
        return line_plot(title, curves, *how, **more)

    monkeypatch.setattr(page_module, "line_plot", watched)
    page = written(untrained, tmp_path)
    later = list(range(1, FRAMES))
    assert drawn == {
        "flow": {"teacher": later, "student/1": later},
        "colour distance": {"teacher": list(range(FRAMES))},
        "interpolation error": {"student/1": list(range(1, FRAMES - 1))},
    }
    assert "Frame by frame, text to video" in page.root.text
    assert "Frame by frame, image to video" not in page.root.text


def test_where_the_time_goes(untrained, tmp_path):
    table = written(untrained, tmp_path).after("table", "Where the time goes")
    head, first, shares, second, _ = table.all("tr")
    columns = [th.text for th in head.all("th")]
    against = "speed-up over teacher"
    assert columns[:4] == ["text", "network", "decode", "whole clip"]
    assert columns[4:] == [f"network, {against}", f"whole clip, {against}", "first call", "peak memory"]
    cells = [[td.text for td in line.all("td")] for line in (first, second)]
    assert cells[0] == ["0.1 s", "2 s", "0.4 s", "2.5 s", *2 * [f"1 {TIMES}"], "321 s", "3 GiB"]
    assert cells[1] == ["0.1 s", "20 ms", "0.4 s", "0.52 s", f"100 {TIMES}", f"4.8 {TIMES}", ABSENT, ABSENT]
    parts = [float(part.attrs["style"].removeprefix("flex: ")) for part in shares.all("i")]
    assert parts == [0.04, 0.8, 0.16]


def test_runs_are_drawn_over_one_another(report, tmp_path):
    page = written(report, tmp_path)
    plots = page.after("div", "Training")
    assert [len(list(plot.all("svg"))) for plot in plots.all("div")] == [1, 1]
    for svg, names in zip(plots.all("svg"), (["generator", "heads"], ["heads"]), strict=True):
        found = [text.text.strip() for text in svg.all("text")]
        assert {f"{run}: {name}" for run in ("phase 1", "phase 2") for name in names} <= set(found)
    table = page.after("table", "Settings that differ")
    assert [th.text for th in next(table.all("tr")).all("th")] == ["phase 1", "phase 2"]
    lines = [[one.text for one in line.inside if isinstance(one, Element)] for line in table.all("tr")][1:]
    assert lines == [
        ["name", '"phase1"', '"phase2"'],
        ["steps", "200", "1600"],
        ["method.text", '"</script><b>"', ABSENT],
    ]


def test_one_run_is_drawn_alone(report, tmp_path):
    page = written(dataclasses.replace(report, runs=report.runs[:1]), tmp_path)
    svg = next(page.after("div", "Training: phase 1").all("svg"))
    assert {"generator", "heads"} <= {text.text.strip() for text in svg.all("text")}
    assert "Settings that differ" not in page.root.text


def test_large_clips_lie_side_by_side(untrained, tmp_path):
    page = written(large(untrained), tmp_path)
    assert next(page.root.all("body")).attrs["class"] == "large"
    bands = list(page.root.all("section", class_="card band"))
    assert [band.attrs["data-group"] for band in bands] == ["t2v 0", "t2v 1", "i2v 0", "i2v 1"]
    for band in bands:
        assert [next(f.all("b")).text for f in band.all("figure")] == ["real", "teacher", "student/1", "student_1"]
        assert len(list(band.all("video"))) == 4 and len(list(band.all("button"))) == 1


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 6, 7, 8, 9])
def test_lines_of_large_clips_are_about_equally_long(rows):
    columns = page_module._columns(rows)
    lines = -(-rows // columns)
    assert columns <= 4 and lines == -(-rows // 4)
    assert rows > (lines - 1) * columns, "no line is empty"


def test_prompts_have_no_real_clips(untrained, tmp_path):
    page = written(dataclasses.replace(untrained, real=None), tmp_path)
    assert len(list(page.root.all("td", data_group="t2v 0"))) == len(untrained.rows)
    head = next(page.after("table", "Scores, text to video").all("tr"))
    assert len(list(head.all("th"))) == len(untrained.rows)
    # With no value of real clips none is farthest from it.
    found = {f.attrs["data-group"].split()[1] for f in page.root.all("figure")}
    assert found == {"psnr_first", "lpips_first"}


def test_a_row_without_clips_leaves_gaps(untrained, tmp_path):
    broken = Row("broken", 1, {})
    page = written(dataclasses.replace(untrained, rows=[*untrained.rows, broken]), tmp_path)
    *_, last = page.root.all("td", data_group="i2v 0")
    assert list(last.all("video")) == [] and last.text == ABSENT


def test_beyond_the_limit_clips_lie_beside_the_page(untrained, monkeypatch, tmp_path):
    """Only those that are shown; an earlier folder is replaced, and goes when the clips fit into the page."""
    monkeypatch.setattr(page_module, "MOST_EMBEDDED", 1000)
    monkeypatch.setattr(page_module, "SHOWN", 2)
    folder = tmp_path / "report_files"
    folder.mkdir()
    (folder / "earlier.mp4").touch()
    page = written(untrained, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "report_files"]
    names = {video.attrs["data-clip"] for video in page.root.all("video")}
    assert {file.name for file in folder.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("mp4", "jpg")}
    # Of t2v two of each row, and the other worst ones of the student, clips 2 and 3, beside real clip 2.
    assert len(names) == 2 * 2 * 4 + 2 + 1
    assert page.clips == {name: f"report_files/{name}.mp4" for name in names}
    assert {video.attrs["poster"] for video in page.root.all("video")} == {f"report_files/{name}.jpg" for name in names}
    for one, prefix in zip(untrained.rows[1:], ("t2v_student_1_", "t2v_student_1_2_"), strict=True):
        assert (folder / f"{prefix}1.mp4").read_bytes() == one.files["t2v"][1].read_bytes(), "names do not collide"
    monkeypatch.setattr(page_module, "MOST_EMBEDDED", MOST_EMBEDDED)
    written(untrained, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_full_disk_leaves_the_earlier_report(untrained, monkeypatch, tmp_path):
    monkeypatch.setattr(page_module, "MOST_EMBEDDED", 1000)
    written(untrained, tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    size = max(os.path.getsize(file) for one in untrained.all_rows for files in one.files.values() for file in files)
    for limit in (100, size + 1000):  # a clip, and then the page
        with (
            limited(limit),
            pytest.raises(UserError, match=r"report(_files|\.html).*: cannot be written: .*; make room"),
        ):
            write_report(tmp_path / "report.html", untrained)
        assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_clip_that_is_gone_is_named(report, tmp_path):
    gone = dataclasses.replace(report.rows[0], files={"t2v": [tmp_path / "gone.mp4"]})
    with pytest.raises(UserError, match=r"video .*gone\.mp4: no such file"):
        write_report(tmp_path / "report.html", dataclasses.replace(report, rows=[gone]))
    assert list(tmp_path.iterdir()) == []


def test_metric_best_and_worst():
    values = {"a": 0.5, "b": 1.1, "c": 3.0}
    more, less, real = (Metric("m", "m", goal, "") for goal in ("more", "less", "real"))
    assert [metric.best(values, 1.0) for metric in (more, less, real)] == ["c", "a", "b"]
    assert real.best(values, None) is None and more.best({}, None) is None
    each = [0.5, 1.1, 3.0, float("nan")]
    assert [metric.worst(each, 1.0, 2) for metric in (more, less, real)] == [[0, 1], [2, 1], [2, 0]]
    assert real.worst(each, None, 2) == [] and less.worst([], None, 2) == []


@pytest.mark.long
def test_rows_play_in_step_in_a_browser(untrained, tmp_path):
    """Pointing at a clip plays all rows of its condition from the start, again and again together, and nothing else."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    write_report(tmp_path / "large.html", large(untrained))
    write_report(tmp_path / "small.html", untrained)
    driver = open_browser("window-size=1400,900")

    def run(script, *given):
        return driver.execute_script(script, *given)

    def wait(script, *given):
        end = time.monotonic() + 120
        while not run(script, *given):
            assert time.monotonic() < end, script
            time.sleep(0.05)

    def band(group):
        return f"[...document.querySelectorAll('[data-group=\"{group}\"] video')]"

    try:
        driver.get((tmp_path / "large.html").as_uri())
        assert run("return [...document.querySelectorAll('video')].every(v => v.paused && !v.src && v.poster)")
        run(
            f"window.log = []; for (const v of {band('t2v 0')}) for (const what of ['play', 'ended'])"
            " v.addEventListener(what, () => window.log.push([what, v.dataset.clip]))"
        )
        clips = run(f"return {band('t2v 0')}.map(v => v.dataset.clip)")
        ActionChains(driver).move_to_element(
            driver.find_element(By.CSS_SELECTOR, "[data-group='t2v 0'] video")
        ).perform()
        wait(
            f"const t = {band('t2v 0')}.map(v => v.currentTime);"
            " return Math.min(...t) > 0 && Math.max(...t) - Math.min(...t) < arguments[0]",
            1 / FPS,
        )
        wait("return window.log.filter(([what]) => what === 'play').length >= 12")
        log = run("return window.log")
        for start in range(0, 20, 4):  # all begin, and begin again once all have ended
            events = log[start : start + 4]
            assert {what for what, _ in events} == {"ended" if start % 8 else "play"}
            assert sorted(clip for _, clip in events) == sorted(clips)
        assert run(f"return {band('t2v 0')}.every(v => v.played.start(0) === 0)")
        assert run(f"return {band('t2v 1')}.every(v => v.played.length === 0)")
        ActionChains(driver).move_to_element(driver.find_element(By.TAG_NAME, "h1")).perform()
        wait(f"return {band('t2v 0')}.every(v => v.paused)")

        button = driver.find_element(By.CSS_SELECTOR, "[data-group='t2v 1'] button")
        run("arguments[0].focus({ focusVisible: true })", button)
        wait(f"return {band('t2v 1')}.every(v => v.played.length > 0)")
        button.send_keys(Keys.ENTER)
        assert button.get_attribute("aria-pressed") == "true"
        button.send_keys(Keys.ENTER)
        assert button.get_attribute("aria-pressed") == "false"
        everything = driver.find_element(By.CSS_SELECTOR, "button.all")
        everything.click()
        wait(f"return {band('t2v 0')}.every(v => !v.paused)")
        assert everything.text == "Pause"

        driver.get((tmp_path / "small.html").as_uri())
        wait(f"return {band('t2v 0')}.every(v => v.played.length > 0)")
        driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
        )
        driver.refresh()
        assert driver.find_element(By.CSS_SELECTOR, "button.all").text == "Play all"
        ActionChains(driver).move_to_element(driver.find_element(By.CSS_SELECTOR, "[data-group='t2v 0']")).perform()
        assert run("return [...document.querySelectorAll('video')].every(v => !v.src)")
        driver.find_element(By.CSS_SELECTOR, "button.all").click()
        wait(f"return {band('t2v 0')}.every(v => v.played.length > 0)")
    finally:
        driver.quit()


def test_a_run_that_is_shorter_than_its_config_is_called_short(report, tmp_path):
    write_report(tmp_path / "report.html", report)
    text = (tmp_path / "report.html").read_text()
    assert "phase 1 was trained for 200 steps, a short run: its config trains for 8,000." in text
    assert "phase 2 was trained for 1,600 steps.</p>" in text
