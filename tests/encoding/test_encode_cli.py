"""`python -m vpae_jax.encode` of videos: from files to records, by one process or several, and again."""

import json
import shutil

import pytest
from encoding_runs import COUNT, contents, files, hidden, make_videos, same, start


@pytest.fixture
def videos(real_videos):
    return real_videos


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
    assert "motion: mean difference" in page and "words in the caption" not in page, "one value is no histogram"
    assert page.count("<figure>") == COUNT and "still.mp4" in page and not hidden(output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    code, out, err = run(videos=videos, output=output, unit=3, workers=1, timeout=7, batch=2)
    assert code == 0 and not err and out[0] == f"{output} is already complete; nothing to do"
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
            assert code == 0 and ("is already complete" in out[0]) == (path.name == "summary.html")
            assert files(output) == before, path.name


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
    assert (
        code == 0
        and out[-1] == f"this process has done its share; {two} will be complete when the others have done theirs"
    )
    code, out, _ = run(videos=videos, output=two, unit=2, workers=0, process_id=0, num_processes=2)
    assert code == 0 and out[-1].startswith("summary: ")
    assert same(one, two) and not hidden(two)
    assert files(one) == files(two) | {"summary.html": (one / "summary.html").read_bytes()}


@pytest.mark.long
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
