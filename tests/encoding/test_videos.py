"""Clips from videos: order, names, what is said of them, and workers that die."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import failing_tasks
import numpy as np
import passing_tasks
import pytest
from encoding_runs import wait_until
from video_files import numbered, numbers, write

from vpae_jax.encoding import videos
from vpae_jax.encoding.clip_source import CaptionedVideo, Clip, ClipSource, Reject
from vpae_jax.encoding.decoding import read_frames
from vpae_jax.encoding.filters import Filters
from vpae_jax.encoding.pool import Lost, Pool
from vpae_jax.encoding.videos import VideoClips
from vpae_jax.types import UserError

BUCKETS = ((48, 64), (64, 48))


class Listed:
    """Entries and rejects, `size` a unit."""

    def __init__(self, *items: CaptionedVideo | Reject, size: int = 100):
        self.items, self.size = items, size

    @property
    def root(self) -> Path:
        folders = [item.path.parent for item in self.items if isinstance(item, CaptionedVideo)]
        return Path(os.path.commonpath(folders)) if folders else Path()

    @property
    def units(self) -> int:
        return -(-len(self.items) // self.size)

    def rows_of(self, unit: int) -> int:
        return len(self.items[unit * self.size : (unit + 1) * self.size])

    def read(self, unit: int):
        yield from self.items[unit * self.size : (unit + 1) * self.size]

    @property
    def identity(self) -> dict:
        return {"listed": "some"}


def of_unit(clips: VideoClips, unit: int) -> list[Clip | Reject]:
    *found, end = clips.read([unit])
    assert end is None
    return [item for item in found if item]


def entry(path: Path, **settings) -> CaptionedVideo:
    return CaptionedVideo(**{"id": path.stem, "path": path, "caption": "a caption", **settings})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("videos")
    write(path / "long.mp4", numbered(96), g="12", bf="2")
    write(path / "tall.mp4", numbered(24, 64, 48))
    write(path / "short.mp4", numbered(5))
    write(path / "still.mp4", np.repeat(numbered(86)[-1:], 24, 0))
    write(path / "black.mp4", numbered(24) // 16)
    (path / "text.mp4").write_text("a text")
    return path


def entries(folder: Path) -> list[CaptionedVideo | Reject]:
    return [
        entry(folder / "long.mp4", about={"score": 0.5}, caption="ein Bär 🐻"),
        Reject("row 2", "caption", "has none"),
        entry(folder / "text.mp4"),
        entry(folder / "tall.mp4"),
        entry(folder / "short.mp4"),
        entry(folder / "still.mp4"),
        entry(folder / "long.mp4", id="cut", cuts=(1.0, 2.5, 3.0), start=0.5, end=4.0),
        entry(folder / "none.mp4", id="no caption", caption=" "),
        entry(folder / "black.mp4"),
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_and_rejects_in_order(folder, workers):
    manifest = Listed(*entries(folder))
    with VideoClips(manifest, BUCKETS, 17, clips_per_video=3, workers=workers) as clips:
        assert isinstance(clips, ClipSource) and clips.units == 1
        for _ in range(2):
            found = of_unit(clips, 0)
            assert [(item.id, item.kind if isinstance(item, Reject) else "") for item in found] == [
                ("long#0", ""),
                ("long#1", ""),
                ("long#2", ""),
                ("row 2", "caption"),
                ("text", "unreadable"),
                ("tall#0", ""),
                ("short", "too short"),
                ("still#0", "static"),
                ("cut#0", ""),
                ("cut#1", ""),
                ("no caption", "caption"),
                ("black#0", "black"),
            ]
            first, tall, cut, last = found[0], found[5], found[8], found[9]
            assert all(isinstance(item, Clip) for item in (first, tall, cut, last))
            assert first.video.shape == (17, 48, 64, 3) and tall.video.shape == (17, 64, 48, 3)
            start = first.about["start"]
            np.testing.assert_array_equal(first.video, read_frames(folder / "long.mp4", start, 17, 16.0, 48, 64))
            assert numbers(cut.video) == list(range(20, 37))  # in the shot from 1 to 2.5 s, the middle
            assert numbers(last.video) == [*range(48, 64), 63]  # the shot from 3 to 4 s, and nothing of what follows
            assert first.caption == "ein Bär 🐻"
            assert isinstance(found[7], Reject) and found[7].picture is not None
            assert "short.mp4" not in found[6].reason and "lasts 0.312 s; a clip needs 1.000 s" in found[6].reason
            about = json.loads(json.dumps(first.about))
            assert about.items() >= {"video": "long.mp4", "bucket": [48, 64], "fps": 16.0}.items()
            assert about["row"] == {"score": 0.5} and "row" not in tall.about
            assert about["source"] == {"height": 48, "width": 64, "fps": 16.0, "codec": "h264"}
            assert about["motion"] > 1 and set(about) >= {"brightness", "contrast", "black"}


def test_a_caption_that_does_not_fit_is_refused_before_its_video_is_looked_at(folder, monkeypatch):
    looked = []
    tasks = videos.worker_tasks
    look = lambda path: looked.append(path.name) or tasks.look(path)  # noqa: E731
    monkeypatch.setattr(videos, "worker_tasks", SimpleNamespace(look=look, read=tasks.read))
    listed = Listed(
        entry(folder / "long.mp4", caption="far too long"),
        entry(folder / "tall.mp4"),
        entry(folder / "none.mp4", caption=""),
    )
    unfit = lambda caption: ("caption", "too many words") if len(caption.split()) > 2 else None  # noqa: E731
    with VideoClips(listed, BUCKETS, 9, clips_per_video=3, workers=0, unfit=unfit) as clips:
        assert [(item.id, getattr(item, "reason", "")) for item in of_unit(clips, 0)] == [
            ("long", "too many words"),
            ("tall#0", ""),
            ("tall#1", ""),
            ("none", "caption has 0 characters, expected at least 1 (--min_caption)"),
        ]
    assert looked == ["tall.mp4"]


def test_units_are_read_by_themselves(folder):
    manifest = Listed(*entries(folder), size=4)
    with VideoClips(manifest, BUCKETS, 9) as clips:
        assert clips.units == 3
        one_by_one = [item.id for unit in (2, 0, 1) for item in of_unit(clips, unit)]
        assert sorted(one_by_one) == sorted(item.id for item in clips.read(range(3)) if item)


def test_the_next_unit_is_decoded_before_the_last_clips_of_one_are_taken(folder):
    """Else workers would idle at each unit's end."""
    begun = []

    class Watched(Listed):
        def read(self, unit: int):
            begun.append(unit)
            yield from super().read(unit)

    with VideoClips(Watched(*entries(folder), size=2), BUCKETS, 9, workers=2) as clips:
        reading = clips.read(range(clips.units))
        assert next(reading) is not None and begun[:2] == [0, 1]
        assert [item is None for item in reading].count(True) == clips.units == 5


def test_identity_is_what_decides_the_clips_and_nothing_else(folder):
    one = VideoClips(Listed(), BUCKETS, 17, workers=1, timeout=5.0)
    other = VideoClips(Listed(), BUCKETS, 17, workers=4)
    assert one.identity == other.identity and one.identity["manifest"] == {"listed": "some"}
    different = [
        VideoClips(Listed(), BUCKETS[:1], 17),
        VideoClips(Listed(), BUCKETS, 21),
        VideoClips(Listed(), BUCKETS, 17, fps=8.0),
        VideoClips(Listed(), BUCKETS, 17, filters=Filters(min_motion=1.0)),
        VideoClips(Listed(), BUCKETS, 17, stride=1.0),
        VideoClips(Listed(), BUCKETS, 17, clips_per_video=2),
    ]
    assert len({json.dumps(each.identity) for each in (one, *different)}) == 7


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"frames": 16}, "clips of 16 frames: expected 1"),
        ({"frames": 0}, "clips of 0 frames"),
        ({"frames": 17, "fps": 0.0}, "fps is 0.0; expected a positive number"),
        ({"frames": 17, "stride": -1.0}, "stride is -1.0"),
        ({"frames": 17, "clips_per_video": 0}, "clips_per_video is 0"),
        ({"frames": 17, "workers": -1}, "workers is -1"),
        ({"frames": 17, "buckets": ()}, "no buckets"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        VideoClips(Listed(), **{"buckets": BUCKETS, **settings})


def test_a_worker_that_dies_costs_one_video(tmp_path, monkeypatch):
    names = ["a", "abort", "b", "exit", "c", "hang", "d", "raise", "e", "stop", "f"]
    paths = [write(tmp_path / f"{name}.mp4", numbered(24)) for name in names]
    monkeypatch.setattr(videos, "worker_tasks", failing_tasks)
    with VideoClips(Listed(*map(entry, paths)), BUCKETS, 9, timeout=5.0) as clips:
        found = of_unit(clips, 0)
    kinds = {"abort": "crashed", "exit": "crashed", "hang": "timeout", "raise": "crashed", "stop": "timeout"}
    assert [item.id.split("#")[0] for item in found] == names
    assert [getattr(item, "kind", None) for item in found] == [kinds.get(name) for name in names]
    reasons = {item.id: item.reason for item in found if isinstance(item, Reject)}
    assert reasons["abort"] == "abort.mp4 the decoder died of SIGABRT"
    assert reasons["exit"] == "exit.mp4 the decoder died of status 3"
    assert reasons["hang"] == "hang.mp4 took more than 5 s"
    assert reasons["raise#0"] == "raise.mp4 the decoder failed: has expected"


@pytest.mark.parametrize("workers", [1, 3])
def test_what_may_have_passed_is_tried_once_more_alone(tmp_path, monkeypatch, workers):
    names = ["a", "killed looking", "b", "killed reading", "c", "broken once", "d", "broken for good", "e", "f", "g"]
    paths = [write(tmp_path / f"{name}.mp4", numbered(48)) for name in names]
    monkeypatch.setattr(videos, "worker_tasks", passing_tasks)
    with VideoClips(Listed(*map(entry, paths)), BUCKETS, 9, clips_per_video=2, workers=workers) as clips:
        found = [item for item in clips.read([0]) if item]
    assert [item.id for item in found] == [f"{name}#{number}" for name in names for number in (0, 1)]
    assert [(item.id, item.kind, item.reason) for item in found if isinstance(item, Reject)] == [
        (f"broken for good#{i}", "unreadable", "broken for good.mp4 cannot be read: input/output error") for i in (0, 1)
    ]
    tries = passing_tasks.tries(tmp_path)
    assert {name: [len(each) for each in some] for name, some in tries.items()} == {
        **{name: [1, 1, 1] for name in "abcdefg"},
        "killed looking": [2, 1, 1],
        **{name: [1, 2, 2] for name in ("killed reading", "broken once", "broken for good")},
    }
    assert not any(each[1] for some in tries.values() for each in some if len(each) > 1), "others were under way"


def test_what_the_system_does_not_read_is_tried_again_by_this_process_too(folder, monkeypatch):
    asked = []

    def look(path):
        asked.append(path)
        if len(asked) == 1:
            return tasks.look(Path("/proc/self/mem"))  # its first byte cannot be read: EIO
        return tasks.look(path)

    tasks = videos.worker_tasks
    monkeypatch.setattr(videos, "worker_tasks", SimpleNamespace(look=look, read=tasks.read))
    with VideoClips(Listed(entry(folder / "long.mp4")), BUCKETS, 9, workers=0) as clips:
        (clip, _) = clips.read([0])
    assert isinstance(clip, Clip) and asked == [folder / "long.mp4"] * 2


def workers_of(pool: Pool) -> list[int]:
    return [worker.process.pid for worker in pool._workers]


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for counts as well."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_arrays_are_the_callers_and_outlive_their_worker():
    pool = Pool(1, 600.0)
    array, pid = pool.submit(failing_tasks.fill, 7, shape=(3, 4, 5)).result()
    assert pid == workers_of(pool)[0] != os.getpid()
    for shape in ((2, 2), (50, 40), (3, 4, 5)):
        other, again = pool.submit(failing_tasks.fill, 9, shape=shape).result()
        assert again == pid and other.shape == shape and (other == 9).all()
    pool.close()
    assert gone(pid)
    assert (array == 7).all() and array.shape == (3, 4, 5)


def test_memory_of_clips_is_given_back():
    """Thirty arrays of 20 MB, each dropped before the next: no more descriptors or memory than at the start."""

    def held() -> tuple[int, int]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGESIZE")

    pool = Pool(1, 600.0)
    pool.submit(failing_tasks.fill, 1, shape=(20_000_000,)).result()
    gc.collect()
    files, memory = held()
    for i in range(30):
        array, _ = pool.submit(failing_tasks.fill, i, shape=(20_000_000,)).result()
        assert array[-1] == i
        del array
    files_after, memory_after = held()
    pool.close()
    assert files_after <= files and memory_after < memory + 60_000_000


def test_workers_do_not_load_jax():
    pool = Pool(1, 600.0)
    loaded = pool.submit(failing_tasks.modules).result()
    pool.close()
    assert "av" in loaded and not {name for name in loaded if name.partition(".")[0] in ("jax", "jaxlib", "flax")}


def test_closing_does_not_wait_for_what_hangs():
    pool = Pool(2, 600.0)
    futures = [pool.submit(time.sleep, 600.0) for _ in range(5)]
    while not (pids := workers_of(pool)):
        time.sleep(0.01)
    begun = time.monotonic()
    pool.close()
    assert time.monotonic() - begun < 300 and all(map(gone, pids))
    assert all(future.cancelled() or isinstance(future.exception(), Lost) for future in futures)


def test_a_forgotten_pool_ends_its_workers():
    pool = Pool(1, 600.0)
    pool.submit(failing_tasks.modules).result()
    pids = workers_of(pool)
    del pool
    gc.collect()
    assert pids and all(map(gone, pids))


def test_a_reader_that_stops_early_leaves_a_pool_that_works(folder):
    with VideoClips(Listed(*entries(folder)), BUCKETS, 9, clips_per_video=3) as clips:
        reading = clips.read([0])
        assert isinstance(next(reading), Clip)
        reading.close()
        assert len(of_unit(clips, 0)) == len(of_unit(clips, 0)) > 9


PARENT = """
import sys, time
from pathlib import Path
from vpae_jax.encoding import pool
import failing_tasks
pool.ORPHAN = 1 / 600  # a task of more than a second ends a worker
some = pool.Pool(1, 600.0)
{task}
while not some._workers:
    time.sleep(0.01)
print(*[worker.process.pid for worker in some._workers], flush=True)
time.sleep(600)
"""
TASKS = {
    "idle": "some.submit(failing_tasks.modules).result()",
    "hanging": "some.submit(failing_tasks.hang, Path(sys.argv[1]))",
}


@pytest.mark.parametrize("task", TASKS)
def test_workers_end_when_their_parent_is_killed(task, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", PARENT.format(task=TASKS[task]), tmp_path / "begun"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        if task == "hanging":
            assert wait_until((tmp_path / "begun").exists)
        parent.send_signal(signal.SIGKILL)
    assert wait_until(lambda: gone(pid))
