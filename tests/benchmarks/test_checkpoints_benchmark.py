"""The benchmark of checkpoints runs, and leaves checksums out where it says so; times are nobody's business here."""

import importlib
import re
from pathlib import Path

import jax
import pytest

from vpae_jax.train import checksums

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("checkpoints")
    monkeypatch.setattr(module, "WIDTH", 32)
    return module


def test_it_prints_ratios(benchmark, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{benchmark.BEGIN}\nold\n<!-- end -->\nafter\n")
    benchmark.main([f"--folder={tmp_path}", "--gib=0.0001", "--rounds=2", f"--markdown={page}"])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert len(re.findall(r"\*\*\d+\.\d\d\*\* \(\d+\.\d\d-\d+\.\d\d\)", text)) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


def test_checksums_are_left_out_and_put_back(benchmark, tmp_path):
    (tmp_path / "process_0").write_text("x")
    with benchmark.without_checksums():
        assert checksums.of_process(tmp_path, 0) == {}
        checksums.write(tmp_path, [])
        assert checksums.fault(tmp_path, 0, 1) is None
    assert set(checksums.of_process(tmp_path, 0)) == {"process_0"} and checksums.fault(tmp_path) is not None


def test_nothing_in_a_state_is_stored_as_nothing(benchmark):
    leaves = [leaf for leaf in jax.tree.leaves(benchmark.make_state(10_000)) if leaf.ndim == 2]
    assert len(leaves) >= 3 and all(bool(leaf.any()) for leaf in leaves)
