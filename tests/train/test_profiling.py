"""A window of steps is traced; the same run without it has the same bits."""

import jax
import pytest
from toy_training import run

from vpae_jax.train.loop import Hook
from vpae_jax.train.profiling import FOLDER, Window
from vpae_jax.types import UserError


def traces(workdir):
    return sorted((workdir / FOLDER).rglob("*.xplane.pb"))


def annotated(path):
    """(update, step) of every annotated step in a trace."""
    data = jax.profiler.ProfileData.from_file(str(path))
    events = [event for plane in data.planes for line in plane.lines for event in line.events]
    return {(e.name, stats["step_num"]) for e in events if "step_num" in (stats := dict(e.stats))}


def test_the_steps_of_the_window_are_traced(tmp_path, capsys):
    run(tmp_path, steps=6, profile="3:4")
    (trace,) = traces(tmp_path)
    assert annotated(trace) == {("follower", 3), ("follower", 4), ("leader", 4)}
    assert f"profile: {tmp_path / FOLDER}" in capsys.readouterr().out


def test_a_run_that_ends_within_the_window_writes_its_trace_and_a_later_one_its_own(tmp_path):
    def kill(step, state):
        if step == 3:
            raise InterruptedError
        return {}

    with pytest.raises(InterruptedError):
        run(tmp_path, steps=6, profile="2:5", hooks=(Hook(1, kill, "killing"),))
    (first,) = traces(tmp_path)
    assert {step for _, step in annotated(first)} == {2, 3}
    run(tmp_path, steps=6, profile="2:5")
    assert {step for path in traces(tmp_path) for _, step in annotated(path)} >= {2, 3, 5}


def test_without_a_window_there_is_no_trace(tmp_path):
    run(tmp_path, steps=2)
    assert not (tmp_path / FOLDER).exists() and Window.parse("") is None


@pytest.mark.parametrize("text", ["5", "0:3", "4:3", "a:b", "1:2:3", "-1:2", "1:"])
def test_another_text_is_one_line(text):
    with pytest.raises(UserError, match=f"^profile is '{text}', expected FROM:TO"):
        Window.parse(text)
