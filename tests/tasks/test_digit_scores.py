"""The digit evaluation: real clips score at the ceiling, each fault lowers the number that names it."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from vpae_jax.config import DataConfig
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.tasks.base import Feed, Measures, TooFew, joined, rows_of
from vpae_jax.tasks.digits import measures, scores
from vpae_jax.tasks.digits import task as digit_task
from vpae_jax.tasks.digits.clips import MovingDigits
from vpae_jax.tasks.digits.scores import DigitClassifier
from vpae_jax.tasks.digits.task import AGAIN, Digits
from vpae_jax.types import PixelBatch, UserError

COUNT = 160


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("tiny", with_transformer=False)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return Digits(DataConfig(), tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def held_out(task, pipeline):
    return task.with_real(task.held_out(pipeline, "evaluation", COUNT), pipeline)


@pytest.fixture(scope="module")
def clips(held_out):
    """The real clips of one mode."""
    return held_out.real["clips"][held_out.parts[0].rows]


@pytest.fixture(scope="module")
def real(task, held_out):
    return task.real(held_out)


@pytest.fixture(scope="module")
def score(task, held_out):
    """Scores of the same clips for each row of a mode; those that are asked for again are the first ones once more."""
    known = {}

    def call(made, half="t2v", again=None):
        again = (made if again is None else again)[: AGAIN["evaluation"]]
        if (key := made.tobytes() + again.tobytes()) not in known:
            known[key] = task.scores(held_out, joined([scores.measure(np.concatenate([made, again]))] * 2))
        return {name.split("/")[1]: value for name, value in known[key].items() if name.startswith(half)}

    return call


def test_classifier_on_held_out_digits():
    classifier = scores.classifier()
    source = MovingDigits("eval", 400, seed=9)
    items = [source[i] for i in range(400)]
    labels = np.array([item["digit"] for item in items])
    for frame, least in ((0, 0.96), (-1, 0.95)):
        accuracy = (classifier(np.stack([item["video"][frame] for item in items])) == labels).mean()
        assert accuracy >= least


def test_classifier_is_deterministic(clips):
    small = [DigitClassifier(clips=150)(clips[:, 0]) for _ in range(2)]
    assert np.array_equal(*small)


def test_real_clips_score_at_the_ceiling(real):
    for half in ("t2v", "i2v"):
        assert real[f"{half}/digit_first"] > 0.93
        assert real[f"{half}/digit_last"] > 0.93
        assert real[f"{half}/direction"] > 0.99
        assert real[f"{half}/sharpness"] == real[f"{half}/motion"] == real[f"{half}/motion_spread"] == 1
        assert abs(real[f"{half}/kvd"]) < 15
        assert real[f"{half}/color_drift"] < 0.02
    assert real["i2v/psnr_first"] == 60
    assert "t2v/psnr_first" not in real
    assert 0.3 < real["t2v/diversity"] < 1


def test_blur(score, clips):
    soft = gaussian_filter(clips.astype(np.float32), (0, 0, 1, 1, 0)).astype(np.uint8)
    found = score(soft, "i2v")
    assert found["sharpness"] < 0.7
    assert found["kvd"] > 100
    assert found["psnr_first"] < 30
    assert found["direction"] > 0.98, "blur does not change the direction"


def test_frozen(score, clips):
    found = score(np.repeat(clips[:, :1], 9, 1))
    assert found["motion"] == found["motion_spread"] == found["direction"] == 0
    assert found["digit_last"] == found["digit_first"]
    assert found["kvd"] > 300


def test_wrong_digits_and_directions(score, clips):
    found = score(np.roll(clips, 1, 0))
    assert found["digit_first"] < 0.3
    assert found["direction"] < 0.3
    assert abs(found["kvd"]) < 15, "as a set they are as real as before"


def test_mirrored_motion(score, clips):
    found = score(clips[:, ::-1, :, ::-1])
    assert found["direction"] < 0.5


def test_one_speed_for_all(score, clips):
    # The fast half of the clips at half speed.
    moved = measures.displacement(clips)
    clips = clips.copy()
    for i in np.flatnonzero(moved > np.median(moved)):
        clips[i] = clips[i][[0, 0, 1, 1, 2, 2, 3, 3, 4]]
    found = score(clips)
    assert found["motion"] < 0.8
    assert found["motion_spread"] < 0.8


def test_fading(score, clips):
    fade = np.linspace(1, 0.3, 9).reshape(1, 9, 1, 1, 1)
    assert score((clips * fade).astype(np.uint8))["color_drift"] > 0.5


def test_missing_variety(task, score, clips, real):
    assert score(clips)["diversity"] == score(clips, "i2v")["diversity"] == 0
    other = MovingDigits("eval", COUNT, seed=77)
    drawn = np.stack([other[i]["video"] for i in range(COUNT)])
    assert score(clips, again=drawn)["diversity"] > 0.3
    assert {metric.name for metric in task.metrics} == set(score(clips, "i2v"))
    assert set(score(clips)) == {name.split("/")[1] for name in real if name.startswith("t2v")}


def test_both_modes_ask_for_the_same_clips_from_the_same_noise(held_out):
    first, second = held_out.parts
    assert (first.name, second.name) == ("t2v", "i2v") and len(held_out) == 2 * (COUNT + AGAIN["evaluation"])
    assert held_out.captions[first.rows] == held_out.captions[second.rows]
    assert held_out.seeds[first.rows] == held_out.seeds[second.rows]
    assert held_out.captions[first.again] == held_out.captions[: AGAIN["evaluation"]]
    assert not set(held_out.seeds[first.again]) & set(held_out.seeds[first.rows])
    given = held_out.condition
    assert not given.image[first.rows].any() and not given.frames[first.again].any()
    assert given.image[second.rows].any((1, 2)).all() and given.frames[second.again].any((1, 2, 3, 4)).all()


def test_guard_previews_and_evaluation_have_clips_of_their_own(task, pipeline, held_out):
    guard, preview, again = (
        task.with_real(task.held_out(pipeline, *asked), pipeline)
        for asked in (("guard", 8), ("preview", 4), ("guard", 8))
    )
    assert guard.captions == again.captions and np.array_equal(guard.real["clips"], again.real["clips"])
    assert guard.parts[1].rows == slice(16, 24) and preview.parts[1].rows == slice(4, 8)
    assert not preview.real and preview.clips["i2v"].shape == (4, 9, 48, 48, 3)
    found = task.scores(guard, rows_of(guard.real, slice(None)))
    assert not {name for name in found if "digit" in name}, "the classifier knows the guard's digits"

    def first(one: Measures):
        return {clip[0].tobytes() for clip in one["clips"]}

    assert not first(guard.real) & first(held_out.real)
    assert not first(guard.real) & first(guard.others) and not first(held_out.real) & first(held_out.others)


def test_no_purpose_draws_from_the_digits_that_are_trained_on(task, pipeline, monkeypatch):
    """Nor the evaluation from those that the guard has judged by, or that the classifier knows."""
    drawn, feed = {}, Feed(batch_size=4, seed=0, workers=0, rows=None, max_bad=0.0)

    def noted(purpose):
        def make(split, *args, **kwargs):
            drawn.setdefault(purpose, set()).add(split)
            return MovingDigits(split, *args, **kwargs)

        return make

    for purpose in ("preview", "guard", "evaluation"):
        monkeypatch.setitem(digit_task.OTHERS, purpose, (16, digit_task.OTHERS[purpose][1]))
        monkeypatch.setattr(digit_task, "MovingDigits", noted(purpose))
        task.with_real(task.held_out(pipeline, purpose, 16), pipeline)
    monkeypatch.setattr(digit_task, "MovingDigits", noted("training"))
    task.batches(PixelBatch, None, feed).close()
    monkeypatch.setattr(scores, "MovingDigits", noted("classifier"))
    DigitClassifier(clips=100)
    assert all(len(splits) == 1 for splits in drawn.values())
    assert not drawn["training"] & (drawn["preview"] | drawn["guard"] | drawn["evaluation"] | drawn["classifier"])
    assert not drawn["evaluation"] & (drawn["guard"] | drawn["classifier"])


def test_bad_input(task, pipeline, held_out):
    with pytest.raises(TooFew, match="count is 8"):
        task.held_out(pipeline, "evaluation", 8)
    with pytest.raises(UserError, match="this model makes other videos"):
        task.scores(held_out, {**held_out.real, "clips": held_out.real["clips"][:, :5]})
