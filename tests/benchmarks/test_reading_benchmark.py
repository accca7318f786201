"""The benchmark of reading clips runs, and reads the same clips; how long it takes is nobody's business here."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest

from vpae_jax.media import write_video
from vpae_jax.types import UserError

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def reading(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("reading")


@pytest.fixture
def video(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (96, 48, 64, 3), np.uint8)
    write_video(tmp_path / "clip.mp4", frames, 24.0)
    return tmp_path / "clip.mp4"


def test_both_read_the_same_clips(reading, video):
    spans = reading.ours((video, video), 4, (48, 64), 17, 1)
    assert len(spans) == 4
    for path, start, end in spans:
        assert path == video and end - start == 17 / 16
        assert reading.plain((path, start, end)) in (25, 26)  # 17 / 16 s of 24 frames a second


def test_it_prints_ratios(reading, video, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{reading.BEGIN}\nold\n<!-- end -->\nafter\n")
    options = ["--clips=2", "--frames=17", "--bucket=48x64", "--workers=1", "--rounds=1", f"--markdown={page}"]
    reading.main([str(video), *options])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert len(re.findall(r"\*\*\d+\.\d\d\*\* \(\d+\.\d\d-\d+\.\d\d\)", text)) == 6


def test_a_video_that_gives_no_clip_is_one_line(reading, tmp_path):
    (tmp_path / "text.mp4").write_text("a text")
    with pytest.raises(UserError, match=r"cannot be decoded.*; leave it out"):
        reading.main([str(tmp_path / "text.mp4"), "--rounds=1"])
