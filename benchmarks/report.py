"""What the benchmarks' pages have in common."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

END = "<!-- end -->"


def machine(*packages: str) -> str:
    """What this runs on, in general words, with the versions of some packages."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{os.cpu_count()} {platform.machine()} cores, {memory:.0f} GiB of memory, {versions}"


def paste(path: Path, program: str, text: str) -> None:
    """Writes a Markdown file, or replaces what stands between the program's marks in one that has them."""
    old = path.read_text() if path.is_file() else ""
    begin = f"<!-- made by {program} -->"
    before, mark, rest = old.partition(begin)
    after = rest.partition(END)[2] if mark else "\n"
    path.write_text(f"{before if mark else ''}{begin}\n{text}\n{END}{after}")
