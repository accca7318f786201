"""Clips of records that are held out: never trained on, the same everywhere, apart for each purpose."""

import numpy as np
import pytest
from record_files import FITTING, write_fitting

from vpae_jax.config import DataConfig
from vpae_jax.data.order import held_out
from vpae_jax.data.records import LatentRecords
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.metrics import networks
from vpae_jax.metrics.archive import Shelf
from vpae_jax.tasks.base import Feed, TooFew, rows_of
from vpae_jax.tasks.video.task import FEWEST, Video
from vpae_jax.types import Batch, UserError

FEED = Feed(batch_size=4, seed=0, workers=0, rows=None, max_bad=0.0)


@pytest.fixture(autouse=True)
def without_i3d(monkeypatch):
    """Which clips are chosen does not depend on what is measured of them, and I3D takes a second for each."""
    for network in ("_i3d", "_alexnet"):
        monkeypatch.setattr(networks, network, lambda: None)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("tiny", with_transformer=False)


@pytest.fixture(scope="module")
def folders(pipeline, tmp_path_factory):
    root = tmp_path_factory.mktemp("records")
    return (
        write_fitting(pipeline, root / "many", 120),
        write_fitting(pipeline, root / "more", 60, 200),
        write_fitting(pipeline, root / "few", 12, 400),
    )


def task(folder, modes=None, **more):
    return Video(DataConfig(records=str(folder), **more), folder, "tiny", modes)


def numbers(found):
    return {int(caption.split()[1]) for caption in found.captions}


def trained(task, pipeline, count):
    batches = task.batches(Batch, pipeline, FEED)
    found = {int(latents.flat[0]) for _ in range(count) for latents in np.float32(next(batches).latents)}
    batches.close()
    return found


def test_each_purpose_has_clips_of_its_own_that_no_batch_has(pipeline, folders, capsys):
    many = task(folders[0])
    found = {purpose: many.held_out(pipeline, purpose, 12) for purpose in ("preview", "guard", "evaluation")}
    asked = {purpose: numbers(one) for purpose, one in found.items()}
    records = LatentRecords(folders[0])
    out = {int(np.float32(records[clip]["latents"]).flat[0]) for clip in held_out(120, 256).tolist()}
    assert asked["guard"] == asked["preview"] and not asked["guard"] & asked["evaluation"]
    assert asked["guard"] | asked["evaluation"] <= out and len(out) == 24
    assert trained(many, pipeline, 150) == {*range(120)} - out
    assert capsys.readouterr().out == f"held out: 24 of 120 clips of {folders[0]}\n"
    again = task(folders[0]).held_out(pipeline, "guard", 12)
    assert again.captions == found["guard"].captions
    fewer = task(folders[0]).held_out(pipeline, "guard", 9)
    assert fewer.captions[:9] == again.captions[:9]


def test_what_is_asked_for_is_what_the_record_says(pipeline, folders):
    found = task(folders[0], ("t2v", "i2v")).held_out(pipeline, "guard", 9)
    assert found.shape == (*FITTING, 16), "the size that most clips have"
    first, second = found.parts
    assert (first.rows, first.again, second.rows, second.again) == (
        slice(0, 9),
        slice(9, 18),
        slice(18, 27),
        slice(27, 36),
    )
    records = LatentRecords(folders[0])
    by_caption = {records.about(clip)["caption"]: records[clip] for clip in held_out(120, 256).tolist()}
    for row, caption in enumerate(found.captions):
        record = by_caption[caption]
        assert np.array_equal(found.condition.text[row], record["text"])
        given = row >= second.rows.start
        assert np.array_equal(found.condition.frames[row], record["frames"] if given else 0 * record["frames"])
        assert np.array_equal(found.condition.image[row], record["image"] if given else 0 * record["image"])
    assert found.seeds[first.rows] == found.seeds[second.rows] and len({*found.seeds}) == 18
    previewed = task(folders[0], ("t2v", "i2v"))
    found = previewed.with_real(previewed.held_out(pipeline, "preview", 9), pipeline)
    assert found.clips["i2v"].shape == (8, 9, 48, 64, 3) and not found.real
    assert task(folders[0]).held_out(pipeline, "guard", 9).parts[0].name == "i2v", "as a model that takes a first frame"


def test_real_clips_are_their_own_floor(pipeline, folders):
    video = task(folders[0], ("t2v", "i2v"))
    found = video.with_real(video.held_out(pipeline, "evaluation", 50), pipeline)
    floor, own = video.real(found), video.scores(found, found.real)
    assert own["i2v/psnr_first"] == floor["i2v/psnr_first"] == 60
    assert [own["t2v/sharpness"], own["t2v/motion"]] == pytest.approx([1, 1]) and own["t2v/latent_mean"] == 0
    assert own["t2v/diversity"] == 0, "the same clips both times"
    assert own["t2v/kvd"] == pytest.approx(floor["t2v/kvd"], abs=200)
    names = {metric.name for metric in video.metrics}
    assert set(own) == set(floor) <= {f"{mode}/{name}" for mode in ("t2v", "i2v") for name in names}
    needs = {"lpips_first", "persistence_first", "persistence_previous", "diversity_content"}
    absent = (needs if "content" not in found.real else set()) | (
        {"fvd", "kvd_i3d"} if "i3d" not in found.real else set()
    )
    flow = {"flow", "dynamic_degree", "still_flow", "interpolation_error", "flicker"}
    absent |= set() if "magnitude" in found.real else flow
    assert names - absent == {name.removeprefix("i2v/") for name in own if name.startswith("i2v/")}
    intervals, curves = video.intervals(found, found.real), video.curves(found, found.real)
    low, high = intervals["i2v/color_distance"]
    assert low <= own["i2v/color_distance"] <= high and low < high
    assert set(intervals) == set(own) and set(video.intervals(found, None)) <= set(floor)
    assert len(curves["t2v/sharpness_kept"]) == 9 and len(curves["i2v/temporal_flickering"]) == 8
    assert video.curves(found, None)["i2v/color_distance"][0] == 0
    half = rows_of(found.real, slice(None))
    spoilt = {**half, "sharpness": half["sharpness"] / 2}
    assert video.scores(found, spoilt)["i2v/sharpness"] == pytest.approx(0.5)


def test_real_clips_that_are_kept_are_not_decoded_again(pipeline, folders, tmp_path, monkeypatch):
    video, shelf = task(folders[0]), Shelf(tmp_path, "this")
    asked = video.held_out(pipeline, "evaluation", 9)
    kept, plain = video.with_real(asked, pipeline, shelf), video.with_real(asked, pipeline)
    assert len(kept.files) == 9 and all(file.is_file() for file in kept.files) and not plain.files
    assert len(list(tmp_path.rglob("*.mp4"))) == 9, "the other clips are shown to nobody"
    monkeypatch.setattr(Pipeline, "decode", lambda *_: pytest.fail("decoded"))
    again = video.with_real(asked, pipeline, shelf)
    for found in (kept, again):
        for name, value in plain.real.items():
            np.testing.assert_allclose(found.real[name], value, rtol=1e-5, atol=1e-5)
        assert found.others.keys() == plain.others.keys()
    with pytest.raises(pytest.fail.Exception, match="decoded"):
        video.with_real(asked, pipeline, Shelf(tmp_path, "another version"))


def test_a_mixture_holds_out_of_every_folder(pipeline, folders):
    both = Video(DataConfig(records=f"{folders[0]}=0.3,{folders[1]}=0.6,{folders[0]}=0.1"), folders[0], "tiny")
    found = both.held_out(pipeline, "guard", 12)
    asked = numbers(found)
    assert any(number >= 200 for number in asked) and any(number < 200 for number in asked)
    assert len(asked) == found.parts[0].rows.stop, "a folder that is named twice counts once"
    assert not asked & trained(both, pipeline, 100)


def test_a_folder_of_its_own_leaves_all_others_to_training(pipeline, folders):
    apart = task(folders[0], held_out_records=str(folders[1]))
    assert (
        min(numbers(apart.held_out(pipeline, "guard", 9)) | numbers(apart.held_out(pipeline, "evaluation", 9))) >= 200
    )
    assert trained(apart, pipeline, 200) == {*range(120)}


def test_a_folder_whose_name_holds_an_equals_sign(pipeline, folders, tmp_path):
    for name in ("lr=x", "size=48"):
        (tmp_path / name).symlink_to(folders[0])
    for given in ("lr=x", "lr=x=2", "size=48/", "size=48=2"):
        video = Video(DataConfig(records=f"{tmp_path}/{given}"), tmp_path, "tiny")
        assert video.held_out(pipeline, "preview", 4).shape[-1] == 16
    with pytest.raises(UserError, match=r"^config.data.records: .*/size: no such folder \(with weight 48\);"):
        task(tmp_path / "size=48").held_out(pipeline, "preview", 4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text": (16, 12)}, r"its index gives text as \[12\], but the model's encoders \[64\]"),
        ({"text": (9, 64)}, r"its index gives text_tokens as \[9\], but the model's encoders \[16\]"),
        ({"image": (5, 3)}, r"its index gives image as \[5, 3\], but the model's encoders \["),
        ({"image": None}, r"its index gives image as None, but the model's encoders \["),
        ({"frames": None}, r"its index gives frames as None, but the model's encoders \[16\]"),
        ({"more": (2,)}, r"its index gives more as \[2\], but the model's encoders None"),
        ({"latents": (3, 6, 8, 12), "frames": (3, 6, 8, 20)}, r"its index gives latents as \[12\], but .* \[16\]"),
        ({"frames": (3, 8, 6, 20)}, r"its frames have shape \[3, 8, 6, 16\], but its latents \[3, 6, 8, 16\]"),
        (
            {"latents": (3, 5, 8, 16), "frames": (3, 5, 8, 20)},
            r"its latents have shape \[3, 5, 8, 16\], which the model cannot make \(height is 40, expected a multiple",
        ),
    ],
)
def test_records_that_are_not_what_they_say(pipeline, tmp_path, changes, reason):
    """Their index names the model's encoders; their arrays are others'."""
    folder = write_fitting(pipeline, tmp_path / "records", 1, first=1, shapes=changes)
    with pytest.raises(
        UserError, match=rf"^config.data.records: {folder}: {reason}.*; encode its clips again with --model=tiny$"
    ):
        task(folder).held_out(pipeline, "preview", 4)


def test_a_folder_of_videos_that_is_not_there_is_named_by_its_setting(pipeline, tmp_path):
    for folder, what in ((tmp_path / "none", "no such folder"), (tmp_path, "contains no videos")):
        video = Video(DataConfig(videos=str(folder)), tmp_path, "tiny")
        with pytest.raises(UserError, match=rf"{folder}.*{what}.* with --config.data.videos=FOLDER"):
            video.held_out(pipeline, "preview", 4)


def test_too_few_are_said_to_be_too_few(pipeline, folders):
    few = task(folders[2])
    assert len(few.held_out(pipeline, "preview", 4)) == 1
    with pytest.raises(
        TooFew, match=r"^2 held-out clips of one size are too few; raise config.data.held_out .*records$"
    ):
        few.held_out(pipeline, "guard", 64)
    with pytest.raises(TooFew, match=r"^0 held-out clips"):
        task(folders[0], held_out=0).held_out(pipeline, "preview", 4)
    assert FEWEST == 8


def test_no_model_of_other_parts_is_made_of_records(folders):
    with pytest.raises(UserError, match="only be trained on rendered digits"):
        task(folders[0]).write_model(folders[0], "tiny", {}, None, None)
