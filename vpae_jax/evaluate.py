"""Scores generators against each other and against real clips, on clips that no training saw.

    python -m vpae_jax.evaluate --model=DIR [--phase1=WORKDIR] [--phase2=WORKDIR] --output=DIR [--count=N]
    python -m vpae_jax.evaluate --model=DIR --compare=NAME=DIR[:STEPS:GUIDANCE[:SOLVER]] --output=DIR
    python -m vpae_jax.evaluate --model=DIR --records=DIR --compare=... --output=DIR
    python -m vpae_jax.evaluate --suite=vbench|vbench_i2v|vbench2 ...    a public benchmark; --suite=vbench --help

The clips are rendered digits, or the held-out ones of the records that the phases were trained on, or all clips of the
folders that --records names. The model is sampled with all its steps and with one; every other row is what the flags
name, sampled as its folder says where they do not. STEPS of a causal model may be N,M: the first chunk's and those of
each later one. Conditions and noise are the same for all. Metrics that need a package which is not installed are left
out, which a note says: `pip install "vpae_jax[evaluate]"` brings them (docs/evaluation.md). Writes

    metrics.json    every score of every row and of the real clips, with its 95 % interval over clips, and those of each
                    frame as curves; seconds a clip, number of evaluations
    samples/        the first clips of every row, as mp4 and png
    report.html     one page with all of it, and with the training curves of the phases
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np

from vpae_jax import cli, tasks
from vpae_jax.config import DataConfig, build, parse_sources
from vpae_jax.encoding.encoder import fingerprint
from vpae_jax.files import is_address, resolve
from vpae_jax.flow.sampler import Sampler, Solver, Steps, parse_steps, typed
from vpae_jax.inference.pipeline import Pipeline, load_pipeline
from vpae_jax.metrics.report import Report, Row, Run, write_report
from vpae_jax.metrics.results import NAIVE, headline, table, write_metrics, write_samples
from vpae_jax.run import guard
from vpae_jax.run.generation import Generation, Made, measures_of
from vpae_jax.run.workdir import read_run as read_past_run
from vpae_jax.runtime.progress import say, working
from vpae_jax.suites import cli as suites
from vpae_jax.tasks.base import HeldOut, Task
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
        help="steps of that model; by default as its folder says",
    )
    add("--guidance", type=float, help="its guidance; by default phase 1's sample_guidance, or as its folder says")
    add("--phase1", type=Path, help="workdir of a finished phase 1; its model is sampled as its folder says")
    add("--phase2", type=Path, help="workdir of a finished phase 2; sampled as its folder says, and in four steps")
    add(
        "--compare",
        action="append",
        default=[],
        help="one more row: NAME=DIR, sampled as its folder says, or NAME=DIR:STEPS:GUIDANCE[:SOLVER]; repeatable",
    )
    add("--task", choices=("digits", "video"), help="what is asked for; by default what the phases were trained on")
    add("--records", default="", help="folders of records, DIR,DIR, whose clips are asked for; none may be trained on")
    add("--count", type=int, default=128, help="clips for each of text-to-video and image-to-video, at most")
    add("--batch", type=int, help="clips generated at once; by default as many as their size allows")
    add("--dtype", choices=cli.DTYPES, default="float32", help="precision of the networks")
    add("--output", type=Path, required=True, help="folder to write into")
    return result


@dataclass(frozen=True)
class Entry:
    """One row: a model directory and how it is sampled.

    Attributes:
      name: of the row.
      model: the directory.
      steps, guidance, solver: None for what the directory says.

    Raises:
      UserError: settings that no sampler has.
    """

    name: str
    model: str
    steps: Steps | None = None
    guidance: float | None = None
    solver: Solver | None = None

    def __post_init__(self) -> None:
        for steps in self.steps if isinstance(self.steps, tuple) else (self.steps,):
            Sampler.even(
                1 if steps is None else steps,
                guidance=1.0 if self.guidance is None else self.guidance,
                solver=self.solver or "euler",
            )

    def sampler(self, pipeline: Pipeline) -> Sampler:
        """How the row is sampled."""
        return pipeline.sampler(self.steps, self.guidance, self.solver)


def parse_entry(text: str) -> Entry:
    """One --compare. Raises `UserError` for one that cannot be read."""
    name, _, rest = text.partition("=")
    model, *how = rest.split(":")
    solver = how.pop() if len(how) == 3 else None
    expected = f"--compare={text!r}: expected NAME=DIR, NAME=DIR:STEPS:GUIDANCE or NAME=DIR:STEPS:GUIDANCE:SOLVER"
    if not name or not model or len(how) not in (0, 2):
        raise UserError(expected)
    if solver is not None and solver not in get_args(Solver):
        raise UserError(f"--compare={text!r}: solver is {solver!r}, expected one of {', '.join(get_args(Solver))}")
    if not how:
        return Entry(name, model)
    try:
        return Entry(name, model, parse_steps(how[0], "steps"), float(how[1]), cast(Solver | None, solver))
    except (ValueError, UserError) as error:
        raise UserError(f"{expected} ({error})") from error


def entries(given: argparse.Namespace) -> list[Entry]:
    """The rows that the command line asks for. What a phase 2 leaves whose guard turned its trained weights down is
    called by what it is: the start of phase 2."""
    guidance = given.guidance
    if guidance is None and given.phase1:
        guidance = read_past_run(given.phase1).sample_guidance
    teacher = "teacher" if given.phase1 or given.phase2 or given.compare else "model"
    rows = [Entry(teacher, given.model, given.steps, guidance)]
    if given.steps != 1:
        rows.append(Entry(teacher + NAIVE, given.model, 1, 1.0))
    if given.phase1:
        rows.append(Entry("phase 1", str(given.phase1 / PRODUCT)))
    if given.phase2:
        decided = guard.verdict(given.phase2, read_past_run(given.phase2))
        name = "phase 2" if decided is None or decided.kept else "start of phase 2"
        rows.append(Entry(name, str(given.phase2 / PRODUCT)))
        rows.append(Entry(f"{name}, four steps", str(given.phase2 / PRODUCT), 4, 1.0))
    rows += [parse_entry(text) for text in given.compare]
    names = [row.name for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two rows are called {name!r}; give each its own name")
    return rows


def read_run(name: str, workdir: Path) -> Run:
    """A phase's curves and settings, and what its guard decided."""
    run = read_past_run(workdir)
    decided = guard.verdict(workdir, run)
    note = "" if decided is None else f"Guard: {decided.reason}."
    return Run(name, read_metrics(workdir), run.whole, note)


def choose(given: argparse.Namespace) -> Task:
    """What the rows are asked for: the clips of --records, those that the last phase given held out, or digits.

    Raises:
      UserError: flags that exclude each other, no clips to choose from, or some that were trained on.
    """
    runs = {workdir: read_past_run(workdir) for workdir in (given.phase1, given.phase2) if workdir}
    clips = {workdir: build(DataConfig, run.data, f"{workdir / CONFIG_FILE}: data") for workdir, run in runs.items()}
    workdir, data = [*clips.items()][-1] if clips else (Path(), DataConfig())
    method = runs[workdir].method if runs else {}
    if given.task == "digits" and given.records:
        raise UserError("--task=digits renders its clips; leave --records out")
    if given.task == "video" and not (given.records or data.records or data.videos):
        raise UserError("--task=video: no phase was trained on records; name some with --records=DIR")
    if given.task == "digits":
        data = DataConfig()
    if given.records:
        _check_untrained(given.records, clips)
        # All clips of these may be asked for.
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
                    f"--records={name}: {workdir} was trained on these; leave --records out to take the clips that it "
                    "held out, or name others"
                )


def load(rows: list[Entry], dtype: str) -> dict[str, Pipeline]:
    """Every model directory that the rows name, once. Raises `UserError` for a row that its model cannot make, too."""
    found: dict[str, Pipeline] = {}
    for row in rows:
        if row.model not in found:
            with working(f"reading {row.model}"):
                found[row.model] = load_pipeline(row.model, jnp.dtype(dtype))
        row.sampler(found[row.model])  # before any row is scored
    return found


def evaluate(
    rows: list[Entry], pipelines: Mapping[str, Pipeline], task: Task, count: int, batch: int | None
) -> tuple[HeldOut, Mapping[str, float], list[Row]]:
    """Scores every row.

    Returns:
      what the first row was asked for, the scores of its real clips, and the rows.
    """
    asked: dict[str, HeldOut] = {}
    first, real, done = None, {}, []
    for row in rows:
        pipeline = pipelines[row.model]
        encoders = fingerprint(pipeline)
        if encoders not in asked:
            with working(f"reading and measuring held-out clips, for the encoders of {row.model}"):
                asked[encoders] = task.held_out(pipeline, "evaluation", count)
        held_out = asked[encoders]
        if first is None:
            first, real = held_out, task.real(held_out)
        done.append(_scored(row, pipeline, task, held_out, batch))
    assert first is not None
    return first, real, done


def _scored(row: Entry, pipeline: Pipeline, task: Task, held_out: HeldOut, batch: int | None) -> Row:
    sampler = row.sampler(pipeline)
    generation, denoiser = Generation(pipeline, held_out, batch), pipeline.denoiser
    each = "each" if sampler.chunks is None else "a chunk at most" if sampler.first else "a chunk"
    say(f"{row.name}: {len(held_out)} clips, {sampler.evaluations} network evaluations {each}")
    wanted = held_out.shown
    shown: dict[int, Any] = {}
    seconds: list[tuple[float, float]] = []

    def watched() -> Iterator[Made]:
        for made in generation.batches(denoiser, sampler):
            seconds.append((made.sampling_seconds, made.seconds))
            shown.update({i: made.clips[i - made.rows.start] for i in wanted if made.rows.start <= i < made.rows.stop})
            say(f"{row.name}: {made.rows.stop} of {len(held_out)} clips, {made.seconds:.3g} s a clip")
            yield made

    measures = measures_of(task, held_out, watched())
    if measures is None:
        say(f"{row.name}: its clips are not finite; it has no scores")
        scores, intervals, curves = {}, {}, {}
    else:
        scores = dict(task.scores(held_out, measures))
        intervals, curves = task.intervals(held_out, measures), task.curves(held_out, measures)
    clips = {
        part.name: np.stack([shown[part.rows.start + i] for i in range(len(held_out.clips[part.name]))])
        for part in held_out.parts
    }
    # The first batch compiles.
    sampling, whole = np.median(seconds[1:], 0).tolist() if seconds[1:] else (0.0, 0.0)
    steps = sampler.steps if not sampler.first else typed(sampler.asked)
    settings = {"model": row.model, "steps": steps, "guidance": sampler.guidance, "solver": sampler.solver}
    return Row(row.name, sampler.evaluations, scores, clips, settings, whole, sampling, intervals, curves)


def versions() -> dict[str, str]:
    """What the numbers depend on besides the models."""
    found = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
    device = jax.devices()[0]
    return {"python": platform.python_version(), **found, "device": f"{len(jax.devices())} x {device.device_kind}"}


def main(argv: list[str]) -> None:
    if suites.asked(argv):
        suites.main(argv)
        return
    given = parser().parse_args(argv)
    asked = entries(given)
    phases = (("phase 1", given.phase1), ("phase 2", given.phase2))
    runs = [read_run(name, workdir) for name, workdir in phases if workdir]
    if given.batch is not None and given.batch < 1:
        raise UserError(f"--batch={given.batch}: expected at least 1")
    output = given.output
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file; name a folder")
    task = choose(given)
    pipelines = load(asked, given.dtype)
    if asked[0].sampler(pipelines[given.model]).evaluations == 1:  # there is no other row to compare one step with
        asked = [row for row in asked if not row.name.endswith(NAIVE)]
    held_out, floor, rows = evaluate(asked, pipelines, task, given.count, given.batch)
    sure = {"intervals": task.intervals(held_out, None), "curves": task.curves(held_out, None)}
    real = Row("real", None, dict(floor), held_out.clips, **sure)
    output.mkdir(parents=True, exist_ok=True)
    fps = pipelines[given.model].defaults.fps
    write_samples(output / "samples", [real, *rows], fps)
    facts = {"command": shlex.join(["python", "-m", "vpae_jax.evaluate", *argv]), "task": task.name, **versions()}
    count = held_out.parts[0].rows.stop
    write_metrics(output / "metrics.json", task.metrics, real, rows, count, facts)
    captions = {part.name: held_out.captions[part.rows][: len(held_out.clips[part.name])] for part in held_out.parts}
    report = Report(
        title="One evaluation instead of many",
        summary="Clips made by a many-step video model and by its students, for captions and first frames that no "
        "training saw.",
        headline=headline(rows, next(m for m in task.metrics if m.name == task.compared)),
        metrics=task.metrics,
        real=real,
        rows=rows,
        captions=captions,
        count=count,
        fps=fps,
        runs=runs,
        facts={**facts, **{row.name: ", ".join(f"{k} {v}" for k, v in row.settings.items()) for row in rows}},
    )
    write_report(output / "report.html", report)
    print(f"\n{table(task.metrics, [real, *rows])}\n\n{output / 'metrics.json'}\n{output / 'report.html'}")


if __name__ == "__main__":
    cli.run(main)
