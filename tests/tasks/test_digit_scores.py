"""The digit evaluation: real clips score at the ceiling, each fault lowers the number that names it."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from vpae_jax.tasks.digits import measures
from vpae_jax.tasks.digits.clips import MovingDigits
from vpae_jax.tasks.digits.scores import DIVERSITY_CLIPS, DigitClassifier, DigitEvaluation
from vpae_jax.types import UserError

COUNT = 160


@pytest.fixture(scope="module")
def classifier():
    return DigitClassifier()


@pytest.fixture(scope="module")
def evaluation(classifier):
    return DigitEvaluation(COUNT, classifier=classifier)


@pytest.fixture(scope="module")
def real(evaluation):
    return dict(evaluation.real())


def score(evaluation, clips, half="t2v"):
    return {name.split("/")[1]: value for name, value in evaluation.scores(half, clips)}


def test_classifier_on_held_out_digits(classifier):
    source = MovingDigits("eval", 400, seed=9)
    items = [source[i] for i in range(400)]
    labels = np.array([item["digit"] for item in items])
    for frame, least in ((0, 0.96), (-1, 0.95)):
        accuracy = (classifier(np.stack([item["video"][frame] for item in items])) == labels).mean()
        assert accuracy >= least


def test_classifier_is_deterministic(evaluation):
    small = [DigitClassifier(clips=150)(evaluation.clips[:, 0]) for _ in range(2)]
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


def test_blur(evaluation, real):
    soft = gaussian_filter(evaluation.clips.astype(np.float32), (0, 0, 1, 1, 0)).astype(np.uint8)
    found = score(evaluation, soft, "i2v")
    assert found["sharpness"] < 0.7
    assert found["kvd"] > 100
    assert found["psnr_first"] < 30
    assert found["direction"] > 0.98, "blur does not change the direction"


def test_frozen(evaluation):
    found = score(evaluation, np.repeat(evaluation.clips[:, :1], 9, 1))
    assert found["motion"] == found["motion_spread"] == found["direction"] == 0
    assert found["digit_last"] == found["digit_first"]
    assert found["kvd"] > 300


def test_wrong_digits_and_directions(evaluation):
    found = score(evaluation, np.roll(evaluation.clips, 1, 0))
    assert found["digit_first"] < 0.3
    assert found["direction"] < 0.3
    assert abs(found["kvd"]) < 15, "as a set they are as real as before"


def test_mirrored_motion(evaluation):
    found = score(evaluation, evaluation.clips[:, ::-1, :, ::-1])
    assert found["direction"] < 0.5


def test_one_speed_for_all(evaluation):
    # The fast half of the clips at half speed.
    moved = measures.displacement(evaluation.clips)
    clips = evaluation.clips.copy()
    for i in np.flatnonzero(moved > np.median(moved)):
        clips[i] = evaluation.clips[i][[0, 0, 1, 1, 2, 2, 3, 3, 4]]
    found = score(evaluation, clips)
    assert found["motion"] < 0.8
    assert found["motion_spread"] < 0.8


def test_fading(evaluation):
    fade = np.linspace(1, 0.3, 9).reshape(1, 9, 1, 1, 1)
    assert score(evaluation, (evaluation.clips * fade).astype(np.uint8))["color_drift"] > 0.5


def test_run_asks_for_both_halves_and_sees_missing_variety(evaluation, real):
    requests = []

    def same(request):
        requests.append(request)
        return evaluation.clips[: len(request.captions)]

    found = dict(evaluation.run(same))
    assert found["t2v/diversity"] == found["i2v/diversity"] == 0
    assert {name for name in found if name != "i2v/diversity"} == set(real)
    assert [r.pictures is None for r in requests] == [True, True, False, False]
    assert [len(r.captions) for r in requests] == [COUNT, DIVERSITY_CLIPS] * 2
    assert requests[0].seed != requests[1].seed
    assert np.array_equal(requests[2].pictures, evaluation.clips[:, 0])
    assert found["t2v/kvd"] == real["t2v/kvd"]

    other = MovingDigits("eval", COUNT, seed=77)
    drawn = np.stack([other[i]["video"] for i in range(COUNT)])
    varied = dict(evaluation.run(lambda r: (evaluation.clips if r.seed == 0 else drawn)[: len(r.captions)]))
    assert varied["t2v/diversity"] > 0.3


def test_the_same_conditions_every_time(evaluation, classifier):
    again = DigitEvaluation(COUNT, ("i2v",), classifier)
    assert np.array_equal(again.clips, evaluation.clips)
    assert again.request("i2v").captions == evaluation.request("i2v").captions
    assert {name.split("/")[0] for name, _ in again.real()} == {"i2v"}


def test_bad_input(evaluation, classifier):
    with pytest.raises(UserError, match="count is 8"):
        DigitEvaluation(8, classifier=classifier)
    with pytest.raises(UserError, match="this model makes other videos"):
        list(evaluation.scores("t2v", evaluation.clips[:, :5]))
