"""What a long encoding says of itself in a log and on a terminal."""

import sys

import pytest

from vpae_jax.encoding import progress
from vpae_jax.encoding.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until `clock.now` is changed."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def said(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_lines_come_within_a_unit_with_the_time_that_is_left(clock, capsys):
    """A teacher's clip may take minutes, and a unit hours; the first clip's time includes compilation."""
    with Progress([4, 4]) as shown:
        for used in (True, True, False):
            clock.now += 200
            shown.advance(used)
        clock.now += 1
        shown.end_of_unit()
    assert said(capsys) == [
        "encoded 1 clips; 0 of 2 units; 200 s per clip; time left unknown until a second clip is done",
        "encoded 2 clips; 0 of 2 units; 200 s per clip; 0:20:00 left",
        "encoded 2 clips, 1 rejected; 0 of 2 units; 300 s per clip; 0:16:40 left",
    ]


def test_lines_are_a_minute_apart_and_the_last_unit_has_one(clock, capsys):
    with Progress([200]) as shown:
        for _ in range(200):
            clock.now += 1
            shown.advance(True)
        shown.end_of_unit()
    assert said(capsys) == [
        "encoded 61 clips; 0 of 1 units; 1.0 clips/s; 0:02:19 left",
        "encoded 122 clips; 0 of 1 units; 1.0 clips/s; 0:01:18 left",
        "encoded 183 clips; 0 of 1 units; 1.0 clips/s; 0:00:17 left",
        "encoded 200 clips; 1 of 1 units; 1.0 clips/s; 0:00:00 left",
    ]


def test_without_numbers_the_first_unit_tells_what_is_left(clock, capsys):
    with Progress([None, None]) as shown:
        clock.now += 100
        shown.advance(True)
        shown.advance(True)
        shown.end_of_unit()
        clock.now += 100
        shown.advance(True)
    assert said(capsys) == [
        "encoded 1 clips; 0 of 2 units; 100 s per clip; time left unknown until a unit is done",
        "encoded 3 clips; 1 of 2 units; 67 s per clip; 0:00:50 left",
    ]


def test_the_bar_of_a_terminal_has_its_total_from_the_start(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress([3, 2]) as shown:
        assert shown.bar is not None and shown.bar.total == 5
        shown.advance(True)
        shown.advance(False)
        assert shown.bar.n == 2
    with Progress([None, None]) as shown:
        assert shown.bar is not None and shown.bar.total is None
        for _ in range(3):
            shown.advance(True)
        shown.end_of_unit()
        assert shown.bar.total == 6
    assert said(capsys) == []
