"""Scores generators against each other and against real clips, on clips that were not used for training.

    python -m vpae_jax.evaluate --model=DIR [--phase1=WORKDIR] [--phase2=WORKDIR] --output=DIR [--count=N]
    python -m vpae_jax.evaluate --model=DIR --run=NAME=WORKDIR --compare=NAME=DIR:4:1 --lora=NAME=FILE:1:1 --output=DIR
    python -m vpae_jax.evaluate --model=DIR --records=DIR --compare=... --output=DIR
    python -m vpae_jax.evaluate --model=DIR --prompts=FILE [--images=DIR] --compare=... --output=DIR
    python -m vpae_jax.evaluate --suite=vbench|vbench_i2v|vbench2 ...    a public benchmark; --suite=vbench --help

The clips are the held-out ones of the records that the runs were trained on, rendered digits if there are none, or all
clips in the folders that --records names. With --prompts there are no real clips: the first row's serve as the
reference. The model is sampled with all its steps and with one; the flags name the other rows. For a causal model,
STEPS may be N,M: for the first chunk and for each later one. All rows get the same conditions and noise. Metrics whose
package is not installed are omitted, with a note: `pip install "vpae_jax[evaluate]"` adds them (docs/evaluation.md).

A repeated command resumes where it stopped and generates no clip twice; rows may be added later. Several processes
share the clips if each is told its index (--process_id and --num_processes, or SLURM's or JAX's variables) and all see
the folder; the last one to finish writes the report. Writes

    metrics.json    every score of every row and of the real clips, with 95% intervals over clips, per-frame curves, the
                    number of network evaluations, and the seconds per clip by stage
    samples/        the first clips of every row, as mp4 and png
    report.html     one page with all of it, and with the training curves of the runs; many clips go to report_files/
    clips/          every clip as mp4, its latents and its measurements; may be deleted
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import environ
from pathlib import Path
from typing import get_args

import jax

from vpae_jax import cli, tasks
from vpae_jax.config import DataConfig, build, parse, parse_sources
from vpae_jax.config_files import bundled, load
from vpae_jax.configs.common import PRESETS
from vpae_jax.evaluation import prompts
from vpae_jax.evaluation.making import Making, Opened, Share, unmade
from vpae_jax.evaluation.rows import Entry, check_names, parse_entry, parse_lora, parse_run
from vpae_jax.evaluation.scoring import Scored, captions_of, score
from vpae_jax.files import is_address, resolve
from vpae_jax.flow.sampler import Solver, parse_steps
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.metrics import extras
from vpae_jax.metrics.archive import Shelf
from vpae_jax.metrics.report import write_report
from vpae_jax.metrics.results import NAIVE, headline, table, write_metrics, write_samples
from vpae_jax.metrics.rows import Report, Run
from vpae_jax.run import guard
from vpae_jax.run.agreement import digest_of_code
from vpae_jax.run.workdir import PastRun
from vpae_jax.run.workdir import read_run as read_past_run
from vpae_jax.runtime import distributed
from vpae_jax.runtime.platforms import compute_dtype
from vpae_jax.suites import cli as suites
from vpae_jax.tasks.base import Task
from vpae_jax.train.checkpoint import CONFIG_FILE
from vpae_jax.train.metrics import read_metrics
from vpae_jax.types import UserError
from vpae_jax.weights.filenames import PRODUCT


def parser() -> cli.Parser:
    """The command line."""
    result = cli.Parser("python -m vpae_jax.evaluate", __doc__)
    add = result.add_argument
    add("--model", default="tiny", help="model directory of the many-step model, or 'tiny'")
    add(
        "--steps",
        type=partial(parse_steps, name="--steps"),
        metavar="N|N,M",
        help="steps of that model; by default those in its directory",
    )
    add("--guidance", type=float, help="its guidance; by default phase 1's sample_guidance, or that in its directory")
    add("--solver", choices=get_args(Solver), help="its solver; by default that in its directory")
    add("--phase1", type=Path, help="workdir of a finished phase 1; its model is sampled with its own settings")
    add("--phase2", type=Path, help="workdir of a finished phase 2; sampled with its own settings, and in four steps")
    more = "sampled with its own settings unless :STEPS:GUIDANCE[:SOLVER] is appended; repeatable"
    add("--run", action="append", default=[], help=f"one more row: NAME=WORKDIR of a finished run, {more}")
    add("--compare", action="append", default=[], help=f"one more row: NAME=DIR of a model, {more}")
    add("--lora", action="append", default=[], help="one more row: NAME=FILE, merged into --model; as --compare")
    add("--task", choices=("digits", "video"), help="kind of clips; by default what the runs were trained on")
    add(
        "--records",
        default="",
        help="folders of records, DIR,DIR, to evaluate on; not training data of the runs",
    )
    add("--prompts", type=Path, help="file of prompts to evaluate on without real clips, as for vpae_jax.encode")
    add("--images", type=Path, help="folder of their first frames; files are named by the row of the prompt, from 1")
    add("--count", type=int, default=128, help="maximum number of clips for each of text-to-video and image-to-video")
    add("--batch", type=int, help="clips generated at once; by default as many as their size allows")
    add("--devices", type=int, help="devices of this process that share a batch; all by default")
    add("--dtype", choices=cli.DTYPES, help=cli.DTYPE_HELP)
    add("--process_id", type=int, help="index of this process, from 0")
    add("--num_processes", type=int, help="number of processes that share the clips")
    add("--output", type=Path, required=True, help="folder to write into, or to resume in")
    return result


def entries(given: argparse.Namespace) -> list[Entry]:
    """The rows that the command line asks for."""
    guidance = given.guidance
    if guidance is None and given.phase1:
        guidance = read_past_run(given.phase1).sample_guidance
    teacher = "teacher" if given.phase1 or given.phase2 or given.compare or given.run or given.lora else "model"
    rows = [Entry(teacher, given.model, given.steps, guidance, given.solver)]
    if rows[0].sampler(rows[0].find()).evaluations > 1:
        rows.append(Entry(teacher + NAIVE, given.model, 1, 1.0))
    if given.phase1:
        rows.append(Entry("phase 1", str(given.phase1 / PRODUCT)))
    if given.phase2:
        name = kept_name("phase 2", given.phase2)
        rows.append(Entry(name, str(given.phase2 / PRODUCT)))
        rows.append(Entry(f"{name}, four steps", str(given.phase2 / PRODUCT), 4, 1.0))
    rows += [replace(row, name=kept_name(row.name, workdir)) for row, workdir in map(parse_run, given.run)]
    rows += [parse_entry(text) for text in given.compare]
    rows += [parse_lora(text, given.model) for text in given.lora]
    check_names(rows)
    return rows


def kept_name(name: str, workdir: Path) -> str:
    """The name of a run's row. If the run's guard rejected the trained weights, its model holds the weights that it
    started from, and the row is called "start of NAME"."""
    decided = guard.verdict(workdir, read_past_run(workdir))
    if decided is None or decided.kept:
        return name
    print(f"{name}: {decided.reason}; its row is the start of {name}")
    return f"start of {name}"


def workdirs(given: argparse.Namespace) -> dict[str, Path]:
    """The workdirs of the runs that the command line names, by row name."""
    phases = {"phase 1": given.phase1, "phase 2": given.phase2}
    named = {row.name: workdir for row, workdir in map(parse_run, given.run)}
    return {**{name: workdir for name, workdir in phases.items() if workdir}, **named}


def read_run(name: str, workdir: Path) -> Run:
    """A phase's curves and settings, and its guard's verdict."""
    run = read_past_run(workdir)
    decided = guard.verdict(workdir, run)
    note = "" if decided is None else f"Guard: {decided.reason}."
    return Run(name, read_metrics(workdir), run.whole, note, usual_steps(run))


def usual_steps(run: PastRun) -> int | None:
    """The steps of the bundled config that a run was started with; None for a config of the user's."""
    presets = [name for name in PRESETS if name.startswith(str(run.model.get("preset", PRESETS[0])))]
    if run.name not in bundled() or not presets:
        return None
    try:
        return parse(load(f"{run.name}:{presets[0]}")).steps
    except UserError:  # that config has no such preset
        return None


def choose(given: argparse.Namespace) -> Task:
    """The task that all rows are evaluated on: the clips of --records, those that the last given phase held out, or
    digits.

    Raises:
      UserError: flags that exclude each other, no clips to choose from, or clips that a run was trained on.
    """
    runs = {workdir: read_past_run(workdir) for workdir in workdirs(given).values()}
    clips = {workdir: build(DataConfig, run.data, f"{workdir / CONFIG_FILE}: data") for workdir, run in runs.items()}
    workdir, data = [*clips.items()][-1] if clips else (Path(), DataConfig())
    method = runs[workdir].method if runs else {}
    if given.task == "digits" and given.records:
        raise UserError("--task=digits renders its clips; leave --records out")
    if given.task == "video" and not (given.records or data.records or data.videos):
        raise UserError("--task=video: no phase was trained on records; give some with --records=DIR")
    if given.task == "digits":
        data = DataConfig()
    if given.records:
        _check_untrained(given.records, clips)
        # All clips of these count as held out.
        workdir, data = Path(), DataConfig(records=given.records, held_out_records=given.records)
    return tasks.open_task(data, workdir, given.model, method)


def _check_untrained(records: str, runs: Mapping[Path, DataConfig]) -> None:
    """Raises `UserError` for a folder that a phase was trained on."""
    for workdir, data in runs.items():
        trained = {name for name, _ in data.sources}
        for name, _ in parse_sources(records):
            if is_address(name):
                found = name in trained
            else:
                found = resolve(name, Path()).resolve() in {
                    resolve(other, workdir).resolve() for other in trained if not is_address(other)
                }
            if found:
                raise UserError(
                    f"--records={name}: {workdir} was trained on these; leave --records out to use the clips "
                    "that it held out, or give other records"
                )


def measured_by() -> str:
    """Identifies the code that measures clips: this package as installed, and the optional packages. Clips that other
    code has measured are measured again."""
    return f"{digest_of_code()} with {', '.join(sorted({*extras.PACKAGES} - {*extras.missing()}))}"


def versions() -> dict[str, str]:
    """Versions and devices that the numbers depend on besides the models."""
    found = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
    device = jax.devices()[0]
    return {"python": platform.python_version(), **found, "device": f"{len(jax.devices())} x {device.device_kind}"}


def task_chooser(given: argparse.Namespace) -> Callable[[Pipeline], Task]:
    """A function from a pipeline with encoders to its task. Raises `UserError` as `choose`, and for missing prompts."""
    if given.prompts is None:
        if given.images is not None:
            raise UserError("--images holds the first frames of --prompts=FILE; give both, or leave it out")
        task = choose(given)
        return lambda pipeline: task
    for name in ("records", "task"):
        if getattr(given, name):
            raise UserError(f"--{name} and --prompts both choose what to evaluate on; leave one of them out")
    listed = prompts.listed(given.prompts, given.images)
    return lambda pipeline: prompts.task_of(listed, given.output / "prompts", pipeline, given.model)


def main(argv: list[str]) -> None:
    if suites.asked(argv):
        suites.main(argv)
        return
    given = parser().parse_args(argv)
    if given.batch is not None and given.batch < 1:
        raise UserError(f"--batch={given.batch}: expected at least 1")
    share = Share(*distributed.share(given.process_id, given.num_processes, environ))
    devices = cli.local_devices(given.devices)
    asked, output = entries(given), given.output
    runs = [read_run(name, workdir) for name, workdir in workdirs(given).items()]
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file; name a folder")
    for row in asked:  # before any clip is made
        row.sampler(row.find())
    shelf = Shelf(output / "clips", measured_by())
    making = Making(shelf, task_chooser(given), given.count, given.batch, given.dtype or compute_dtype(), devices)
    rows = []
    for row in asked:
        rows.append(making.open(row, share))
        making.make(rows[-1], share)
    if left := unmade(rows):
        print(f"this process has done its share; {left} clips remain for other processes, the last writes the report")
        return
    for row in rows:
        row.archive.tidy()
    scored = score(rows, shelf)
    write(scored, rows[0], output, argv, runs)


def write(scored: Scored, first: Opened, output: Path, argv: list[str], runs: Sequence[Run]) -> None:
    """Writes an evaluation's metrics, samples and page, and prints where they are."""
    task, held_out, fps = first.task, scored.held_out, first.held_out.fps
    shown = [row for row in (scored.real, *scored.rows) if row is not None]
    write_samples(output / "samples", shown, fps)
    facts = {"command": shlex.join(["python", "-m", "vpae_jax.evaluate", *argv]), "task": task.name, **versions()}
    write_metrics(output / "metrics.json", task.metrics, scored.real, scored.rows, held_out.count, facts)
    settings = {row.name: ", ".join(f"{k} {v}" for k, v in row.settings.items()) for row in scored.rows}
    report = Report(
        title="One network evaluation instead of many",
        summary="Clips made by a many-step video model and by its students, for captions and first frames that were "
        "not used for training.",
        headline=headline(scored.rows, next(m for m in task.metrics if m.name == task.compared)),
        metrics=task.metrics,
        real=scored.real,
        rows=scored.rows,
        captions=captions_of(held_out),
        count=held_out.count,
        fps=fps,
        frames=1 + (held_out.shape[0] - 1) * first.pipeline.vae.config.scale_factor_temporal,
        runs=runs,
        facts={**facts, **settings},
    )
    write_report(output / "report.html", report)
    print(f"\n{table(task.metrics, shown)}\n\n{output / 'metrics.json'}\n{output / 'report.html'}")


if __name__ == "__main__":
    cli.run(main)
