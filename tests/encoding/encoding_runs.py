"""Runs of `python -m vpae_jax.encode` on small real videos, in this process or in others that may be killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from video_files import numbered, write

from vpae_jax import cli, encode
from vpae_jax.data.records import LatentRecords

ROOT = Path(__file__).parents[2]
FPS = 8  # the tiny model's; its clips have 9 frames, so last 1.125 s
COUNT = 5  # videos that become clips
WAIT = 300  # seconds, on a machine that does much else


def make_videos(folder: Path, count: int, captioned: bool = True) -> Path:
    """Videos of 10 frames and more, of different lengths and contents, with captions beside them."""
    folder.mkdir(parents=True)
    for i in range(count):
        write(folder / f"v{i:03d}.mp4", np.roll(numbered(10 + i % 3), 5 * i, axis=2), fps=FPS)
        if captioned:
            (folder / f"v{i:03d}.txt").write_text(f"clip {i}")
    return folder


def add_bad_videos(folder: Path) -> dict[str, str]:
    """Three that are refused; their kinds by name."""
    write(folder / "still.mp4", np.repeat(numbered(1), 12, axis=0), fps=FPS)
    write(folder / "short.mp4", numbered(5), fps=FPS)
    (folder / "torn.mp4").write_bytes((folder / "v000.mp4").read_bytes()[:700])
    for name in (kinds := {"still.mp4": "static", "short.mp4": "too short", "torn.mp4": "unreadable"}):
        (folder / name).with_suffix(".txt").write_text("a caption")
    return kinds


def command(arguments: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in arguments.items()]


def call(capsys, **arguments) -> tuple[int, list[str], list[str]]:
    """Runs the program in this process; its exit status, and the lines it printed and said on standard error."""
    code = 0
    try:
        cli.run(encode.main, command(arguments))
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err.splitlines()


def start(before: str = "", **arguments) -> subprocess.Popen:
    """Starts the program as a leader of a session of its own, after some Python has run in its process."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = f"{before}\nimport runpy, sys; sys.argv[0] = 'encode'\nrunpy.run_module('vpae_jax.encode', None, '__main__')"
    return subprocess.Popen(
        [sys.executable, "-c", run, *command(arguments)],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def living(session: int) -> list[int]:
    """The processes of a session, zombies left out, which wait for no more than to be counted."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split() if entry.name.isdecimal() else []
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields and int(fields[3]) == session and fields[0] != "Z":
            found.append(int(entry.name))
    return found


def wait_until(true, seconds: float = WAIT) -> bool:
    """Whether `true()` has come to be so."""
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.001)
    return bool(found)


def hidden(folder: Path) -> list[str]:
    return [name for _, folders, names in os.walk(folder) for name in folders + names if name.startswith(".")]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def contents(folder: Path) -> dict[str, dict]:
    """What each record holds, by its id; each comes once."""
    records = LatentRecords(folder)
    records.verify()
    found = {}
    for i in range(len(records)):
        about = records.about(i)
        assert about["id"] not in found, f"{about['id']} is there twice"
        found[about["id"]] = {**records[i], "about": about}
    return found


def same(one: Path, two: Path) -> bool:
    """Whether two folders hold the same, whatever process wrote them."""
    found, expected = contents(one), contents(two)
    assert found.keys() == expected.keys()
    for id, record in found.items():
        for name, value in record.items():
            assert np.array_equal(value, expected[id][name]), (id, name)
    return True
