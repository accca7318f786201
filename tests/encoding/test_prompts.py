"""`python -m vpae_jax.encode --prompts=...`: conditions as the pipeline makes them, without clips."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from encoding_runs import call, contents, files
from manifests import write
from PIL import Image

from vpae_jax import encode
from vpae_jax.data.records import LatentRecords
from vpae_jax.encoding.captions import Captions
from vpae_jax.encoding.clip_source import Reject
from vpae_jax.encoding.pictures import Pictures
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.media import read_image
from vpae_jax.types import UserError

LOADED = functools.cache(load_pipeline)
WIDE, HIGH = (32, 48), (48, 32)
CLIPS = {"buckets": "32x48,48x32", "num_frames": 9}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])


@pytest.fixture(autouse=True)
def one_model(monkeypatch):
    """It is loaded and compiled once."""
    monkeypatch.setattr(encode, "load_pipeline", LOADED)


@pytest.fixture
def run(capsys):
    return lambda **arguments: call(capsys, **arguments)


@pytest.fixture
def images(tmp_path):
    """Pictures of three sizes, called in three ways."""
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, height, width in (("a.png", 40, 56), ("deep/b.jpg", 40, 56), ("3.PNG", 64, 48), ("four.png", 30, 45)):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / name)
    return folder


def bfloat16(value):
    return np.asarray(value, np.float32).astype(ml_dtypes.bfloat16)


def assert_as_the_pipeline(record, caption, picture, size):
    """The record's condition is the one that the pipeline makes of the prompt and the picture."""
    pipeline = LOADED("tiny", jnp.dtype("bfloat16"), with_transformer=False)
    expected = pipeline.condition([caption], None if picture is None else picture[None], 9, *size)
    for name in ("text", "text_mask", "image", "frames"):
        value = np.asarray(getattr(expected, name)[0])
        given = value if value.dtype == bool else bfloat16(value)
        np.testing.assert_array_equal(record[name], given, err_msg=f"{name} of {caption}")
    assert "latents" not in record and tuple(record["size"]) == (3, size[0] // 8, size[1] // 8, 16)


def test_prompts_become_records_of_text_alone(run, tmp_path):
    (file := tmp_path / "prompts.txt").write_text("a three moves up\n\n" + "a three " * 20 + "\nthe digit seven\n")
    output = tmp_path / "records"
    arguments = dict(prompts=file, output=output, unit=2)
    code, out, err = run(**arguments)
    assert code == 0 and not err, err
    assert out[0] == "no --images: the prompts are encoded for text-to-video, without a first frame for tiny"
    assert out[1].startswith("encoded 2 prompts, 1 rejected; 2 of 2 units; ")
    assert out[2:] == [f"records: {output}: 2 prompts; rejected: 1 caption", f"summary: {output / 'summary.html'}"]
    found = contents(output)
    assert list(found) == ["row 1", "row 3"] and LatentRecords(output).of_prompts
    for record, caption in zip(found.values(), ("a three moves up", "the digit seven"), strict=True):
        about = {"caption": caption, "num_frames": 9, "height": 48, "width": 48, "id": record["about"]["id"]}
        assert record["about"] == about
        assert_as_the_pipeline(record, caption, None, (48, 48))
    page = (output / "summary.html").read_text()
    assert (
        "Encoded prompts" in page and "the digit seven" in page and "9 frames of 48x48" in page and "<img" not in page
    )
    assert run(**arguments)[1][0] == f"{output} is already complete; nothing to do"
    before = files(output)
    (output / "units" / "00001.json").unlink()
    (output / "index.json").unlink()
    assert run(**arguments)[0] == 0 and files(output) == before, "what is missing is made again, the same"
    code, _, err = run(**arguments, num_frames=5)
    assert code == 2 and "holds other records: clips.num_frames is 9 there, 5 here; choose" in err[0]


def test_first_frames_are_conditions_as_the_pipeline_makes_them(run, images, tmp_path):
    """Named by a column; each for a clip of the size that is nearest to its own, two processes sharing the work."""
    rows = [
        {"caption": "a three", "image": "a.png", "note": "kept"},
        {"caption": "a four", "image": "deep/b.jpg", "note": ""},
        {"caption": "a five", "image": "3.PNG", "note": "kept"},
    ]
    file, output = write(tmp_path / "table.csv", rows), tmp_path / "records"
    arguments = dict(prompts=file, images=images, unit=2, **CLIPS)
    code, out, err = run(**arguments, output=output, process_id=1, num_processes=2)
    assert code == 0 and not err and "this process has done its share" in out[-1]
    code, out, err = run(**arguments, output=output, process_id=0, num_processes=2)
    assert code == 0 and not err and out[-2] == f"records: {output}: 3 prompts", err
    for record, row in zip(contents(output).values(), rows, strict=True):
        assert record["about"]["image"] == row["image"] and record["about"]["row"].get("note") == row["note"]
        size = HIGH if row["image"] == "3.PNG" else WIDE
        assert_as_the_pipeline(record, row["caption"], read_image(images / row["image"]), size)
        assert (record["frames"][0, ..., :4] == 1).all() and record["image"].any()
    assert run(**arguments, output=tmp_path / "pairs", batch=2)[0] == 0
    for id, record in contents(tmp_path / "pairs").items():
        for name in ("text", "image", "frames"):
            value = np.float32(record[name])
            np.testing.assert_allclose(value, np.float32(contents(output)[id][name]), atol=0.05 * np.abs(value).max())
    page = (output / "summary.html").read_text()
    assert page.count('alt="first frame"') == 3 and "9 frames of 48x32" in page
    index = json.loads((output / "index.json").read_text())
    assert {tuple(shard["latent_size"]) for shard in index["shards"]} == {(3, 4, 6, 16), (3, 6, 4, 16)}


def listed(file, images, column=None, id=None):
    captions = Captions(file, id=id, unit=9, flag="--prompts", pictures=Pictures(images, column))
    return [*captions.read(0)]


def test_first_frames_are_found_by_column_id_or_number(images, tmp_path):
    (lines := tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    found = listed(lines, images)
    assert [isinstance(one, Reject) for one in found] == [True, True, False] and found[2].image == "3.PNG"
    assert (found[0].kind, found[0].reason) == (
        "missing",
        "no image '1', with .png or another suffix, in the folder of the images",
    )
    table = write(tmp_path / "table.jsonl", [{"caption": "x", "id": "four"}, {"caption": "y", "id": "deep/b"}])
    assert [one.image for one in listed(table, images, id="id")] == ["four.png", "deep/b.jpg"]
    table = write(tmp_path / "table.tsv", [{"caption": "x", "id": "a", "image": "four.png", "first": "a.png"}])
    assert [one.image for one in listed(table, images, id="id")] == ["four.png"]
    (named,) = listed(table, images, "first", "id")
    assert named.image == "a.png" and named.picture.shape == (40, 56, 3) and named.about == {"image": "four.png"}


def test_first_frames_that_cannot_be_used_are_rejects(run, images, tmp_path):
    (tmp_path / "outside.png").write_bytes((images / "a.png").read_bytes())
    (images / "linked.png").symlink_to(tmp_path / "outside.png")
    (images / "torn.png").write_bytes((images / "a.png").read_bytes()[:90])
    (images / "text.png").write_text("no image")
    (images / "folder.png").mkdir()
    kinds = {
        "none.png": "missing",
        "../outside.png": "path",
        "linked.png": "path",
        "torn.png": "image",
        "text.png": "image",
        "folder.png": "path",
        "": "image",
    }
    rows = [{"caption": f"number {n}", "image": name} for n, name in enumerate(["a.png", *kinds])]
    file, output = write(tmp_path / "table.csv", rows), tmp_path / "records"
    code, out, err = run(prompts=file, images=images, output=output, num_frames=9, buckets="32x48")
    assert code == 0 and not err and out[-2] == f"records: {output}: 1 prompts; rejected: 3 image, 1 missing, 3 path"
    rejects = [json.loads(line) for line in (output / "rejects.jsonl").read_text().splitlines()]
    assert [reject["kind"] for reject in rejects] == list(kinds.values())
    assert "outside the folder of the images" in rejects[1]["reason"] and "\n" not in rejects[3]["reason"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"captions": "prompts.txt"},
            "give exactly one of --videos (real videos), --captions (for a teacher to generate",
        ),
        ({"prompts": "none.txt"}, "none.txt: No such file or directory; give another with --prompts=FILE"),
        ({"prompts": "images"}, "images: a file of prompts must end in one of .txt"),
        ({"prompts": "table.csv", "columns": "caption=text"}, "has no column 'text' for the caption"),
        ({"prompts": "table.csv", "columns": "image=first"}, "image= names files in a folder; give it with --images="),
        (
            {"prompts": "table.csv", "images": "images", "columns": "image=first"},
            "has no column 'first' for the image; it has 'caption', 'image'; name another with --columns=image=COLUMN",
        ),
        (
            {"images": "images", "columns": "image=first"},
            "one caption per line and no column 'first'; leave out image=",
        ),
        ({"images": "nowhere"}, "nowhere: no such folder; give the folder of the first frames with --images=FOLDER"),
        ({"prompts": None, "captions": "prompts.txt", "images": "images"}, "--images belongs to --prompts; leave it"),
        ({"prompts": None, "captions": "table.csv", "columns": "image=image"}, "image= belongs to --prompts"),
        ({"fps": 16}, "--fps belongs to --videos; leave it out with --prompts"),
        ({"steps": 1}, "--steps belongs to --captions; leave it out with --prompts"),
        ({"unit": 0}, "units of 0 prompts; expected 1 or more"),
        ({"num_frames": 8}, "num_frames is 8, expected 1 + a multiple of 4, such as 9"),
        ({"buckets": "40x40"}, "sides must be multiples of 16"),
        ({"buckets": "480p"}, "--buckets=480p names 5 sizes, but only first frames can choose among them; without"),
        ({"model": "nowhere"}, "nowhere: no such folder"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_flags_are_one_line_and_status_2(run, images, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a three\n")
    (tmp_path / "table.csv").write_text("caption,image\na three,a.png\n")
    before = sorted(tmp_path.rglob("*"))
    arguments = {"prompts": "prompts.txt", "output": "records", **changes}
    code, _, err = run(**{name: value for name, value in arguments.items() if value is not None})
    assert code == 2 and len(err) == 1 and err[0].startswith("error: ") and message in err[0], err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_text_to_video_model_takes_no_first_frames(images, tmp_path, monkeypatch):
    """Said before a folder is made."""
    (file := tmp_path / "prompts.txt").write_text("a three\n")
    monkeypatch.setattr(Pipeline, "takes_image", False)
    with pytest.raises(UserError, match=r"^--images=.*images: tiny is a text-to-video model; leave it out$"):
        encode.main([f"--prompts={file}", f"--images={images}", f"--output={tmp_path / 'records'}"])
    assert not (tmp_path / "records").exists()
