"""The commands that score clips in a suite's own environment, which cannot be this package's: VBench needs numpy 1."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from vpae_jax.suites.manifest import VIDEOS
from vpae_jax.suites.prompts import Suite

FLICKERING = "temporal_flickering"


def commands(suite: Suite, checkout: Path, output: Path, dimensions: Sequence[str] = (), crop: str = "") -> str:
    """Shell commands, in order.

    Each dimension is a separate run, since a suite writes its results only when the last one is done. VBench measures
    flickering on static videos: its filter keeps up to five per prompt, using a network that the run for dynamic degree
    downloads.

    Args:
      suite: the benchmark.
      checkout: of the suite.
      output: the export's folder.
      dimensions: those whose clips were made; all by default.
      crop: of VBench-I2V's images.
    """

    def quoted(path: Path) -> str:
        return shlex.quote(str(path.resolve()))

    def run(videos: Path, names: Sequence[str]) -> str:
        program, more = ("evaluate_i2v.py", f" --ratio {crop}") if suite.pictures else ("evaluate.py", "")
        call = f"python {program} --videos_path {quoted(videos)}{more} --output_path {quoted(results)} --dimension"
        return f"{call} {names[0]}" if len(names) == 1 else f"for d in {' '.join(names)}; do {call} $d; done"

    results = output / "results"
    wanted = [name for name in suite.dimensions if not dimensions or name in dimensions]
    plain = [name for name in wanted if name != FLICKERING]
    lines = [f"cd {quoted(checkout / suite.folder)}"]
    if plain:
        lines.append(run(output / VIDEOS, plain))
    if FLICKERING in wanted:
        filtered = output / "filtered"
        lines.append(
            f"python static_filter.py --videos_path {quoted(output / VIDEOS)} --result_path {quoted(filtered)}"
        )
        lines.append(run(filtered / "filtered_videos", [FLICKERING]))
    mine = f"--suite={suite.name} --suite-results=NAME={quoted(results)} --output={quoted(output)}"
    return "\n".join([*lines, "", "and then, in this environment", "", f"python -m vpae_jax.evaluate {mine}"])
