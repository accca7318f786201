"""The benchmark of streams runs; times and memory are nobody's business here."""

import importlib
import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("streaming")


def test_it_prints_ratios(benchmark, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{benchmark.BEGIN}\nold\n<!-- end -->\nafter\n")
    benchmark.main(["--num_frames=9", "--rounds=1", "--lengths=", f"--markdown={page}"])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert len(re.findall(r"\*\*\d+\.\d\d\*\* \(\d+\.\d\d-\d+\.\d\d\)", text)) == 4 * 4


def test_a_clip_is_what_it_says(benchmark):
    """One piece of a student that makes whole clips, three of a causal one's; memory is told in bytes."""
    pipe = benchmark.load_pipeline("tiny")
    ways = benchmark.students(benchmark.Chunks(1))
    pieces = {name: [len(frames) for frames in benchmark.clip(pipe, ways[name], 9)] for name in list(ways)[:2]}
    assert list(pieces.values()) == [[9], [1, 4, 4]]
    assert benchmark.memory("tiny", benchmark.STREAMED, 9, benchmark.Chunks(1, window=1)) >= 0
