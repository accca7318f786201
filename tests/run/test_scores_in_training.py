"""Scores at intervals, in a run that no guard judges."""

import itertools

import jax
import numpy as np
import pytest
from short_runs import small
from tensorboard_events import scalars

from vpae_jax.config import parse
from vpae_jax.configs import phase1
from vpae_jax.run import experiment
from vpae_jax.train.metrics import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
METRICS = {"kvd", "sharpness", "motion", "diversity"}


def test_phase_one_is_scored_at_intervals_once_however_often_it_is_stopped(tmp_path):
    """Before the first step, at every second one, and after the last; a signal comes when the fourth is due."""
    config = small(phase1)
    config.steps, config.score_every, config.score_clips = 5, 2, 8
    given = parse(config)

    asked = itertools.count(1)  # after each of a step's three updates

    def run(stop=lambda: False):
        experiment.run(given, tmp_path, jax.devices()[:1], stop)
        return [record for record in read_metrics(tmp_path) if "held_out_clips" in record]

    assert [record["step"] for record in run(lambda: next(asked) == 4 * 3)] == [0, 2]
    records = run()
    assert [record["step"] for record in records] == [0, 2, 4, 5] == [record["step"] for record in run()]
    names = {f"{of}/{mode}/{name}" for of in ("held_out", "real") for mode in ("t2v", "i2v") for name in METRICS}
    # The first frame of real clips has no second clip: its diversity is not known.
    assert all(names - {"real/i2v/diversity"} <= set(record) for record in records)
    assert all(np.isfinite(list(record.values())).all() and record["held_out_clips"] == 8 for record in records)
    assert len({record["held_out/t2v/kvd"] for record in records}) == 4, "of weights that differ"
    assert len({record["real/t2v/sharpness"] for record in records}) == 1
    shown = [(step, pytest.approx(value)) for step, name, value in scalars(tmp_path) if name == "held_out/t2v/kvd"]
    assert shown == [(record["step"], record["held_out/t2v/kvd"]) for record in records]
    assert not (tmp_path / "guard.json").exists()
