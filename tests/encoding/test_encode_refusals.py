"""`python -m vpae_jax.encode`: one line for what is wrong, nothing half done."""

import random
import shutil

import pytest
from encoding_runs import COUNT, contents, files, make_videos, start

from vpae_jax import encode


@pytest.fixture
def videos(real_videos):
    return real_videos


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
    what = "the list of videos or their captions have changed"
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
        assert err[0].startswith(f"error: {output}: the input gives no clips; rejected: 2 unreadable, the first")
        assert " being v000.mp4: " in err[0] and err[0].endswith(f"; {output / 'summary.html'} lists them all")
        assert "v001.mp4" in (output / "summary.html").read_text()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"videos": None}, "give exactly one of --videos (real videos), --captions (for a teacher"),
        ({"captions": "captions.txt"}, "give exactly one of --videos (real videos), --captions (for a teacher"),
        ({"videos": "nowhere"}, "nowhere: no such folder; give the folder of videos with --videos=FOLDER"),
        ({"videos": "empty"}, "empty contains no videos"),
        ({"videos": "silent", "model": "nowhere"}, "silent: none of its 1 videos has a caption ('a.mp4': no .txt"),
        ({"output": None}, "required: --output"),
        ({"output": "captions.txt"}, "captions.txt: cannot be written: "),
        ({"output": "captions.txt/below"}, "captions.txt/below: cannot be written: "),
        ({"output": "full"}, "full is not empty and holds no records; choose another folder"),
        ({"model": "nowhere"}, "nowhere: no such folder"),
        ({"manifest": "none.csv"}, "none.csv: No such file"),
        ({"manifest": "captions.txt"}, "captions.txt: a manifest's name must end in one of"),
        ({"columns": "path=file"}, "--columns describes a manifest; give --manifest=FILE"),
        ({"manifest": "table.csv", "columns": "path"}, "'path' is neither USE=COLUMN nor"),
        ({"manifest": "table.csv", "columns": "pth=file"}, "unknown use 'pth'; did you mean 'path'?"),
        ({"manifest": "table.csv", "columns": "path=film"}, "has no column 'film' for the path"),
        ({"buckets": "360p"}, "buckets '360p': expected 480p, 720p"),
        ({"buckets": "50x50"}, "bucket 50x50: sides must be multiples of 16"),
        ({"num_frames": 8}, "clips of 8 frames: expected 1 + a multiple of 4"),
        ({"num_frames": 0}, "clips of 0 frames: expected 1 + a multiple of 4"),
        ({"num_frames": "many"}, "invalid int value: 'many'"),
        ({"fps": 0}, "fps is 0.0; expected a positive number"),
        ({"fps": "inf"}, "--fps: 'inf' is not a finite number"),
        ({"fps": 1e9}, "fps is 1e+09; expected at most 1000"),
        ({"fps": 1e-320}, "fps is 9.99989e-321; expected at least 0.01"),
        ({"stride": 1e-9}, "stride is 1e-09 s, less than a frame; expected at least 0.125 s"),
        ({"clips_per_video": 0}, "clips_per_video is 0; expected a positive number"),
        ({"timeout": "nan"}, "--timeout: 'nan' is not a finite number"),
        ({"timeout": 1e12}, "timeout is 1e+12 s; expected at most 86400"),
        ({"batch": 0}, "--batch is 0; expected 1 or more"),
        ({"batch": -3}, "--batch is -3; expected 1 or more"),
        ({"unit": 0}, "units of 0 videos; expected 1 or more"),
        ({"workers": -1}, "workers is -1; expected 0 or more"),
        ({"dtype": "int8"}, "invalid choice: 'int8'"),
        ({"max_crop": 1.5}, "filter max_crop is 1.5; expected a fraction from 0 to 1"),
        ({"min_motion": "nan"}, "--min_motion: 'nan' is not a finite number"),
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
        ({"videos": None, "captions": "empty"}, "a file of captions must end in one of .txt"),
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
        ({"videos": None, "captions": "captions.txt", "guidance": "inf"}, "--guidance: 'inf' is not a finite number"),
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
        (
            {"videos": None, "captions": "captions.txt", "columns": "id=n"},
            "one caption per line and no column 'n'; leave",
        ),
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


def test_bits_that_flip_in_a_folder_are_no_crash(videos, run, tmp_path):
    """The same command goes on, or says in one line what is damaged; records that are read are checked again."""
    whole, output = tmp_path / "whole", tmp_path / "flipped"
    assert run(videos=videos, output=whole, unit=4, workers=0)[0] == 0
    paths = sorted(path for path in files(whole) if "shards" not in path)
    ended = []
    for number in range(6):
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
