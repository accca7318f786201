"""Output of the benchmarks: a general description of the machine, tables of ratios, and pasting them into files."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

GIB = 2**30
END = "<!-- end -->"


def machine(*packages: str) -> str:
    """A general description of this machine, and the versions of the packages that are installed."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    found = ", ".join(f"{name} {number}" for name in packages if (number := _version(name)))
    return f"{os.cpu_count()} {platform.machine()} cores, {memory:.0f} GiB of memory, {found}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Median of the rounds' ratios, and their range."""
    found = sorted(one / other for one, other in zip(ours, theirs, strict=True))
    return f"**{statistics.median(found):.2f}** ({found[0]:.2f}-{found[-1]:.2f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def paste(path: Path, text: str, begin: str) -> None:
    """Writes a Markdown file; in a file with the marks `begin` and `END`, replaces the text between them."""
    old = path.read_text() if path.is_file() else ""
    before, mark, rest = old.partition(begin)
    after = rest.partition(END)[2] if mark else "\n"
    path.write_text(f"{before if mark else ''}{begin}\n{text}\n{END}{after}")


def progress(line: str) -> None:
    """Prints progress to standard error; on a terminal, each line replaces the previous one."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
    elif line:
        print(line, file=sys.stderr, flush=True)
