"""The loop and its checkpoints, on a toy method whose every number is known."""

import dataclasses
import errno
import itertools
import re
import shutil
import time
from contextlib import suppress

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_training import batches, parts, run, slopes

from vpae_jax.train import checksums
from vpae_jax.train.checkpoint import read_state
from vpae_jax.train.clocks import Alarm, Clock
from vpae_jax.train.loop import Hook
from vpae_jax.train.metrics import read_metrics
from vpae_jax.train.newest import FOLDER, Moment, latest, moments_in
from vpae_jax.train.roles import merge_trees
from vpae_jax.train.step import make_update
from vpae_jax.types import UserError


def test_loop_reaches_the_target_and_records_every_step(tmp_path):
    state = run(tmp_path, steps=80, noise=0.0, checkpoint_every=30)
    assert slopes(state)["leader"] == pytest.approx(3.0, abs=0.3)
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == list(range(1, 81))
    assert int(state.step) == 80 and records[-1]["leader/step"] == 79


def test_each_repeat_has_a_batch_and_draws_of_its_own(tmp_path):
    shown = []
    found = run(tmp_path, steps=1, put=lambda batch: shown.append(batch) or batch)
    assert len({tuple(batch) for batch in shown}) == len(shown) == 2
    method, models, optimizers, state, frozen = parts(noise=0.5)
    update = make_update(method.updates[0], 0, models, optimizers)
    for repeat, batch in enumerate(shown):
        state, _ = update(state, frozen, batch, jnp.int32(repeat))
    assert slopes(found) == slopes(state)


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, stop):
    whole = run(tmp_path / "whole")

    class Killed(RuntimeError):
        pass

    def kill(step, state):
        if step == stop:
            raise Killed
        return {}

    with pytest.raises(Killed):
        run(tmp_path / "cut", hooks=(Hook(1, kill, "killing"),))
    resumed = run(tmp_path / "cut")
    assert bits(resumed) == bits(whole) and losses(tmp_path / "whole") == losses(tmp_path / "cut")


def bits(state):
    plain = dataclasses.replace(state, key=jax.random.key_data(state.key))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(plain)]


def losses(folder):
    timing = ("seconds_per_step", "data_wait", "bad_records")
    return [{k: v for k, v in r.items() if k not in timing} for r in read_metrics(folder)]


def test_a_run_that_is_stopped_between_the_updates_of_its_steps_ends_with_the_same_bits(tmp_path, capsys):
    """Two repeats of the follower's update a step, and on each second step the leader's."""
    hooked = []
    hook = Hook(1, lambda step, state: hooked.append(step) or {}, "looking")
    whole = run(tmp_path / "whole", steps=5, hooks=(hook,))
    seen, hooked[:] = [*hooked], []
    for updates, name in ((1, "0+1"), (2, "1+1"), (1, "1+2"), (2, "2+1"), (3, "3+2")):
        answers = iter([*[False] * (updates - 1), True])
        state = run(tmp_path / "cut", steps=5, hooks=(hook,), stop=lambda answers=answers: next(answers))
        assert latest(tmp_path / "cut") == Moment.named(name) and int(state.step) == int(name[0])
        assert next(answers, None) is None, "one question an update"
    last = run(tmp_path / "cut", steps=5, hooks=(hook,))
    assert bits(last) == bits(whole) and losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert "leader/loss" in losses(tmp_path / "cut")[1] and "follower/loss" in losses(tmp_path / "cut")[1]
    assert hooked == seen == [0, 1, 2, 3, 4, 5]
    assert "resuming from step 3+2 of " in capsys.readouterr().out


def test_minutes_make_checkpoints_between_updates_from_which_the_bits_are_the_same(tmp_path):
    whole = run(tmp_path / "whole", steps=4)
    run(tmp_path / "often", steps=2, checkpoint_every=100, checkpoint_minutes=1e-9)
    assert moments_in(tmp_path / "often" / FOLDER) == [Moment(1, 2), Moment(2)], "the last two of all"
    shutil.rmtree(tmp_path / "often" / FOLDER / "2")
    assert bits(run(tmp_path / "often", steps=4)) == bits(whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "often")


def test_the_alarm_rings_when_its_minutes_are_over():
    now = [100.0]
    alarm, never = Alarm(1.5, lambda: now[0]), Alarm(0.0, lambda: now[0])
    now[0] += 89.0
    assert not alarm.rings()
    now[0] += 1.0
    assert alarm.rings() and alarm.rings() and not never.rings()
    alarm.wind()
    assert not alarm.rings()


@pytest.mark.parametrize("cut", ["while it scores", "after it has scored", "by a signal, before it scores"])
def test_what_is_due_after_a_checkpoint_is_done_once_wherever_the_run_is_cut(tmp_path, cut):
    class Killed(RuntimeError):
        pass

    cuts = [6]

    def scored():
        return [r["step"] for r in read_metrics(tmp_path) if "score" in r]

    def at(place, step):
        if cut == place and step in cuts:
            raise Killed

    def score(step, state):
        at("while it scores", step)
        return {"score": slopes(state)["leader"]}

    def look(step, state):
        at("after it has scored", step)
        return {}

    hooks = (Hook(3, score, "scoring", lambda step: step in scored()), Hook(1, look, "looking"))
    with suppress(Killed):
        questions = itertools.count(1)
        run(tmp_path, hooks=hooks, stop=lambda: cut.startswith("by a signal") and next(questions) == 15)
    assert latest(tmp_path) == Moment(6) and scored() == ([0, 3, 6] if cut == "after it has scored" else [0, 3])
    cuts.clear()
    run(tmp_path, hooks=hooks)
    assert scored() == [0, 3, 6, 8]
    run(tmp_path, hooks=hooks)
    assert scored() == [0, 3, 6, 8], "nothing is left to be done"


class Damaged:
    """Batches of which three records were bad."""

    bad = 3

    def __init__(self):
        self.batches = batches()

    def __next__(self):
        return next(self.batches)

    def get_state(self):
        return self.batches.get_state()

    def set_state(self, state):
        self.batches.set_state(state)


def test_what_slows_a_run_is_recorded(tmp_path):
    run(tmp_path, given=Damaged(), checkpoint_every=100)
    records = read_metrics(tmp_path)
    assert len(records) == 8 and {record["bad_records"] for record in records} == {3}
    assert all(0 <= record["data_wait"] <= 1 for record in records)


@dataclasses.dataclass
class Value:
    """What a device computes: there, or not yet."""

    ready: bool

    def is_ready(self):
        return self.ready


def test_waits_are_counted_while_the_devices_are_idle():
    """A clock that is wound by hand: 3 s for idle devices count, 5 s beside their work do not."""
    now = [100.0]
    clock = Clock(lambda: now[0])
    assert clock.read(0) == {"seconds_per_step": 0.0, "data_wait": 0.0}
    with clock.waiting({"loss": Value(True), "norm": Value(True)}):
        now[0] += 3.0
    with clock.waiting({"loss": Value(True), "norm": Value(False)}):
        now[0] += 5.0
    now[0] += 2.0
    assert clock.read(4) == {"seconds_per_step": 2.5, "data_wait": pytest.approx(0.3)}
    now[0] += 1.0
    assert clock.read(5) == {"seconds_per_step": 1.0, "data_wait": 0.0}


def test_a_finished_run_does_nothing_more(tmp_path):
    first, again = run(tmp_path), run(tmp_path)
    assert slopes(first) == slopes(again)
    state = read_state(tmp_path)
    assert int(state["step"]) == 8 and float(state["params"]["leader"]["slope"]) == slopes(first)["leader"]


def test_frozen_weights_are_in_no_checkpoint(tmp_path):
    run(tmp_path)
    state = read_state(tmp_path, items=("params", "opt", "averages"))
    assert set(state["params"]) == set(state["opt"]) == {"leader", "follower"}
    assert set(state["averages"]) == {"leader_ema", "leader_late"}


def test_a_run_whose_newest_checkpoint_is_damaged_ends_with_the_same_bits(tmp_path, capsys):
    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", steps=7)
    (tmp_path / "cut" / FOLDER / "7" / "data" / "metadata").write_bytes(b"")
    last = run(tmp_path / "cut")
    assert slopes(whole) == slopes(last)
    out = capsys.readouterr().out
    assert "7 is damaged (data/metadata has 0 bytes" in out and "resuming from step 6 of" in out
    for name in ("whole", "cut"):
        records = read_metrics(tmp_path / name)
        assert [record["step"] for record in records] == [*range(1, 9)]
    seen = [[record["follower/seen"] for record in read_metrics(tmp_path / name)] for name in ("whole", "cut")]
    assert seen[0] == seen[1], "the same batches"


def test_a_checkpoint_that_cannot_be_written_ends_the_run_before_the_next_one(tmp_path, monkeypatch):
    write = checksums.write

    def refused(folder, told):
        if folder.name != "3":
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        write(folder, told)

    monkeypatch.setattr(checksums, "write", refused)
    wait = Hook(1, lambda step, state: time.sleep(0.2 if step > 6 else 0) or {}, "waiting")
    with pytest.raises(UserError, match=r"checkpoints: cannot be written: No space left on device"):
        run(tmp_path, steps=100, hooks=(wait,), checkpoint_every=3)
    # As soon as it is known, and at step 9 at the latest, which waits for the one before it.
    assert 6 <= read_metrics(tmp_path)[-1]["step"] <= 9 and latest(tmp_path) == Moment(3)
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["3"]


def test_not_finite_stops_with_the_culprit_and_keeps_the_last_checkpoint(tmp_path):
    run(tmp_path, steps=3)
    with pytest.raises(UserError, match=r"is not finite; the checkpoint of step 3 is kept; lower that role's"):
        run(tmp_path, steps=6, scale=1e30)
    assert latest(tmp_path) == Moment(3)


def test_every_step_is_checked_not_only_the_logged_ones(tmp_path):
    with pytest.raises(UserError, match=r"^step [12]: .* is not finite; there is no checkpoint yet; lower"):
        run(tmp_path, steps=6, scale=1e30, log_every=100)


def test_a_run_shorter_than_the_interval_of_its_log_leaves_its_last_step(tmp_path):
    run(tmp_path, steps=3, log_every=100)
    (record,) = read_metrics(tmp_path)
    assert record["step"] == 3 and any(name.endswith("/loss") for name in record)


def test_what_is_compiled_is_said_once_and_how_long_it_took(tmp_path, capsys):
    run(tmp_path, steps=4, hooks=(Hook(1, lambda step, state: {"score": 1.0}, "scoring"),))
    lines = capsys.readouterr().out.splitlines()
    for what in ("compiling the update of leader", "compiling the update of follower", "scoring"):
        begun, ended = (line for line in lines if line.startswith(what))
        assert begun == f"{what} ..." and re.fullmatch(rf"{what}: [\d.]+ s", ended)
    logged = [line for line in lines if line.startswith("step ")]
    assert len(logged) == 4 and not any("0 s/step" in line for line in logged)


def test_missing_checkpoint_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint in"):
        read_state(tmp_path / "nothing")


def test_merged_trees_do_not_overlap():
    assert merge_trees({"a": {"x": 1}}, {"a": {"y": 2}}) == {"a": {"x": 1, "y": 2}}
    with pytest.raises(ValueError, match="both trees contain 'x'"):
        merge_trees({"a": {"x": 1}}, {"a": {"x": 2}})
