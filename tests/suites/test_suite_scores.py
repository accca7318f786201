"""What results add up to, held to the suites' own sums and to numbers worked out by hand."""

import json
import math

import pytest

from vpae_jax.suites.scores import FORMULAS, add_up, read_results, table
from vpae_jax.types import UserError

I2V = {
    "camera_motion": 0.5,
    "i2v_subject": 0.97,
    "i2v_background": 0.97,
    "subject_consistency": 0.95,
    "background_consistency": 0.96,
    "motion_smoothness": 0.98,
    "dynamic_degree": 0.5,
    "aesthetic_quality": 0.62,
    "imaging_quality": 0.7,
}


def test_vbench_i2v():
    scores = add_up(I2V, FORMULAS["vbench_i2v"])
    assert scores.parts["quality"] == pytest.approx(0.7994982045, abs=1e-10)
    assert scores.parts["i2v"] == pytest.approx(0.9401143244, abs=1e-10)
    assert scores.total == pytest.approx(0.8698062645, abs=1e-10)
    assert scores.plain == pytest.approx((0.9401143244 + 0.95 + 0.96 + 0.98 + 0.5 + 0.62 + 0.7) / 7, abs=1e-10)
    assert scores.missing == ()


def test_vbench():
    """Scores that lie at simple fractions between their bounds."""
    measured = {
        "subject_consistency": 0.5731,  # a half of .1462 to 1
        "background_consistency": 0.815375,  # three quarters of .2615 to 1
        "temporal_flickering": 0.92586,  # four fifths of .6293 to 1
        "motion_smoothness": 0.9975,  # all of .706 to .9975
        "dynamic_degree": 0.6,
        "aesthetic_quality": 0.65,
        "imaging_quality": 0.7,
        "object_class": 0.9,
        "multiple_objects": 0.7,
        "human_action": 1.0,
        "color": 0.8,
        "spatial_relationship": 0.75,
        "scene": 0.4111,  # a half of .8222
        "appearance_style": 0.2144,  # about three quarters of .0009 to .2855
        "temporal_style": 0.273,  # three quarters of .364
        "overall_consistency": 0.182,  # a half of .364
    }
    style = (0.2144 - 0.0009) / 0.2846
    quality = (0.5 + 0.75 + 0.8 + 1.0 + 0.5 * 0.6 + 0.65 + 0.7) / 6.5
    semantic = (0.9 + 0.7 + 1.0 + 0.8 + 0.75 + 0.5 + style + 0.75 + 0.5) / 9
    assert quality == pytest.approx(4.7 / 6.5) and semantic == pytest.approx(6.650175685 / 9)
    scores = add_up(measured, FORMULAS["vbench"])
    assert scores.parts == pytest.approx({"quality": 0.7230769230769, "semantic": 0.7389084094588}, abs=1e-10)
    assert scores.total == pytest.approx((4 * 4.7 / 6.5 + 6.650175685 / 9) / 5, abs=1e-9)
    assert scores.total == pytest.approx(0.7262432203533, abs=1e-10)
    assert scores.plain is None


def test_vbench2_is_the_mean_of_five_means():
    formula = FORMULAS["vbench2"]
    assert [len(part) for part in formula.parts.values()] == [2, 2, 7, 3, 4]
    measured = {name: 0.1 * i for i, part in enumerate(formula.parts.values()) for name in part}
    measured["Diversity"] = 1.0
    scores = add_up(measured, formula)
    assert list(scores.parts.values()) == pytest.approx([0.5, 0.1, 0.2, 0.3, 0.4])
    assert scores.total == pytest.approx(0.3)


def test_a_missing_dimension_is_a_score_of_0_before_it_is_normalised():
    measured = {name: score for name, score in I2V.items() if name != "motion_smoothness"}
    scores = add_up(measured, FORMULAS["vbench_i2v"])
    whole = add_up(I2V, FORMULAS["vbench_i2v"])
    lost = (0.98 - 0) / (0.9975 - 0.706) / 5.5
    assert scores.missing == ("motion_smoothness",)
    assert scores.parts["quality"] == pytest.approx(whole.parts["quality"] - lost)
    assert scores.parts["i2v"] == whole.parts["i2v"] and scores.plain is None


def results(folder, name, found):
    folder.mkdir(parents=True, exist_ok=True)
    (path := folder / f"{name}_eval_results.json").write_text(json.dumps(found))
    return path


def test_results_of_a_folder_and_of_folders_in_it(tmp_path):
    """VBench writes a score, what it is the mean of, and of camera motion the seven kinds between them."""
    results(tmp_path, "a", {"camera_motion": [0.5, {"static": 1.0}, [{"video_path": "x", "video_results": 1.0}]]})
    results(tmp_path / "b" / "c", "d", {"i2v_subject": [0.97, []], "temporal_flickering": [0.99, []]})
    results(tmp_path / "again", "d", {"i2v_subject": [0.97, []]})
    (tmp_path / "a_full_info.json").write_text("[]")
    found = read_results(tmp_path, FORMULAS["vbench_i2v"])
    assert found == {"camera_motion": 0.5, "i2v_subject": 0.97, "temporal_flickering": 0.99}
    assert set(add_up(found, FORMULAS["vbench_i2v"]).dimensions) == {"camera_motion", "i2v_subject"}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"object_class": [0.5]}, "unknown dimension 'object_class'; this suite has subject_consistency, "),
        ({"camera_motion": 0.5}, "camera_motion has no score; expected a list that begins with a number"),
        ({"camera_motion": []}, "camera_motion has no score"),
        ({"camera_motion": [True]}, "camera_motion has no score"),
        ({"camera_motion": [math.nan, []]}, "the score of camera_motion is nan; the suite found no videos for it"),
        ({"camera_motion": [97.0, []]}, "the score of camera_motion is 97; expected a fraction of 1"),
        ({}, "holds no scores"),
        ([], "holds no scores"),
    ],
)
def test_what_is_no_result(tmp_path, found, message):
    with pytest.raises(UserError, match=message):
        read_results(results(tmp_path, "x", found), FORMULAS["vbench_i2v"])


def test_no_results(tmp_path):
    formula = FORMULAS["vbench_i2v"]
    with pytest.raises(UserError, match=r"holds no \*_eval_results.json"):
        read_results(tmp_path, formula)
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        read_results(tmp_path / "nowhere", formula)
    (tmp_path / "x_eval_results.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_results(tmp_path, formula)


def test_two_scores_of_one_dimension_are_refused(tmp_path):
    results(tmp_path, "a", {"camera_motion": [0.5]})
    results(tmp_path, "b", {"camera_motion": [0.6]})
    with pytest.raises(UserError, match=r"camera_motion is 0.5 in .*a_eval_results.json and 0.6 in .*b_eval_results"):
        read_results(tmp_path, FORMULAS["vbench_i2v"])


def test_the_table_has_a_column_for_each_row():
    formula = FORMULAS["vbench_i2v"]
    less = {name: score for name, score in I2V.items() if name != "dynamic_degree"}
    lines = table({"teacher": add_up(I2V, formula), "a student": add_up(less, formula)}, formula).splitlines()
    cells = {line[:22].strip(): line[22:].split() for line in lines[1:] if line}
    assert lines[0].split() == ["teacher", "a", "student"]
    assert cells["dynamic_degree"] == ["50.00", "-"]
    assert cells["quality"] == ["79.95", "75.40"] and cells["i2v"] == ["94.01", "94.01"]
    assert cells["total"] == ["86.98", "84.71"] and cells["plain mean"] == ["80.72", "-"]
    assert list(cells)[-2:] == ["total", "plain mean"]
