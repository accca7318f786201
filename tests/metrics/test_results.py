"""What an evaluation leaves besides its page: numbers, sample clips, the headline, times."""

import dataclasses
import json

import numpy as np
import pytest
from moving_patterns import patterns

from vpae_jax.media import read_image, read_video, write_video
from vpae_jax.metrics import results
from vpae_jax.metrics.gallery import stems
from vpae_jax.metrics.results import NAIVE, headline, table, write_metrics, write_samples
from vpae_jax.metrics.rows import Row
from vpae_jax.metrics.times import ABSENT, TIMES, as_json, seconds, speedup, time_table, whole
from vpae_jax.tasks.video.scores import METRICS

HALVES = ("t2v", "i2v")


def row(name, evaluations, kvd, network=None, **scores):
    values = {"kvd": kvd, "sharpness": 1.0, **scores}
    found = {f"{half}/{key}": value for half in HALVES for key, value in values.items()}
    times = {} if network is None else {"text": 0.06, "network": network, "decode": 0.04, "peak memory": 4e9}
    return Row(name, evaluations, found, {"model": "a/b"}, times=times)


ROWS = (
    row("teacher", 100, 12.0, 0.9, psnr_first=30.0),
    row("teacher" + NAIVE, 1, 900.0, 0.01, psnr_first=20.0),
    row("student", 1, 40.0, 0.009, psnr_first=30.0),
)
REAL = row("real", None, 1.0)


def test_headline_compares_the_newest_phase_or_the_last_student():
    phases = [
        row("phase 1", 1, 50.0),
        row("phase 2", 1, 41.0),
        row("phase 2, four steps", 4, 3.0),
        row("another", 1, 2.0),
    ]
    meanings = [meaning for _, meaning in headline([*ROWS, *phases], METRICS[0])]
    assert meanings[0].endswith("phase 2")
    assert headline([*ROWS, phases[0], phases[3]], METRICS[0])[0][1].endswith("phase 1")
    numbers = dict((meaning, number) for number, meaning in headline(ROWS, METRICS[0]))
    against_one = next(meaning for meaning, number in numbers.items() if number.startswith("900 "))
    assert numbers[against_one].endswith(" 40")
    first = ROWS[0]
    assert against_one.endswith(f"; {first.name} in {first.evaluations}: {first.scores['t2v/kvd']:.0f}")
    assert headline(ROWS[:2], METRICS[0]) == []


def test_headline_says_how_much_faster_the_network_is_and_the_whole_clip():
    found = {meaning.partition(",")[0]: (number, meaning) for number, meaning in headline(ROWS, METRICS[0])}
    number, meaning = found["less network time per clip"]
    assert number == f"100 {TIMES}" and meaning.endswith("0.9 s → 9 ms")
    number, meaning = found["less time for a whole clip"]
    assert number == f"9.2 {TIMES}" and meaning.endswith("1 s → 0.109 s")
    untimed = [dataclasses.replace(one, times={}) for one in ROWS]
    assert not any("time" in meaning for _, meaning in headline(untimed, METRICS[0]))


def test_whole_clips_are_compared_by_the_same_stages():
    first, other = ROWS[0], dataclasses.replace(ROWS[2], times={"network": 0.009})
    assert speedup(first, other, "network") == pytest.approx(100) and speedup(first, other, "whole") is None
    assert speedup(first, row("untimed", 1, 1.0), "network") is None


def test_times():
    times = {
        "text": 0.5,
        "first frame": 0.25,
        "network": 2.0,
        "decode": 0.25,
        "evaluation": 0.5,
        "first call": 60.0,
        "peak memory": 8.0,
    }
    assert whole(times) == 3.0 and whole({"evaluation": 1.0}) is None
    assert as_json(times) == {
        "text_seconds": 0.5,
        "first_frame_seconds": 0.25,
        "network_seconds": 2.0,
        "decode_seconds": 0.25,
        "evaluation_seconds": 0.5,
        "first_call_seconds": 60.0,
        "whole_seconds": 3.0,
        "peak_memory_bytes": 8.0,
    }
    assert as_json({}) == {} and time_table([REAL]) is None
    assert [seconds(one) for one in (None, 0.00123, 0.1, 2.345, 1234.5)] == [
        ABSENT,
        "1.23 ms",
        "0.1 s",
        "2.35 s",
        "1234 s",
    ]


def test_metrics_json(tmp_path):
    write_metrics(tmp_path / "metrics.json", METRICS, REAL, ROWS, 128, {"jax": "1"})
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["clips_a_half"] == 128
    assert found["real"]["t2v"]["kvd"] == 1.0
    assert [r["name"] for r in found["rows"]] == ["teacher", "teacher, one step", "student"]
    assert found["rows"][0]["i2v"]["psnr_first"] == 30.0
    assert found["rows"][0]["evaluations"] == 100
    assert found["rows"][2]["times"] == as_json(ROWS[2].times)
    assert found["rows"][2]["model"] == "a/b"
    write_metrics(tmp_path / "metrics.json", METRICS, None, ROWS, 128, {})
    assert json.loads((tmp_path / "metrics.json").read_text())["real"] is None


def made(folder, name, clips):
    """A row with clips on disk."""
    files = [folder / name / f"{i}.mp4" for i in range(len(clips))]
    for file, clip in zip(files, clips, strict=True):
        write_video(file, clip, 8.0)
    return Row(name, 1, {}, files={"t2v": files})


def test_samples_are_the_first_clips_side_by_side(tmp_path):
    clips = patterns(10, height=32, width=48)
    write_samples(tmp_path / "samples", [made(tmp_path, "a, b/c", clips), made(tmp_path, "a b_c", clips[:2])], 8.0)
    names = {file.name for file in (tmp_path / "samples").iterdir()}
    assert names == {"a_b_c_t2v.mp4", "a_b_c_t2v.png", "a_b_c_2_t2v.mp4", "a_b_c_2_t2v.png"}
    strip, sheet = read_video(tmp_path / "samples/a_b_c_t2v.mp4"), read_image(tmp_path / "samples/a_b_c_t2v.png")
    assert strip.shape == (9, 32, 8 * 48, 3) and sheet.shape == (8 * 33 - 1, 9 * 49 - 1, 3)
    for i, clip in enumerate(clips[:8].astype(int)):
        assert np.abs(strip[:, :, 48 * i : 48 * (i + 1)] - clip).mean() < 12  # encoded twice
        assert np.abs(sheet[33 * i : 33 * i + 32, 49 * 4 : 49 * 4 + 48] - clip[4]).mean() < 12


def test_samples_of_large_clips_are_made_smaller(tmp_path, monkeypatch):
    """8 clips of 96 pixels would be 768 wide, and so would 8 frames of the 9 that there are."""
    monkeypatch.setattr(results, "MOST_WIDTH", 400)
    monkeypatch.setattr(results, "MOST_FRAMES", 5)
    clips = patterns(8, height=64, width=96)
    write_samples(tmp_path / "samples", [made(tmp_path, "large", clips)], 8.0)
    strip, sheet = (tmp_path / f"samples/large_t2v.{kind}" for kind in ("mp4", "png"))
    assert read_video(strip).shape == (9, 34, 8 * 50, 3)
    found = read_image(sheet).astype(int)
    assert found.shape == (8 * 55 - 1, 5 * 81 - 1, 3)
    last = clips[0, -1].astype(float).mean((0, 1))
    assert np.abs(found[:54, 4 * 81 :].mean((0, 1)) - last).max() < 4, "the first and the last frame are among them"


def test_table():
    rows = [REAL, *ROWS]
    lines = table(METRICS, rows).splitlines()
    assert len(lines) == 2 * 5 + 1
    assert lines[0].split() == ["t2v", *(word for row in rows for word in row.name.split())]
    assert lines[1].split() == ["evaluations", "-", "100", "1", "1"]
    assert lines[2].split()[0] == "kvd" and lines[2].endswith(" 40.000")
    assert len({len(line) for line in lines if line}) == 1
    one_half = [dataclasses.replace(one, scores={"i2v/kvd": 2.0}) for one in ROWS]
    assert [line.split()[0] for line in table(METRICS, one_half).splitlines()] == ["i2v", "evaluations", "kvd"]


def test_table_of_many_rows_is_no_wider_than_a_terminal():
    rows = [dataclasses.replace(ROWS[0], name=f"a student, seed {i}") for i in range(20)]
    lines = table(METRICS, rows).splitlines()
    assert max(map(len, lines)) <= 120
    assert sum("".join(lines).count(row.name) for row in rows[:1]) == 2, "once for each half"
    assert all(any(line.endswith(row.name) or f"{row.name} " in line for line in lines) for row in rows)


def test_names_of_files_do_not_collide():
    names = ["a b", "a_b", "A, b", "../../x", ".hidden", "…"]
    found = stems([Row(name, 1, {}) for name in names])
    assert len({one.lower() for one in found.values()}) == len(names)
    assert not any("/" in one or one.startswith(".") for one in found.values())


def test_a_clip_is_whole_only_with_its_network_and_decoder():
    stages = {"text": 0.5, "network": 2.0, "decode": 0.25}
    assert whole(stages) == 2.75
    for absent in ("network", "decode"):
        assert whole({name: value for name, value in stages.items() if name != absent}) is None
