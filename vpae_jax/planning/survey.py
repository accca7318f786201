"""Makes the table of plans: every large preset on every kind of machine, one plan per row.

    python -m vpae_jax.planning.survey --output=runs/plans [--table=docs/plans.md] [--topologies=h100:8,v5p:2x2x4]

A row is one run of `vpae_jax.plan --json` in a separate process, and one with `--search` if the preset's own setting
does not fit; it is saved as a JSON file as soon as it is finished. A repeated command resumes where it stopped and
reuses existing files. The most important rows come first. Rows whose compiler is not installed are left out, with a
note.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vpae_jax import cli
from vpae_jax.files import write_text
from vpae_jax.planning.chips import GIB
from vpae_jax.types import UserError

PRESETS = ("i2v-14b-720p", "i2v-14b-480p", "t2v-14b-720p", "t2v-14b-480p", "t2v-1.3b-480p")
PHASES = ("phase2", "phase1")
# The configs that the paper compares with, planned only for the paper's own preset on these machines.
MATCHING, CONSISTENCY = ("dmd2", "dmd2v", "kd", "magic"), ("lcm", "pcm", "dcm_semantic", "dcm_detail")
OTHERS = (*MATCHING, *CONSISTENCY, "add", "apt", "aad", "pose1", "pose2", "phase2_pixels", "add_pixels")
MACHINES = ("h100:8", "h200:8", "h20:32")
# Causal students, in both sizes.
CAUSAL = ("causal_init", "causal_ode", "self_forcing", "asd")
CAUSAL_PRESETS, CAUSAL_MACHINES = ("t2v-1.3b-480p", "i2v-14b-720p"), ("h100:8", "v5p:2x2x4")
TOPOLOGIES = ("h100:8", "h200:8", "h20:32", "h100:32", "v5p:2x2x4", "v6e:8x8", "tpu7x:2x2x4")
HEAD = (
    "| preset | config | devices | layout | memory per device | step | MFU | device hours |\n"
    "|---|---|---|---|---|---|---|---|\n"
)


def rows(topologies: Sequence[str] = TOPOLOGIES) -> Iterator[tuple[str, str, str]]:
    """(preset, config, topology) of every row, the most important first."""
    for preset in PRESETS:
        for name in topologies:
            for config in PHASES:
                yield preset, config, name
    for config in OTHERS:
        for name in MACHINES:
            if name in topologies:
                yield PRESETS[0], config, name
    for preset in CAUSAL_PRESETS:
        for config in CAUSAL:
            for name in CAUSAL_MACHINES:
                if name in topologies:
                    yield preset, config, name


def run(preset: str, config: str, name: str) -> dict[str, Any]:
    """Makes one row's plan. Raises `UserError` with the planner's own message if it fails."""
    command = [sys.executable, "-m", "vpae_jax.plan", f"--config=configs/{config}.py:{preset}", f"--topology={name}"]
    plan: dict[str, Any] = {}
    for more in ([], ["--search"]):
        ended = subprocess.run([*command, "--json", *more], capture_output=True, text=True, check=False)
        if ended.returncode:
            lines = ended.stderr.strip().splitlines() or ["no message"]
            raise UserError(f"{preset} {config} {name}: {lines[-1].removeprefix('error: ')}")
        plan = json.loads(ended.stdout)
        if plan["fits"]:
            break
    return plan


def line(plan: dict[str, Any], preset: str, config: str) -> str:
    """A plan as a row of the table, with the setting that the search found, if any, else the preset's own."""
    best = (plan.get("search") or {}).get("plan") or plan
    s, step = best["setting"], best["step"]
    layout = f"fsdp {s['fsdp']} x context {s['context']}, {s['accumulation']} parts, remat {s['remat']}"
    size = "unknown" if best["total"] is None else f"{best['total'] / GIB:.1f}"
    memory = f"{size} of {best['chip']['capacity'] / GIB:.1f} GiB, {'fits' if best['fits'] else 'does not fit'}"
    seconds = mfu = hours = "-"
    if step["seconds_overlapped"] is not None:
        seconds = f"{step['seconds_overlapped']:.1f} to {step['seconds_serial']:.1f} s"
        mfu = f"{step['mfu_serial']:.0%} to {step['mfu_overlapped']:.0%}"
        hours = f"{best['run']['device_hours_overlapped']:,.0f}"
    where = f"{plan['devices']} x {plan['chip']['name']} ({plan['topology']})"
    return f"| {preset} | {config} | {where} | {layout} | {memory} | {seconds} | {mfu} | {hours} |\n"


def main(argv: Sequence[str]) -> None:
    parser = cli.Parser("python -m vpae_jax.planning.survey", __doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the rows' JSON files")
    parser.add_argument("--table", type=Path, help="file for the table; by default plans.md in the folder")
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES), help="topologies, separated by commas")
    args = parser.parse_args(list(argv))
    args.output.mkdir(parents=True, exist_ok=True)
    table = HEAD
    for preset, config, name in rows(args.topologies.split(",")):
        kept = args.output / f"{preset}_{config}_{name.replace(':', '_')}.json"
        if not kept.exists():
            print(f"{preset} {config} {name}", file=sys.stderr, flush=True)
            try:
                write_text(kept, json.dumps(run(preset, config, name), indent=2) + "\n")
            except UserError as error:
                print(f"left out: {error}", file=sys.stderr, flush=True)
                continue
        table += line(json.loads(kept.read_text()), preset, config)
        write_text(args.table or args.output / "plans.md", table)


if __name__ == "__main__":
    cli.run(main)
