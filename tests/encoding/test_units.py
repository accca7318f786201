"""A folder of records in the making: whole or not at all, unit by unit, whoever is killed when."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from record_files import FACTS, NULL, SMALL, WIDE, arrays_of, number_of, write_folder

from vpae_jax.data.records import LatentRecords, NotFinite
from vpae_jax.encoding import units as units_module
from vpae_jax.encoding.clip_source import Reject
from vpae_jax.encoding.units import Units
from vpae_jax.files import here
from vpae_jax.pages import jpeg
from vpae_jax.types import UserError

HERE = Path(__file__).parent
IDENTITY = {"clips": "numbers", "encoders": {"vae": "one"}}

UNSHARE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]


def namespaces() -> bool:
    """Whether this system lets us make a process namespace."""
    return (
        shutil.which("unshare") is not None and not subprocess.run([*UNSHARE, "true"], capture_output=True).returncode
    )


def add(writer, *numbers, shape=SMALL):
    for number in numbers:
        writer.add(f"clip {number}", arrays_of(number, shape), {"number": number})


def fill(units: Units, process: int = 0, processes: int = 1, most: int | None = None) -> None:
    for unit in units.pending(process, processes)[:most]:
        with units.write(unit) as writer:
            add(writer, 2 * unit, 2 * unit + 1)


def numbers(folder: Path) -> list[int]:
    records = LatentRecords(folder)
    found = [int(records.about(i)["id"].removeprefix("clip ")) for i in range(len(records))]
    for i, number in enumerate(found):  # latents hold it too, as far as bfloat16 can
        assert abs(number_of(records[i]["latents"]) - number) <= number / 256
    return found


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


def test_a_folder_is_readable_when_all_units_are_done_and_not_before(tmp_path):
    folder = tmp_path / "folder"
    units = Units(folder, IDENTITY, 3)
    assert units.pending() == [0, 1, 2]
    assert units.pending(1, 2) == [1]
    with units.write(1) as writer:
        add(writer, 2, 3)
    assert units.pending() == [0, 2]
    assert not units.finish(NULL, FACTS)
    with pytest.raises(UserError, match="its encoding is not finished; run the same encode command again"):
        LatentRecords(folder)
    again = Units(folder, IDENTITY, 3)
    fill(again)
    assert again.pending() == []
    assert again.finish(NULL, FACTS) and units.finish(NULL, FACTS)
    assert numbers(folder) == list(range(6))
    index = LatentRecords(folder).index
    assert (index["schema"], index["count"], index["takes_image"], index["fingerprint"]) == (
        2,
        6,
        True,
        units.fingerprint,
    )
    assert hidden(folder) == []


def test_a_unit_that_fails_leaves_nothing(tmp_path):
    units = Units(tmp_path / "folder", IDENTITY, 1)
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(RuntimeError, match="the decoder is gone"), units.write(0) as writer:
        add(writer, 0)
        raise RuntimeError("the decoder is gone")
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert units.pending() == [0]


def test_rejects_and_notes_are_kept(tmp_path):
    folder = tmp_path / "folder"
    units = Units(folder, IDENTITY, 2)
    picture = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    with units.write(0) as writer:
        writer.reject(Reject("a", "static", "nothing moves", picture))
        writer.reject(Reject("b\ud800", "unreadable", "no frames"))
        add(writer, 0)
        writer.note({"id": "clip 0", "motion": 0.5})
    with units.write(1) as writer:
        writer.reject(Reject("c", "static", "nothing moves"))
    contents = units.read(0)
    assert contents.clips == 1 and contents.notes == ({"id": "clip 0", "motion": 0.5},)
    assert [(r.id, r.kind, r.reason) for r in contents.rejects] == [
        ("a", "static", "nothing moves"),
        ("b\ud800", "unreadable", "no frames"),
    ]
    assert contents.pictures == {0: jpeg(picture)}
    assert units.finish(NULL, FACTS)
    lines = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a", "b\ud800", "c"]
    assert LatentRecords(folder).index["rejects"] == {"static": 2, "unreadable": 1}


def test_a_folder_of_rejects_alone_has_no_clips(tmp_path):
    units = Units(tmp_path / "folder", IDENTITY, 1)
    with units.write(0) as writer:
        writer.reject(Reject("a", "static", "nothing moves"))
    assert units.finish(NULL, FACTS)
    assert len(LatentRecords(tmp_path / "folder")) == 0


def test_another_identity_is_refused_by_its_key(tmp_path):
    folder = tmp_path / "folder"
    Units(folder, IDENTITY, 3)
    with pytest.raises(UserError, match=r"holds other records: encoders\.vae is 'one' there, 'two' here; choose"):
        Units(folder, {**IDENTITY, "encoders": {"vae": "two"}}, 3)
    with pytest.raises(UserError, match="units is 3 there, 4 here"):
        Units(folder, IDENTITY, 4)
    with pytest.raises(UserError, match="fps is not set there, 16 here"):
        Units(folder, {**IDENTITY, "fps": 16}, 3)


def test_long_values_are_shown_where_they_differ(tmp_path):
    prompt = "too bright, too dark, " * 10
    Units(tmp_path / "folder", {"prompt": prompt + "one", "kind": "some"}, 3)
    with pytest.raises(UserError) as refusal:
        Units(tmp_path / "folder", {"prompt": prompt + "another", "kind": "some"}, 3)
    assert str(refusal.value) == (
        f"{tmp_path / 'folder'} holds other records: prompt is ...o bright, too dark, one' there, "
        "...o bright, too dark, another' here; choose another folder"
    )
    other = {name: 1 for name in "abcde"}
    with pytest.raises(UserError, match=r"a is not set there, 1 here; b is .*; c is .* here; 4 more differ; choose"):
        Units(tmp_path / "folder", other, 3)


def test_a_process_of_another_namespace_keeps_its_unit(tmp_path, monkeypatch):
    """Containers that share the host's name number their processes each for itself: another container's process 7 may
    live while there is none here, and while this one is number 7 itself."""
    folder = tmp_path / "folder"
    Units(folder, IDENTITY, 2)
    for number, same in enumerate((os.getpid(), 2**22 + 1)):  # the second is more than Linux gives
        with monkeypatch.context() as patched:
            patched.setattr(os, "getpid", lambda same=same: same)
            patched.setattr(units_module, "here", lambda: "0badcafe")
            theirs = Units(folder, IDENTITY, 2)
            writing = theirs.write(number)
            writer = writing.__enter__()
        add(writer, 2 * number, 2 * number + 1)
        assert len(hidden(folder)) == 1
        Units(folder, IDENTITY, 2)
        assert len(hidden(folder)) == 1, "a process of another namespace may live"
        writing.__exit__(None, None, None)
    assert theirs.finish(NULL, FACTS) and numbers(folder) == [0, 1, 2, 3]


@pytest.mark.skipif(not namespaces(), reason="no process namespace can be made here")
def test_real_namespaces_differ(tmp_path):
    name = [sys.executable, "-c", "from vpae_jax.files import here; print(here())"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])}
    within = [*UNSHARE, *name]
    one, other = (subprocess.run(c, env=env, capture_output=True, text=True, check=True).stdout for c in (name, within))
    assert one.strip() == here() != other.strip()


def test_a_workspace_that_others_removed_is_named(tmp_path):
    """It is no lack of room, so making room is no remedy."""
    folder = tmp_path / "folder"
    units = Units(folder, IDENTITY, 1)
    with pytest.raises(UserError) as refusal, units.write(0) as writer:
        add(writer, 0, 1)
        (workspace,) = hidden(folder)
        shutil.rmtree(folder / workspace)
    assert str(refusal.value) == (
        f"{folder / workspace} was removed by another process while in use; run the same command again"
    )
    assert units.pending() == [0]
    fill(units)
    assert units.finish(NULL, FACTS) and numbers(folder) == [0, 1]


def test_a_clip_that_is_not_finite_leaves_no_trace(tmp_path):
    """A shard that was begun for it would have no clips, and no shapes."""
    folder = tmp_path / "folder"
    units = Units(folder, IDENTITY, 1)
    with units.write(0) as writer:
        with pytest.raises(NotFinite, match="clip 'odd': its text are not finite in bfloat16"):
            writer.add("odd", {**arrays_of(0, WIDE), "text": np.full((6, 8), np.inf, np.float32)}, {})
        add(writer, 0, 1)
    assert units.finish(NULL, FACTS)
    assert numbers(folder) == [0, 1] and len(list((folder / "shards").iterdir())) == 1


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(UserError, match="is not empty and holds no records; choose another folder"):
        Units(tmp_path, IDENTITY, 1)
    (tmp_path / "index.json").write_text('{"schema": 1}')
    with pytest.raises(UserError, match="holds records of another version"):
        Units(tmp_path, IDENTITY, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["holiday.jpg", "index.json"]


@pytest.mark.parametrize("damage", ["shard missing", "shard short", "unit missing", "unit cut", "notes missing"])
def test_a_damaged_unit_is_written_again(damage, tmp_path):
    folder = write_folder(tmp_path / "folder", [[(0, SMALL), (1, WIDE)], [(2, SMALL)]])
    what, how = damage.split()
    (path,) = {"shard": (folder / "shards").glob("00001-*"), "unit": [folder / "units/00001.json"]}.get(
        what, [folder / "notes/00001.json"]
    )
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[:-5])
    units = Units(folder, {"clips": "numbers"}, 2)
    assert units.pending() == [1]
    write_folder(folder, [[(0, SMALL), (1, WIDE)], [(2, SMALL)]])
    assert path.read_bytes() == whole
    assert numbers(folder) == [0, 1, 2]


def test_arrays_that_do_not_fit_together_are_an_error(tmp_path):
    units = Units(tmp_path / "folder", IDENTITY, 1)
    arrays = arrays_of(1)
    del arrays["image"]
    with pytest.raises(ValueError, match="clip 'clip 1' has arrays of"), units.write(0) as writer:
        add(writer, 0)
        writer.add("clip 1", arrays, {})


def test_two_writers_of_one_unit_do_not_mix(tmp_path):
    folder = tmp_path / "folder"
    one, two = Units(folder, IDENTITY, 1), Units(folder, IDENTITY, 1)
    with one.write(0) as first, two.write(0) as second:
        add(first, 0, 1)
        add(second, 5)
    assert one.finish(NULL, FACTS)
    assert numbers(folder) == [5]  # whose block ended first
    assert len(list((folder / "shards").iterdir())) == 1 and hidden(folder) == []


WRITER = """
import sys
from pathlib import Path
from test_units import FACTS, IDENTITY, NULL, Units, fill
units = Units(Path(sys.argv[1]), IDENTITY, int(sys.argv[2]))
print("begins", flush=True)
fill(units, int(sys.argv[3]), int(sys.argv[4]))
units.finish(NULL, FACTS)
"""


def start(folder, count, process=0, processes=1, before="", after=""):
    paths = os.pathsep.join(
        [str(HERE), str(HERE.parent), str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    arguments = map(str, (folder, count, process, processes))
    return subprocess.Popen(
        [sys.executable, "-c", before + WRITER + after, *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_full_disk_is_one_line_and_leaves_no_half_unit(tmp_path):
    folder = tmp_path / "folder"
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    _, err = start(folder, 2, before=limit).communicate(timeout=600)
    last = err.splitlines()[-1]
    assert last.endswith(
        f"UserError: {folder}: cannot be written: File too large; make room there, or choose another destination"
    ), err
    assert sorted(path.name for path in folder.iterdir()) == ["identity.json"]


def test_several_processes_fill_one_folder(tmp_path):
    folder = tmp_path / "folder"
    for process in (running := [start(folder, 9, i, 3) for i in range(3)]):
        assert process.wait(600) == 0, process.communicate()
    assert numbers(folder) == list(range(18))
    assert hidden(folder) == []
    for process in running:
        process.communicate()


@pytest.mark.long
def test_thirty_kills_lose_and_double_nothing(tmp_path):
    """A process writes ten units at most and then stays, however fast the machine is."""
    folder, count = tmp_path / "folder", 400
    rng = random.Random(0)
    stays = (
        "import time, test_units\nfrom functools import partial\ntest_units.fill = partial(test_units.fill, most=10)\n"
    )
    for turn in range(15):
        running = [start(folder, count, i, 2, before=stays, after="time.sleep(10_000)") for i in range(2)]
        for process in running:
            process.stdout.readline()
        while turn == 0 and len(Units(folder, IDENTITY, count).pending()) == count:
            assert running[0].poll() is None
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.03))
        for process in running:
            assert process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert len(hidden(folder)) <= 4, "what was left is swept"
    done = count - len(Units(folder, IDENTITY, count).pending())
    assert 0 < done < count
    fill(Units(folder, IDENTITY, count))
    assert Units(folder, IDENTITY, count).finish(NULL, FACTS)
    assert numbers(folder) == list(range(2 * count))
    whole = tmp_path / "whole"
    fill(units := Units(whole, IDENTITY, count))
    assert units.finish(NULL, FACTS)
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert files == {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
