"""Each fault of a clip moves the numbers that name it, by how much, and leaves those that do not."""

import functools

import numpy as np
import pytest
from moving_patterns import blurred, fading, frozen, patterns

from vpae_jax.metrics import judge
from vpae_jax.metrics.judge import METRICS, Comparison
from vpae_jax.types import UserError

COUNT, FRAMES, FPS = 24, 9, 8.0


def shuffled(clips):
    rng = np.random.default_rng(5)
    return np.stack([clip[rng.permutation(len(clip))] for clip in clips])


def flickering(clips):
    """Every second frame is a fifth brighter."""
    gain = 1 + 0.2 * (np.arange(clips.shape[1]) % 2)
    return np.clip(np.rint(clips * gain[:, None, None, None]), 0, 255).astype(np.uint8)


def collapsing(clips):
    """The first frame is as given; what follows is soft."""
    return np.concatenate([clips[:, :1], blurred(clips[:, 1:], 2.5)], 1)


@pytest.fixture(scope="module")
def clips():
    return patterns(COUNT, seed=1, frames=FRAMES, height=64, width=64)


@pytest.fixture(scope="module")
def measures(clips):
    found = {"real": judge.measure(clips, False)}
    found["others"] = judge.measure(patterns(COUNT, seed=2, frames=FRAMES, height=64, width=64), False)
    return found


@pytest.fixture(scope="module")
def compare(clips, measures):
    @functools.cache
    def call(spoil=None):
        """Clips that are spoilt, or as they are."""
        made = measures["real"] if spoil is None else judge.measure(spoil(clips), False)
        return Comparison(made, measures["real"], measures["others"], FPS, {}, {})

    return call


@pytest.fixture(scope="module")
def real(compare):
    return compare().scores()


@pytest.fixture(scope="module")
def seen():
    """Of numbers that need OpenCV."""
    return pytest.importorskip("cv2", reason="pip install opencv-python-headless")


def test_frozen(compare, real, seen):
    found = compare(frozen).scores()
    assert found["flow"] == found["dynamic_degree"] == found["motion"] == 0 and real["flow"] > 4
    assert found["still"] == found["still_flow"] == 1 and real["still"] == real["still_flow"] == 0
    assert found["temporal_flickering"] == 1 and found["sharpness_kept"] == pytest.approx(1)
    assert found["kvd"] > 3 * max(real["kvd"], 20)


def test_shuffled(compare, real, seen):
    found = compare(shuffled).scores()
    assert found["interpolation_error"] > 8 * real["interpolation_error"]
    assert found["flow"] > 1.5 * real["flow"]
    assert found["flicker"] < 2 * real["flicker"], "the flow explains the jumps"
    assert found["sharpness"] == pytest.approx(1) and found["color_distance"] < 3 * real["color_distance"]


def test_blurred(compare, real, seen):
    found = compare(blurred).scores()
    assert found["sharpness"] < 0.7 and found["kvd"] > 3 * max(real["kvd"], 20)
    assert found["flow"] == pytest.approx(real["flow"], rel=0.1) and found["still_flow"] == 0
    assert found["sharpness_kept"] == pytest.approx(1, abs=0.15), "the first frame is as soft as the others"


def test_drifting_colour(compare, real, seen):
    found = compare(fading).scores()
    assert found["color_distance"] > 8 * real["color_distance"] and found["color_drift"] > 5 * real["color_drift"]
    assert found["flow"] == pytest.approx(real["flow"], rel=0.1)
    assert found["interpolation_error"] < 1.5 * real["interpolation_error"]


def test_flickering(compare, real, seen):
    found = compare(flickering).scores()
    assert found["flicker"] > 8 * real["flicker"] and found["interpolation_error"] > 8 * real["interpolation_error"]
    assert 1 - found["temporal_flickering"] > 1.4 * (1 - real["temporal_flickering"])
    assert found["flow"] == pytest.approx(real["flow"], rel=0.15), "brightness is no motion"
    assert found["motion"] > 1.3, "which the speed of edges cannot tell from motion"


def test_a_collapse_after_the_first_frame_shows_in_the_curves(compare):
    whole, broken = compare().curves(), compare(collapsing).curves()
    assert len(broken["sharpness_kept"]) == len(broken["color_distance"]) == FRAMES
    assert len(broken["temporal_flickering"]) == FRAMES - 1
    assert broken["sharpness_kept"][0] == whole["sharpness_kept"][0] == 1
    assert max(broken["sharpness_kept"][1:]) < 0.2 < 0.6 < min(whole["sharpness_kept"])
    assert broken["color_distance"][1] > 3 * whole["color_distance"][1], "its spread falls with the texture"
    assert compare(collapsing).scores()["sharpness_kept"] < 0.2


def test_a_halt_shows_in_the_curves(compare, seen):
    def halting(clips):
        return np.concatenate([clips[:, :5], np.repeat(clips[:, 4:5], 4, 1)], 1)

    found = compare(halting).curves()
    assert len(found["flow"]) == len(found["flicker"]) == FRAMES - 1
    assert len(found["interpolation_error"]) == FRAMES - 2
    assert min(found["flow"][:4]) > 4 and max(found["flow"][4:]) == 0


def test_speed_is_in_parts_of_the_width_a_second(clips, measures, seen):
    slow = Comparison(measures["real"], measures["real"], measures["others"], FPS, {}, {}).scores()
    fast = Comparison(measures["real"], measures["real"], measures["others"], 2 * FPS, {}, {}).scores()
    assert fast["flow"] == pytest.approx(2 * slow["flow"])
    assert fast["dynamic_degree"] >= slow["dynamic_degree"]
    wave = 128 + 90 * np.sin(2 * np.pi * (np.arange(64)[None] - 1.5 * np.arange(FRAMES)[:, None]) / 24)
    rows = 30 * np.sin(2 * np.pi * np.arange(64) / 20)[:, None]
    clip = np.rint(np.broadcast_to((wave[:, None] + rows)[..., None], (FRAMES, 64, 64, 3))).clip(0, 255)
    found = judge.measure(clip[None].astype(np.uint8), False)["magnitude"]
    assert found.mean() == pytest.approx(1.5 / 64, rel=0.15)


def test_clips_of_few_pixels_are_enlarged_and_as_fast(clips, seen):
    from vpae_jax.metrics import flow

    small = clips[:2, :, :12, :14]
    one, other = flow.measure(small), flow.measure(small.repeat(2, 2).repeat(2, 3))
    assert one["magnitude"].min() > 0
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name])


def test_vbench_calls_dynamic_what_moves_fast_enough(seen):
    from vpae_jax.metrics import flow

    limit = 6 / 256
    fastest = np.array([[limit * 1.1] * 8, [limit * 0.9] * 8, [limit * 1.1] * 2 + [0.0] * 6, [limit * 1.1] + [0.0] * 7])
    assert flow.dynamic(fastest, 8.0).tolist() == [1, 0, 1, 0]
    assert flow.dynamic(fastest, 16.0).tolist() == [1, 1, 1, 0], "the same flow in half the time is twice the speed"


def test_every_number_has_its_meaning_and_its_interval(compare, real):
    found = compare().intervals()
    assert set(found) == set(real) <= {metric.name for metric in METRICS}
    assert len(METRICS) == len({metric.name for metric in METRICS})
    for name, (low, high) in found.items():
        assert low <= real[name] <= high, name
    low, high = compare(fading).intervals()["color_distance"]
    assert low > 5 * found["color_distance"][1] and high > low, "the fault is far outside the interval of real clips"


def test_single_clips_are_scored_alone(clips, measures):
    """Each fault is that of one clip, whose number names it; the mean over clips is the score."""
    spoilt = clips.copy()
    for row, spoil in enumerate((blurred, frozen, fading, flickering, shuffled, collapsing)):
        spoilt[row] = spoil(clips[row : row + 1])[0]
    more = {"psnr_first": np.linspace(20, 60, COUNT)}
    comparison = Comparison(judge.measure(spoilt, False), measures["real"], measures["others"], FPS, more, {})
    each, scores = comparison.each(), comparison.scores()
    assert all(values.shape == (COUNT,) and values.dtype == np.float64 for values in each.values())
    assert {*scores} - {*each} == {"kvd"}, "which is of sets alone"
    for name in {*each} - {"sharpness_kept"}:
        assert each[name].mean() == pytest.approx(scores[name], rel=1e-12), name
    assert {*each["sharpness"].argsort()[:2]} == {0, 5}, "the blurred one and the one that collapses"
    assert each["motion"].argmin() == 1 and each["still"].sum() == each["still"][1] == 1
    assert each["color_distance"].argmax() in (2, 5) and each["color_drift"].argmax() == 2
    assert each["sharpness_kept"].argmin() == 5 and each["sharpness_kept"][5] < 0.2
    assert each["sharpness_kept"][1] == 1
    if "flow" in each:
        assert each["flow"].argmin() == 1 and each["still_flow"].sum() == each["still_flow"][1] == 1
        assert each["interpolation_error"].argmax() in (3, 4) and each["flicker"].argmax() == 3


def test_a_clip_that_begins_black_has_no_sharpness_to_keep(clips, measures):
    black = clips[:2].copy()
    black[0] = 0
    black[1, 0] = 0
    found = Comparison(judge.measure(black, False), measures["real"], measures["others"], FPS, {}, {}).each()
    assert found["sharpness_kept"][0] == 1 and 1 < found["sharpness_kept"][1] < 1000


def test_clips_without_motion_to_judge_are_refused(clips):
    with pytest.raises(UserError, match="clips of 2 frames cannot be scored: motion needs 3 or more"):
        judge.measure(clips[:1, :2], False)
