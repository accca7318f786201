"""A plan as a page of text."""

from __future__ import annotations

from collections.abc import Sequence

from vpae_jax.planning.chips import GIB, MIB
from vpae_jax.planning.result import Plan
from vpae_jax.planning.search import SearchResult

BAR = 40


def page(plan: Plan) -> str:
    """The whole plan, at most 100 columns wide."""
    parts = [_head(plan), _memory(plan), _host(plan), _programs(plan), _communication(plan), _step(plan)]
    return "\n\n".join(part for part in parts if part)


def proposal(found: SearchResult) -> str:
    """The result of a search as text."""
    rows = [["setting", "expected", "", "compiled", "", "outcome"]]
    for t in found.tried:
        s = t.setting
        layout = f"fsdp {s.fsdp} x context {s.context}, {_parts(s.accumulation)}, remat {s.remat}"
        rows.append(
            [
                layout,
                "-" if t.expected is None else _gib(t.expected[0]),
                "-" if t.expected is None else f"{t.expected[1]:.3g} s",
                "-" if t.total is None else _gib(t.total),
                "-" if t.seconds is None else f"{t.seconds:.3g} s",
                t.outcome,
            ]
        )
    lines = [f"search over {found.settings} settings", *_table(rows, "<>>>><")]
    if found.plan is None:
        lines.append("none of these fits: use more devices, or raise --tries")
    else:
        lines.append(f"fastest of those that fit: {found.plan.setting.flags}")
    return "\n".join(lines)


def _head(plan: Plan) -> str:
    s, clip = plan.setting, plan.clip
    return (
        f"{plan.phase} on {plan.topology}: {plan.devices} x {plan.chip.description}\n"
        f"{plan.batch_size} clips per step, each {clip.frames} frames of {clip.width} x {clip.height}, "
        f"{clip.tokens:,} tokens\n"
        f"mesh data {s.data} x fsdp {s.fsdp} x context {s.context} x tensor {s.tensor}, "
        f"batch in {_parts(s.accumulation)}, remat {s.remat}"
    )


def _parts(accumulation: int) -> str:
    return f"{accumulation} part{'s' * (accumulation != 1)}"


def _memory(plan: Plan) -> str:
    capacity = plan.chip.capacity
    lines = ["memory of one device"]
    for kind, size in plan.memory.items():
        if size is None:
            lines.append(f"  {kind:<12} {'unknown':>12}")
        else:
            lines.append(f"  {kind:<12} {_gib(size):>12} {size / capacity:>8.1%}  {_bar(size / capacity)}")
    if plan.total is not None:
        lines.append(
            f"  {'total':<12} {_gib(plan.total):>12} {plan.total / capacity:>8.1%}  {_bar(plan.total / capacity)}"
        )
    lines.append(f"  {'capacity':<12} {_gib(capacity):>12}           {_verdict(plan)}")
    if plan.peak is not None:
        lines.append(f"  {'at its peak':<12} {_gib(plan.peak):>12} {plan.peak / capacity:>8.1%}  by XLA's own count")
    if plan.tiled:
        lines.append(
            "  warning: attention runs in slow plain tiles, as the chip's kernel does not support this setting"
        )
    if plan.rematerialised:
        lines.append(
            f"  warning: to save memory, XLA rematerialises {plan.rematerialised} instructions; smaller parts of the "
            "batch, a\n  larger context or more devices avoid this"
        )
    return "\n".join(lines)


def _host(plan: Plan) -> str:
    total, capacity = sum(plan.host.values()), plan.chip.host.memory
    parts = " + ".join(f"{name} {_gib(size)}" for name, size in plan.host.items() if size)
    verdict = "" if total <= capacity else f"; DOES NOT FIT by {_gib(total - capacity)}"
    return f"memory of one host: {parts}, of {_gib(capacity)}{verdict}"


def _verdict(plan: Plan) -> str:
    capacity = plan.chip.capacity
    if plan.fits and plan.total is not None:
        return f"FITS, {_gib(capacity - plan.total)} to spare"
    refused = f"; the compiler rejected {', '.join(plan.refused)}" if plan.refused else ""
    if plan.total is not None and plan.total <= capacity and not plan.refused:
        return "DOES NOT FIT into the memory of the hosts"
    over = "" if plan.total is None or plan.total <= capacity else f" by {_gib(plan.total - capacity)}"
    return f"DOES NOT FIT{over}{refused}"


def _programs(plan: Plan) -> str:
    rows = [["program", "per step", "reads", "makes", "PFLOP", "again", "FLOP/byte", "seconds", "waits for"]]
    for p in plan.programs:
        held, time = p.footprint, p.time
        rows.append(
            [
                p.name,
                f"{p.calls:g} x",
                "-" if held is None else _gib(held.arguments),
                "rejected" if held is None else _gib(held.temporaries),
                f"{p.work.flops / 1e15:.3g}",
                f"{p.work.recomputed / max(p.work.flops, 1):.0%}",
                f"{p.work.flops / plan.devices / max(p.memory_bytes, 1):.0f}",
                "-" if time is None else f"{time.overlapped:.3g} to {time.serial:.3g}",
                "-" if time is None else time.bound,
            ]
        )
    return "\n".join(["programs (memory of one device; FLOPs of all)", *_table(rows, "<>>>>>>><")])


def _communication(plan: Plan) -> str:
    rows = [["program", "collective", "along", "times", "sends"]]
    for p in plan.programs:
        for c in p.communication.collectives if p.communication else ():
            rows.append([p.name, c.kind, " x ".join(c.axes), f"{c.count:,}", _gib(c.bytes)])
    if len(rows) == 1:
        return ""
    return "\n".join(["communication of one device, for one run of each program", *_table(rows, "<<<>>")])


def _step(plan: Plan) -> str:
    best, worst = plan.step(False), plan.step(True)
    if best is None or worst is None:
        return ""
    mfu = f"{plan.mfu(True) or 0:.0%} to {plan.mfu(False) or 0:.0%}"
    hours = plan.device_hours(False) or 0
    return (
        f"one step: {best:.3g} s if communication is hidden, {worst:.3g} s if it is not\n"
        f"          {plan.model_flops / 1e15:.3g} PFLOP, nothing counted twice; MFU {mfu}; "
        f"{plan.batch_size / worst:.3g} to {plan.batch_size / best:.3g} clips/s\n"
        f"the run:  {plan.steps:,} steps, at least {hours / plan.devices:,.3g} hours, {hours:,.0f} device hours"
    )


def _gib(size: int | float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB or not size else f"{size / MIB:.2f} MiB"


def _bar(share: float) -> str:
    full = min(round(share * BAR), BAR)
    return "#" * full + "." * (BAR - full) + (" >" if share > 1 else "")


def _table(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(sides))]
    return [
        (
            "  " + "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
