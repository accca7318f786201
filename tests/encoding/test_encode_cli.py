"""`python -m vpae_jax.encode`: from files to records, one line for what is wrong, nothing half done."""

import functools
import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoding_runs import ROOT, add_bad_videos, call, contents, files, hidden, make_videos, start
from manifests import write

from vpae_jax import encode
from vpae_jax.encoding.captions import Captions, Prompt
from vpae_jax.encoding.clip_source import Reject
from vpae_jax.inference.pipeline import load_pipeline
from vpae_jax.types import UserError

COUNT = 5
LOADED = functools.cache(load_pipeline)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """As on a user's machine; `test_encoding` has several."""
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)


@pytest.fixture(autouse=True)
def one_model(monkeypatch):
    """It is loaded and compiled once."""
    monkeypatch.setattr(encode, "load_pipeline", LOADED)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = make_videos(tmp_path_factory.mktemp("some") / "videos", COUNT)
    add_bad_videos(folder)
    return folder


@pytest.fixture
def run(capsys):
    return lambda **arguments: call(capsys, **arguments)


def same(one, two):
    """Whether two folders hold the same, whatever process wrote them."""
    one, two = contents(one), contents(two)
    assert one.keys() == two.keys()
    for id, record in one.items():
        for name, value in record.items():
            assert np.array_equal(value, two[id][name]), (id, name)
    return True


def test_a_folder_of_videos_becomes_records(videos, run, tmp_path):
    output = tmp_path / "records"
    code, out, err = run(videos=videos, output=output, unit=3, workers=2)
    assert code == 0 and not err, err
    assert out[0].startswith(f"encoded {COUNT} clips, 3 rejected; 3 of 3 units; ")
    assert out[1:] == [
        f"records: {output}: {COUNT} clips; rejected: 1 static, 1 too short, 1 unreadable",
        f"summary: {output / 'summary.html'}",
    ]
    found = contents(output)
    assert list(found) == [f"v{i:03d}.mp4#0" for i in range(COUNT)]
    for i, record in enumerate(found.values()):
        assert (record["about"]["caption"], record["about"]["video"]) == (f"clip {i}", f"v{i:03d}.mp4")
        assert record["latents"].shape == (3, 6, 6, 16)
    page = (output / "summary.html").read_text()
    assert "motion: mean difference" in page and "words of the caption" not in page, "one value is no histogram"
    assert page.count("<figure>") == COUNT and "still.mp4" in page and not hidden(output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    code, out, err = run(videos=videos, output=output, unit=3, workers=1, timeout=7, batch=2)
    assert code == 0 and not err and out[0] == f"{output} was complete; nothing is left to do"
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    (output / "summary.html").unlink()
    assert run(videos=videos, output=output, unit=3)[0] == 0
    assert (output / "summary.html").read_text() == page


def test_what_is_missing_of_complete_records_is_made_again(videos, run, tmp_path):
    output = tmp_path / "records"
    assert run(videos=videos, output=output, unit=3, workers=0)[0] == 0
    before = files(output)
    kinds = {(path.parent.name, path.name if path.parent == output else ""): path for path in output.rglob("*")}
    for path in sorted(kinds.values()):
        if path.is_file() and path.name != "identity.json":
            path.unlink()
            code, out, _ = run(videos=videos, output=output, unit=3, workers=0)
            assert code == 0 and ("was complete" in out[0]) == (path.name == "summary.html")
            assert files(output) == before, path.name


def test_bits_that_flip_in_a_folder_are_no_crash(videos, run, tmp_path):
    """The same command goes on, or says in one line what is damaged; records that are read are checked again."""
    whole, output = tmp_path / "whole", tmp_path / "flipped"
    assert run(videos=videos, output=whole, unit=4, workers=0)[0] == 0
    paths = sorted(path for path in files(whole) if "shards" not in path)
    ended = []
    for number in range(12):
        rng = random.Random(number)
        shutil.copytree(whole, output)
        for _ in range(rng.randint(1, 3)):
            damaged = output / rng.choice(paths)
            data = bytearray(damaged.read_bytes())
            data[rng.randrange(min(len(data), 300))] ^= 1 << rng.randrange(8)
            damaged.write_bytes(data[: len(data) if rng.random() < 0.8 else rng.randrange(len(data))])
        (output / "summary.html").unlink()
        code, _, err = run(videos=videos, output=output, unit=4, workers=0)
        assert (code, len(err)) in ((0, 0), (2, 1)), err
        ended.append(code)
        shutil.rmtree(output)
    assert 0 in ended and 2 in ended


def test_a_table_lists_the_videos(videos, run, tmp_path):
    """Its columns are kept, and none is taken for what the record says itself."""
    other = {"id": 7, "motion": "much", "fps": "29.97", "start": 3, "video": "x", "row": 1}
    rows = [{"file": f"v00{i}.mp4", "words": f"a number {i}", "caption": i, **other} for i in (3, 1)]
    rows += [{"file": "../v000.mp4", "words": "elsewhere"}, {"file": "none.mp4", "words": "nothing"}]
    table = tmp_path / "table.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run(
        videos=videos, manifest=table, columns="path=file,caption=words", output=tmp_path / "records", workers=0
    )
    assert code == 0, err
    assert "2 clips; rejected: 1 missing, 1 path" in out[1]
    found = contents(tmp_path / "records")
    assert [(id, record["about"]["caption"]) for id, record in found.items()] == [
        ("v003.mp4#0", "a number 3"),
        ("v001.mp4#0", "a number 1"),
    ]
    for i, record in zip((3, 1), found.values(), strict=True):
        about = record["about"]
        assert about["row"] == {"caption": i, **other}
        assert about["video"] == f"v00{i}.mp4" and about["fps"] == 8.0 and about["motion"] > 0


def test_videos_deep_in_a_folder_and_parts_of_one(videos, run, tmp_path):
    """Both say where their frames come from: the path below the folder, and times."""
    root, output = tmp_path / "root", tmp_path / "records"
    for name in ("one", "two"):
        (root / name).mkdir(parents=True)
        shutil.copy(videos / "v002.mp4", root / name / "v.mp4")
    table = tmp_path / "table.csv"
    table.write_text(
        "path,text,from,to\none/v.mp4,a,0,1.125\none/v.mp4,b,0.125,1.25\ntwo/v.mp4,c,,\none/v.mp4,d,0,1.125\n"
    )
    columns = "path=path,caption=text,start=from,end=to"
    code, out, err = run(videos=root, manifest=table, columns=columns, output=output, workers=0)
    assert code == 0 and not err and "3 clips; rejected: 1 duplicate" in out[1]
    found = {id: (record["about"]["video"], record["about"]["caption"]) for id, record in contents(output).items()}
    assert found == {
        "one/v.mp4@0-1.125#0": ("one/v.mp4", "a"),
        "one/v.mp4@0.125-1.25#0": ("one/v.mp4", "b"),
        "two/v.mp4#0": ("two/v.mp4", "c"),
    }
    (reject,) = map(json.loads, (output / "rejects.jsonl").read_text().splitlines())
    assert reject["id"] == "one/v.mp4@0-1.125" and "id=COLUMN" in reject["reason"]


def test_rejects_of_a_unit_are_tried_again_when_its_file_is_removed(run, tmp_path):
    videos, output = make_videos(tmp_path / "videos", 3), tmp_path / "records"
    (tmp_path / "whole.mp4").write_bytes((videos / "v001.mp4").read_bytes())
    (videos / "v001.mp4").write_bytes(b"\0" * (tmp_path / "whole.mp4").stat().st_size)
    assert run(videos=videos, output=output, unit=1, workers=0)[0] == 0
    before = files(output)
    (videos / "v001.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes())
    (unit,) = (path for path in (output / "units").iterdir() if '"kind": "unreadable"' in path.read_text())
    unit.unlink()
    code, out, err = run(videos=videos, output=output, unit=1, workers=0)
    assert code == 0 and not err and out[1] == f"records: {output}: 3 clips"
    assert len(contents(output)) == 3
    same = {name for name, data in files(output).items() if before.get(name) == data}
    assert len([name for name in same if name.startswith("shards/")]) == 2


def test_two_processes_write_what_one_does(videos, run, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(videos=videos, output=one, unit=2, workers=0)[0] == 0
    code, out, _ = run(videos=videos, output=two, unit=2, workers=0, process_id=1, num_processes=2)
    assert code == 0 and out[-1] == f"this process has done its share; {two} is complete when the others have"
    code, out, _ = run(videos=videos, output=two, unit=2, workers=0, process_id=0, num_processes=2)
    assert code == 0 and out[-1].startswith("summary: ")
    assert same(one, two) and not hidden(two)
    assert files(one) == files(two) | {"summary.html": (one / "summary.html").read_bytes()}


def test_two_processes_at_the_same_time(videos, run, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    running = [
        start(videos=videos, output=two, unit=1, workers=1, process_id=i, num_processes=2, batch=1) for i in (0, 1)
    ]
    assert run(videos=videos, output=one, unit=1, workers=0)[0] == 0
    said = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert any("summary: " in out for out, _ in said)
    assert same(one, two) and not hidden(two)


def test_another_setting_needs_another_folder(videos, run, tmp_path):
    output = tmp_path / "records"
    assert run(videos=videos, output=output, workers=0)[0] == 0
    before = files(output)
    for change, what in (
        ({"fps": 7}, "source.fps is 8.0 there, 7.0 here"),
        ({"min_motion": 1.5}, "source.min_motion is 0.1 there, 1.5 here"),
        ({"num_frames": 5}, "source.num_frames is 9 there, 5 here"),
        ({"unit": 5}, "source.manifest.unit is 64 there, 5 here; units is 1 there, 2 here"),
        ({"buckets": "32x48"}, "source.buckets is ['48x48'] there, ['32x48'] here"),
        ({"dtype": "float32"}, "dtype is 'bfloat16' there, 'float32' here"),
    ):
        code, _, err = run(videos=videos, output=output, workers=0, **change)
        assert (code, err) == (2, [f"error: {output} holds other records: {what}; choose another folder"])
    shutil.copytree(videos, tmp_path / "recaptioned")
    next((tmp_path / "recaptioned").glob("*.txt")).write_text("another caption")
    code, _, err = run(videos=tmp_path / "recaptioned", output=output, workers=0)
    what = "the list of videos, or their captions, have changed"
    assert (code, err) == (2, [f"error: {output} holds other records: {what}; choose another folder"])
    (captions := tmp_path / "captions.txt").write_text("a three")
    code, _, err = run(captions=captions, output=output)
    assert code == 2 and len(err) == 1
    assert f"{output} holds other records: source.kind is 'videos' there, 'captions' here; source." in err[0]
    assert files(output) == before


def test_no_clip_is_an_error(run, tmp_path):
    """Training on it must not begin, so the status is not 0; the summary is there all the same and says why."""
    videos = make_videos(tmp_path / "videos", 2)
    for path in videos.glob("*.mp4"):
        path.write_bytes(b"not a video")
    output = tmp_path / "records"
    for _ in range(2):
        code, _, err = run(videos=videos, output=output, workers=0)
        assert code == 2 and len(err) == 1
        assert err[0].startswith(
            f"error: {output}: none of what was given makes a clip; rejected: 2 unreadable, the first"
        )
        assert " being v000.mp4: " in err[0] and err[0].endswith(f"; {output / 'summary.html'} has them all")
        assert "v001.mp4" in (output / "summary.html").read_text()


def test_captions_that_the_encoder_does_not_take_are_said_to_be_too_long(run, tmp_path):
    (tmp_path / "captions.txt").write_text("a three moves up " * 9)
    code, _, err = run(captions=tmp_path / "captions.txt", output=tmp_path / "records")
    assert code == 2 and len(err) == 1
    assert "rejected: 1 caption, the first being row 1: " in err[0] and "reads at most 16; " in err[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"videos": None}, "give either --videos, to encode these, or --captions"),
        ({"captions": "captions.txt"}, "give either --videos, to encode these, or --captions"),
        ({"videos": "nowhere"}, "nowhere: no such folder; give the folder of the videos with --videos=FOLDER"),
        ({"videos": "empty"}, "empty holds no videos"),
        ({"videos": "silent", "model": "nowhere"}, "silent: none of its 1 videos has a caption ('a.mp4': no .txt"),
        ({"output": None}, "required: --output"),
        ({"output": "captions.txt"}, "captions.txt: cannot be written: "),
        ({"output": "captions.txt/below"}, "captions.txt/below: cannot be written: "),
        ({"output": "full"}, "full is not empty and holds no records; choose another folder"),
        ({"model": "nowhere"}, "nowhere: no such folder"),
        ({"manifest": "none.csv"}, "none.csv: No such file"),
        ({"manifest": "captions.txt"}, "captions.txt: a manifest's name ends in one of"),
        ({"columns": "path=file"}, "--columns says how to read a manifest; give --manifest=FILE"),
        ({"manifest": "table.csv", "columns": "path"}, "'path' is no USE=COLUMN"),
        ({"manifest": "table.csv", "columns": "pth=file"}, "unknown use 'pth'; did you mean 'path'?"),
        ({"manifest": "table.csv", "columns": "path=film"}, "has no column 'film' for the path"),
        ({"buckets": "360p"}, "buckets '360p': expected 480p, 720p"),
        ({"buckets": "50x50"}, "bucket 50x50: sides must be multiples of 16"),
        ({"num_frames": 8}, "clips of 8 frames: expected 1 + a multiple of 4"),
        ({"num_frames": 0}, "clips of 0 frames: expected 1 + a multiple of 4"),
        ({"num_frames": "many"}, "invalid int value: 'many'"),
        ({"fps": 0}, "fps is 0.0; expected a positive number"),
        ({"fps": "inf"}, "--fps: 'inf' is no finite number"),
        ({"fps": 1e9}, "fps is 1e+09; expected 1000 at most"),
        ({"fps": 1e-320}, "fps is 9.99989e-321; expected 0.01 at least"),
        ({"stride": 1e-9}, "stride is 1e-09 s, less than a frame; expected 0.125 s at least"),
        ({"clips_per_video": 0}, "clips_per_video is 0; expected a positive number"),
        ({"timeout": "nan"}, "--timeout: 'nan' is no finite number"),
        ({"timeout": 1e12}, "timeout is 1e+12 s; expected 86400 at most"),
        ({"batch": 0}, "--batch is 0; expected 1 or more"),
        ({"batch": -3}, "--batch is -3; expected 1 or more"),
        ({"unit": 0}, "units of 0 videos; expected 1 or more"),
        ({"workers": -1}, "workers is -1; expected 0 or more"),
        ({"dtype": "int8"}, "invalid choice: 'int8'"),
        ({"max_crop": 1.5}, "filter max_crop is 1.5; expected a share from 0 to 1"),
        ({"min_motion": "nan"}, "--min_motion: 'nan' is no finite number"),
        ({"max_caption": 0}, "filter max_caption is 0; expected at least min_caption, 1"),
        ({"process_id": 0}, "--process_id and --num_processes: give both, or neither"),
        ({"process_id": -1, "num_processes": 2}, "--process_id is -1 of --num_processes=2; expected 0 to 1"),
        ({"process_id": 2, "num_processes": 2}, "--process_id is 2 of --num_processes=2; expected 0 to 1"),
        ({"process_id": 0, "num_processes": 0}, "--num_processes is 0; expected 1 or more"),
        ({"vidoes": "videos"}, "unrecognized arguments: --vidoes=videos"),
        (
            {"videos": None, "captions": "none.txt"},
            "none.txt: No such file or directory; give another with --captions=",
        ),
        ({"videos": None, "captions": "empty"}, "a file of captions ends in one of .txt"),
        (
            {"videos": None, "captions": "captions.txt", "manifest": "table.csv"},
            "--manifest belongs to --videos; leave it out",
        ),
        ({"teacher": "tiny"}, "--teacher belongs to --captions; leave it out with --videos"),
        ({"steps": 4}, "--steps belongs to --captions"),
        ({"guidance": 5}, "--guidance belongs to --captions"),
        ({"solver": "euler"}, "--solver belongs to --captions"),
        ({"shift": 3}, "--shift belongs to --captions"),
        ({"seed": 0}, "--seed belongs to --captions"),
        (
            {"videos": None, "captions": "captions.txt", "fps": 16},
            "--fps belongs to --videos; leave it out with --captions",
        ),
        *(
            ({"videos": None, "captions": "captions.txt", name: 1}, f"--{name} belongs to --videos")
            for name in (*encode.OF_VIDEOS[2:], "min_motion")
        ),
        ({"videos": None, "captions": "captions.txt", "max_caption": 0}, "filter max_caption is 0; expected at least"),
        ({"videos": None, "captions": "captions.txt", "unit": 0}, "units of 0 captions; expected 1 or more"),
        ({"videos": None, "captions": "captions.txt", "batch": 0}, "--batch is 0; expected 1 or more"),
        ({"videos": None, "captions": "captions.txt", "steps": 0}, "steps is 0, expected at least 1"),
        ({"videos": None, "captions": "captions.txt", "guidance": 0.5}, "guidance is 0.5, expected at least 1"),
        ({"videos": None, "captions": "captions.txt", "guidance": "inf"}, "--guidance: 'inf' is no finite number"),
        ({"videos": None, "captions": "captions.txt", "shift": 0}, "shift is 0.0, expected a positive number"),
        (
            {"videos": None, "captions": "captions.txt", "seed": -1},
            "--seed is -1, expected a number from 0 to 4294967295",
        ),
        ({"videos": None, "captions": "captions.txt", "seed": 2**32 - 1}, "too high for 2 captions"),
        ({"videos": None, "captions": "captions.txt", "num_frames": 8}, "num_frames is 8, expected 1 + a multiple"),
        ({"videos": None, "captions": "captions.txt", "num_frames": 0}, "num_frames is 0, expected 1 + a multiple"),
        ({"videos": None, "captions": "captions.txt", "buckets": "40x40"}, "sides must be multiples of 16"),
        (
            {"videos": None, "captions": "captions.txt", "buckets": "480p"},
            "--buckets=480p names 5 sizes; with --captions",
        ),
        ({"videos": None, "captions": "captions.txt", "teacher": "nowhere"}, "nowhere: no such folder"),
        ({"videos": None, "captions": "table.csv", "columns": "caption=text"}, "has no column 'text' for the caption"),
        ({"videos": None, "captions": "table.csv", "columns": "id=n"}, "has no column 'n' for the id"),
        ({"videos": None, "captions": "captions.txt", "columns": "id=n"}, "a caption a line and no column 'n'; leave"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line_and_status_2(videos, run, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "full"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "photo.jpg").touch()
    (tmp_path / "silent").mkdir()
    (tmp_path / "silent" / "a.mp4").touch()
    (tmp_path / "captions.txt").write_text("a three\na four\n")
    (tmp_path / "table.csv").write_text("file,caption\nv000.mp4,a three\n")
    before = sorted(tmp_path.rglob("*"))
    own = {"workers": 0} if changes.get("videos", videos) else {}
    arguments = {"videos": videos, "output": "new/records", **own, **changes}
    code, _, err = run(**{name: value for name, value in arguments.items() if value is not None})
    assert code == 2 and len(err) == 1 and err[0].startswith("error: ") and message in err[0], err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_teachers_clips_can_be_made_again(run, tmp_path):
    (tmp_path / "captions.txt").write_text("a three moves up\n\nthe digit seven\n" + "a three " * 20 + "\na one\n")
    output = tmp_path / "records"
    settings = dict(captions=tmp_path / "captions.txt", output=output, steps=2, guidance=3, seed=11, dtype="float32")
    code, out, err = run(**settings, unit=2, batch=2, shift=2)
    assert code == 0 and not err, err
    assert out[1] == f"records: {output}: 3 clips; rejected: 1 caption"
    found = contents(output)
    assert [(r["about"]["caption"], r["about"]["seed"]) for r in found.values()] == [
        ("a three moves up", 11),
        ("the digit seven", 12),
        ("a one", 14),
    ]
    assert "seed 14" in (output / "summary.html").read_text()
    pipeline = LOADED("tiny")
    for record in found.values():
        recipe = dict(record["about"])
        caption = recipe.pop("caption")
        del recipe["id"]
        again = pipeline(caption, **recipe)
        decoded = np.asarray(pipeline.decode(jnp.asarray(record["latents"], jnp.float32)[None])[0])
        assert again.shape == decoded.shape == (9, 48, 48, 3)
        assert np.abs(again.astype(int) - decoded).mean() < 0.5
        other = pipeline(caption, **{**recipe, "seed": 3})
        assert np.abs(other.astype(int) - decoded).mean() > 2
    # The same model by another name is loaded apart, and makes the same.
    code, out, _ = run(**settings, unit=2, batch=1, shift=2, teacher=ROOT / "vpae_jax" / "assets" / "tiny")
    assert code == 0 and out[0] == f"{output} was complete; nothing is left to do"
    code, _, err = run(**{**settings, "seed": 12}, unit=2, shift=2)
    assert code == 2 and len(err) == 1 and "holds other records: recipe.seed is 11 there, 12 here; choose" in err[0]


@pytest.mark.long
def test_two_teachers_at_the_same_time(run, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    (captions := tmp_path / "captions.txt").write_text("".join(f"a three moves up {i}\n" for i in range(5)))
    settings = dict(captions=captions, unit=1, steps=1, guidance=1)
    running = [start(**settings, output=two, process_id=i, num_processes=2) for i in (0, 1)]
    code, out, err = run(**settings, output=one)
    assert code == 0 and out[0].startswith("encoded 5 clips; 5 of 5 units; "), err
    said = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert any("summary: " in out for out, _ in said)
    assert same(one, two) and not hidden(two)


def test_captions_are_filtered_by_their_length(run, tmp_path):
    (captions := tmp_path / "captions.txt").write_text("a three moves up\na\nan eight moves up and to the right\n")
    settings = dict(captions=captions, output=tmp_path / "records", steps=1, guidance=1)
    code, out, err = run(**settings, min_caption=2, max_caption=20)
    assert code == 0, err
    assert out[1] == f"records: {tmp_path / 'records'}: 1 clips; rejected: 2 caption"
    code, _, err = run(**settings, min_caption=2)
    assert code == 2 and "holds other records: source.max_caption is 20 there, 10000 here; choose" in err[0]


def test_a_teachers_clip_leads_back_to_its_row(run, tmp_path):
    """Ids are the table's, the other columns are kept, and seeds count rows, whichever of them are used."""
    rows = [("a", "a three moves up"), ("b", "a three " * 1000), ("a", "the digit six"), ("c", ""), ("d", "a one")]
    table, output = tmp_path / "captions.csv", tmp_path / "records"
    lines = [f"{id},{text},{id}.mp4,{i}" for i, (id, text) in enumerate(rows)]
    table.write_text("\n".join(["id,text,video,seed", *lines]) + "\n")
    code, out, err = run(captions=table, columns="caption=text,id=id", output=output, steps=1, guidance=1, seed=7)
    assert code == 0 and not err and out[1].endswith("2 clips; rejected: 2 caption, 1 duplicate")
    found = {id: record["about"] for id, record in contents(output).items()}
    assert {id: (about["seed"], about["row"]) for id, about in found.items()} == {
        "a": (7, {"video": "a.mp4", "seed": "0"}),
        "d": (11, {"video": "d.mp4", "seed": "4"}),
    }
    rejects = map(json.loads, (output / "rejects.jsonl").read_text().splitlines())
    assert [(each["id"], each["kind"], each["reason"]) for each in rejects] == [
        ("b", "caption", "2001 tokens, the text encoder reads at most 16"),
        ("a", "duplicate", "a row before it has the same 'id', 'a'"),
        ("c", "caption", "no caption"),
    ]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_captions_of_a_table(name, tmp_path):
    rows = [{"text": f"caption {i}", "n": i % 4, "score": 0.5} for i in range(6)]
    table = write(tmp_path / name, rows)
    plain, named = Captions(table, "text", unit=4), Captions(table, "text", "n", unit=4)
    assert plain.identity != named.identity and (plain.rows, plain.units) == (named.rows, named.units) == (6, 2)
    assert [item.id for unit in (0, 1) for item in plain.read(unit)] == [f"row {i + 1}" for i in range(6)]
    first, *_ = plain.read(0)
    assert {key: float(value) for key, value in first.about.items()} == {"n": 0, "score": 0.5}
    one, two = named.read(1)
    assert (one.id, one.kind, two.id, two.kind) == ("0", "duplicate", "1", "duplicate")
    last = list(named.read(0))[-1]
    assert (last.id, last.number, last.caption) == ("3", 3, "caption 3") and set(last.about) == {"score"}


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut out, put in, or doubled."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.randint(1, 20))
        piece = rng.choice([b"", b"\0", b"\xff\xfe", b'"', b"\r", b"\n\n", "\u202e\u4e09".encode(), data[at:end] * 2])
        data = data[:at] + piece + data[end if rng.random() < 0.7 else at :]
    return data


CAPTIONS = {
    ".txt": b"a three moves up\nthe digit seven\na one\n",
    ".csv": b'caption,other\n"a three, moves up",1\nthe digit seven,2\n"a\none",3\n',
    ".jsonl": b'{"caption": "a three moves up"}\n{"caption": "the digit seven"}\n{"caption": "\\u4e09"}\n',
}


@pytest.mark.parametrize("suffix", CAPTIONS)
def test_any_file_of_captions_is_read_or_refused_in_one_line(suffix, tmp_path):
    file, read = tmp_path / f"captions{suffix}", 0
    for number in range(100):
        file.write_bytes(mutated(CAPTIONS[suffix], random.Random(number)))
        try:
            captions = Captions(file, unit=2)
            found = [item for unit in range(captions.units) for item in captions.read(unit)]
        except UserError as error:
            assert "\n" not in str(error) and str(file) in str(error), error
            continue
        read += 1
        assert len(found) == captions.rows and len({item.id for item in found}) == captions.rows
        for number, item in enumerate(found):
            if isinstance(item, Prompt):
                assert item.number == number and item.caption == item.caption.strip() != ""
                item.caption.encode()
            else:
                assert isinstance(item, Reject) and item.kind in ("row", "caption") and "\n" not in item.reason
    assert read > 15, "some can be read"


def test_mutated_captions_through_the_whole_command(run, tmp_path):
    ended = []
    for number in range(6):
        suffix = list(CAPTIONS)[number % 3]
        file = tmp_path / f"captions{number}{suffix}"
        file.write_bytes(mutated(CAPTIONS[suffix], random.Random(number)))
        code, _, err = run(captions=file, output=tmp_path / f"out{number}", steps=1, guidance=1)
        assert (code, len(err)) in ((0, 0), (2, 1)), err
        ended.append(code)
        if not code:
            assert contents(tmp_path / f"out{number}")
    assert 0 in ended


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(videos, run, tmp_path):
    """A limit on files stands in for it: the system says EFBIG instead of ENOSPC, and in the same places."""
    output = tmp_path / "records"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))"
    process = start(limit, videos=videos, output=output, workers=2, unit=8, model="tiny")
    out, err = process.communicate()
    said = [line for line in err.splitlines() if "error: " in line]
    assert process.returncode == 2 and len(said) == 1 and "Traceback" not in err, (out, err)
    assert said[0] == (
        f"error: {output}: cannot be written: File too large; make room there, or choose another destination"
    )
    assert [path.name for path in output.iterdir()] == ["identity.json"]
    assert run(videos=videos, output=output, workers=0, unit=8)[0] == 0
    assert len(contents(output)) == COUNT
