"""The benchmark of a clip runs, and times all its stages; how long they take is nobody's business here."""

import importlib
import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.mark.long
def test_all_stages_of_both_are_timed(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    clip, page = importlib.import_module("clip"), tmp_path / "page.md"
    page.write_text(f"before\n{clip.BEGIN}\nold\n<!-- end -->\nafter\n")
    clip.main(["--rounds=1", f"--markdown={page}"])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()}
    for stage in clip.STAGES:
        assert len(re.findall(r"\*\*\d+\.\d\d\*\* \(\d+\.\d\d-\d+\.\d\d\)", lines[stage])) == 2
