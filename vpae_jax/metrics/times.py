"""Time per clip by stage, the total, and the speed-up over the first row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from vpae_jax.metrics.rows import Row

# From a prompt to a file, in order; together they are the whole clip.
STAGES = ("text", "image", "first frame", "network", "decode", "transfer", "write")
EVALUATION, FIRST_CALL, MEMORY = "evaluation", "first call", "peak memory"
ABSENT, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"


def whole(times: Mapping[str, float]) -> float | None:
    """Seconds of a whole clip, over all stages that were timed; None if the network or the decoder was not timed."""
    timed = [times[stage] for stage in STAGES if stage in times]
    return sum(timed) if times.keys() >= {"network", "decode"} else None


def speedup(first: Row, row: Row, of: Literal["network", "whole"]) -> float | None:
    """Speed-up over the first row, of the network alone or of the whole clip; None if it was not timed, or if different
    stages were timed."""
    if of == "network":
        slow, fast = first.times.get("network"), row.times.get("network")
    elif all((stage in first.times) == (stage in row.times) for stage in STAGES):
        slow, fast = whole(first.times), whole(row.times)
    else:
        return None
    return slow / fast if slow and fast else None


def as_json(times: Mapping[str, float]) -> dict[str, float]:
    """Times under names with units: `network_seconds`, `whole_seconds`, `peak_memory_bytes`."""
    found = {name: value for name, value in times.items() if name != MEMORY}
    if (total := whole(times)) is not None:
        found["whole"] = total
    named = {f"{name.replace(' ', '_')}_seconds": value for name, value in found.items()}
    return named | ({"peak_memory_bytes": times[MEMORY]} if MEMORY in times else {})


def time_table(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Columns, and a line per row with its cells and each stage's fraction of the whole. None if nothing was timed."""
    timed = [row for row in rows if row.times]
    if not timed:
        return None
    stages = [stage for stage in STAGES if any(stage in row.times for row in timed)]
    more = [name for name in (EVALUATION, FIRST_CALL, MEMORY) if any(name in row.times for row in timed)]
    lines = []
    for row in timed:
        total = whole(row.times)
        ratios = [speedup(timed[0], row, "network"), speedup(timed[0], row, "whole")]
        cells = [seconds(row.times.get(stage)) for stage in stages] + [seconds(total)]
        cells += [ABSENT if value is None else times_less(value) for value in ratios]
        cells += [gibibytes(row.times.get(name)) if name == MEMORY else seconds(row.times.get(name)) for name in more]
        shares = [row.times.get(stage, 0.0) / total for stage in stages] if total else []
        lines.append({"row": row, "cells": cells, "shares": shares})
    against = f"speed-up over {timed[0].name}"
    columns = [*stages, "whole clip", f"network, {against}", f"whole clip, {against}"]
    columns += ["one evaluation" if name == EVALUATION else name for name in more]
    return {"stages": stages, "columns": columns, "lines": lines}


def seconds(value: float | None) -> str:
    """Seconds with three significant digits."""
    if value is None:
        return ABSENT
    if value >= 100:
        return f"{value:.0f} s"
    return f"{value:.3g} s" if value >= 0.1 else f"{1000 * value:.3g} ms"


def gibibytes(value: float | None) -> str:
    """Bytes as GiB."""
    return ABSENT if value is None else f"{value / 2**30:.3g} GiB"


def times_less(value: float) -> str:
    """A ratio of times."""
    return f"{value:.0f} {TIMES}" if value >= 10 else f"{value:.2g} {TIMES}"
