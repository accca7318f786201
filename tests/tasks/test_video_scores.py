"""Scores of clips of any content: real clips against real ones are the floor, and each fault moves what names it."""

from dataclasses import replace

import numpy as np
import pytest
from moving_patterns import blurred, fading, frozen, noisy, patterns

from vpae_jax.metrics.extras import opencv
from vpae_jax.tasks.base import HeldOut, joined, mode_parts, rows_of
from vpae_jax.tasks.video import scores
from vpae_jax.types import Condition

COUNT = 48


def latents_of(clips):
    """What stands for a VAE: 8 x 8 block means as latents of three channels."""
    b, t, height, width, _ = clips.shape
    return np.float32(clips).reshape(b, t, height // 8, 8, width // 8, 8, 3).mean((3, 5)) / 40 - 3


def measured(clips):
    return scores.measure(clips, latents_of(clips), "guard")


def judged(real, others, made, again=0):
    """All numbers of image-to-video clips, the first of which may be made a second time."""
    (part,) = mode_parts(("i2v",), COUNT, again)
    rows = COUNT + again
    condition = Condition(np.zeros((rows, 3, 2), np.float32), np.ones((rows, 3), bool))
    null, seeds = (np.zeros((1, 3, 2), np.float32), np.ones((1, 3), bool)), tuple(range(rows))
    held_out = HeldOut("guard", (part,), ("",) * rows, condition, *null, (1, 1, 1, 1), seeds, ("",) * rows, 8.0)
    held_out = replace(held_out, real=real, others=others)
    return scores.compared(held_out, part, made).scores()


@pytest.fixture(scope="module")
def real():
    return measured(patterns(COUNT, seed=1))


@pytest.fixture(scope="module")
def others():
    return measured(patterns(2 * COUNT, seed=2))


@pytest.fixture(scope="module")
def floor(real, others):
    return judged(real, others, None)


@pytest.fixture(scope="module")
def score(real, others):
    """Scores of the real clips of the same conditions, spoilt."""
    clips = patterns(COUNT, seed=1)
    return lambda spoil: judged(real, others, measured(spoil(clips)))


def test_the_floor(floor):
    assert abs(floor["kvd"]) < 20
    assert floor["sharpness"] == pytest.approx(1, abs=0.1)
    assert floor["motion"] == pytest.approx(1, abs=0.15)
    assert floor["still"] == 0 and floor["color_drift"] < 0.05
    assert floor["latent_mean"] < 0.2 and floor["latent_std"] == pytest.approx(1, abs=0.1)


def test_blur(score, floor):
    found = score(blurred)
    assert found["sharpness"] < 0.7 and found["kvd"] > 5 * max(floor["kvd"], 10)
    assert found["latent_std"] < 0.98 * floor["latent_std"]


def test_frozen(score, floor):
    found = score(frozen)
    assert found["motion"] == 0 and found["still"] == 1
    assert found["kvd"] > 5 * max(floor["kvd"], 10)


def test_fading(score, floor):
    found = score(fading)
    assert found["color_drift"] > 5 * floor["color_drift"]
    assert found["latent_mean"] > 2 * floor["latent_mean"]


def test_noise(score, floor):
    found = score(noisy)
    assert found["sharpness"] > 1.5 and found["kvd"] > 5 * max(floor["kvd"], 10)


def test_repeated(score, floor):
    found = score(lambda clips: np.tile(clips[:4], (COUNT // 4, 1, 1, 1, 1)))
    assert found["kvd"] > 3 * max(floor["kvd"], 10)


def test_diversity_is_that_of_the_noise(real, others):
    clips = patterns(COUNT, seed=1)

    def diversity(again):
        return judged(real, others, joined([measured(clips), measured(again)]), len(again))["diversity"]

    assert diversity(clips[:8]) == 0
    assert diversity(patterns(8, seed=5)) == pytest.approx(1, abs=0.3)
    assert diversity(blurred(clips[:8], 0.8)) < 0.3


def test_first_frames_agree_with_the_given_ones(real, others, score):
    assert judged(real, others, real)["psnr_first"] == 60
    clips = patterns(COUNT, seed=1)
    kept = clips.copy()
    kept[:, 1:] = 0
    assert judged(real, others, measured(kept))["psnr_first"] == 60, "later frames do not count"
    assert score(blurred)["psnr_first"] < 35
    assert judged(real, others, rows_of(real, np.arange(COUNT)[::-1]))["psnr_first"] < 20


def test_large_clips_are_scored_at_a_bounded_size():
    large = patterns(2, frames=21, height=192, width=240)
    found = measured(large)
    assert found["clip"].shape == (2, 11, 48, 60, 3)
    assert found["features"].shape[0] == 2 and np.isfinite(found["features"]).all()
    assert sum(value.nbytes for value in found.values()) < large.nbytes / 10


def test_every_metric_has_its_direction_and_its_floor(floor, score):
    """Those of the feature networks have theirs in an evaluation alone; those of the flow need OpenCV."""
    networks = {"fvd", "kvd_i3d", "persistence_first", "persistence_previous", "diversity_content", "lpips_first"}
    flow = {"flow", "dynamic_degree", "still_flow", "interpolation_error", "flicker"}
    names = {metric.name for metric in scores.METRICS}
    absent = networks | (flow if opencv() is None else set())
    assert names - absent == {*floor, "diversity"} == {*score(lambda clips: clips), "diversity"}
    assert {*scores.LEAST} <= names
