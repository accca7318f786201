"""Scores generators of moving digits against each other and against real clips.

    python -m vpae_jax.evaluate --model=DIR [--phase1=WORKDIR] [--phase2=WORKDIR] --output=DIR [--count=N]
    python -m vpae_jax.evaluate --model=DIR --compare=NAME=DIR:STEPS:GUIDANCE[:SOLVER] --output=DIR

The model is sampled with all its steps and with one; every other row is what the flags name. Captions, first frames and
noise are the same for all. Writes

    metrics.json    every score of every row and of the real clips, seconds a clip, number of evaluations
    samples/        the first clips of every row, as mp4 and png
    report.html     one page with all of it, and with the training curves of the phases
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from vpae_jax import cli
from vpae_jax.flow.sampler import Sampler, Solver
from vpae_jax.inference.pipeline import Pipeline, load_pipeline
from vpae_jax.metrics.base import Clips, Request
from vpae_jax.metrics.report import Report, Row, Run, write_report
from vpae_jax.metrics.results import NAIVE, headline, table, write_metrics, write_samples
from vpae_jax.run import guard
from vpae_jax.tasks.digits.clips import check_size
from vpae_jax.tasks.digits.scores import METRICS, DigitEvaluation
from vpae_jax.train.checkpoint import CONFIG_FILE
from vpae_jax.train.metrics import read_metrics
from vpae_jax.types import Condition, UserError

SHOWN = 8  # clips a row in the page and the samples


def parser() -> cli.Parser:
    """The command line."""
    result = cli.Parser("python -m vpae_jax.evaluate", __doc__)
    add = result.add_argument
    add("--model", default="tiny", help="model directory of the many-step model, or 'tiny'")
    add("--steps", type=int, default=50, help="steps of that model")
    add("--guidance", type=float, help="its guidance; by default phase 1's sample_guidance, or 1")
    add("--phase1", type=Path, help="workdir of a finished phase 1; its model is sampled in one step")
    add("--phase2", type=Path, help="workdir of a finished phase 2; sampled in one step and in four")
    add("--compare", action="append", default=[], help="one more row: NAME=DIR:STEPS:GUIDANCE[:SOLVER]; repeatable")
    add("--count", type=int, default=128, help="clips for each of text-to-video and image-to-video")
    add("--batch", type=int, default=32, help="clips generated at once")
    add("--dtype", choices=cli.DTYPES, default="float32", help="precision of the networks")
    add("--output", type=Path, required=True, help="folder to write into")
    return result


@dataclass(frozen=True)
class Entry:
    """One row: a model directory and how it is sampled.

    Raises:
      UserError: settings that no sampler has.
    """

    name: str
    model: str
    steps: int
    guidance: float
    solver: Solver = "euler"

    def __post_init__(self) -> None:
        Sampler.even(self.steps, 1.0, self.guidance, self.solver)

    @property
    def evaluations(self) -> int:
        """Network evaluations a clip; guidance doubles them."""
        return self.steps * (2 if self.guidance > 1 else 1)


class Generator:
    """Turns requests into clips, in batches of one size, and takes the time.

    Attributes:
      diffusion_seconds, seconds: a clip, of the network alone and of everything from caption to pixels; the median over
        batches, without the first batch of each half, which includes compiling.
    """

    def __init__(self, pipeline: Pipeline, entry: Entry, batch: int) -> None:
        self._pipeline, self._entry, self._batch = pipeline, entry, batch
        self._warm: set[bool] = set()
        self._diffusion: list[float] = []
        self._total: list[float] = []

    def __call__(self, request: Request) -> Clips:
        count = len(request.captions)
        noise = jax.random.normal(jax.random.key(request.seed), self._pipeline.latent_shape(count))
        clips = []
        for start in range(0, count, self._batch):
            # The last batch is filled up with its last clip, so that one program serves all.
            rows = np.minimum(np.arange(start, start + self._batch), count - 1)
            captions = [request.captions[int(row)] for row in rows]
            pictures = None if request.pictures is None else request.pictures[rows]
            made = self._make(captions, pictures, noise[rows], jax.random.fold_in(jax.random.key(request.seed), start))
            clips.append(made[: count - start])
        return np.concatenate(clips)

    @property
    def seconds(self) -> float:
        return float(np.median(self._total)) if self._total else 0.0

    @property
    def diffusion_seconds(self) -> float:
        return float(np.median(self._diffusion)) if self._diffusion else 0.0

    def _make(self, captions: list[str], pictures: Any, noise: jax.Array, key: jax.Array) -> Clips:
        pipeline, entry = self._pipeline, self._entry
        start = time.perf_counter()
        condition = pipeline.condition(captions, pictures)
        unconditional = self._unconditional(condition) if entry.guidance > 1 else None
        jax.block_until_ready((condition, noise))
        begin = time.perf_counter()
        latents = pipeline.sample(
            noise,
            condition,
            unconditional,
            pipeline.sampler(entry.steps, entry.guidance, entry.solver),
            key,
        )
        latents.block_until_ready()
        end = time.perf_counter()
        clips = np.asarray(pipeline.decode(latents))
        kind = pictures is None
        if kind in self._warm:
            self._diffusion.append((end - begin) / len(clips))
            self._total.append((time.perf_counter() - start) / len(clips))
        self._warm.add(kind)
        return clips

    def _unconditional(self, condition: Condition) -> Condition:
        """The empty prompt with the same picture, as Wan guides."""
        text, mask = self._pipeline.encode_prompt([""])
        return replace(
            condition,
            text=jnp.broadcast_to(text, condition.text.shape),
            text_mask=jnp.broadcast_to(mask, condition.text_mask.shape),
        )


def parse_entry(text: str) -> Entry:
    """One --compare. Raises `UserError` for one that cannot be read."""
    name, _, rest = text.partition("=")
    parts = rest.split(":")
    solver: Any = parts.pop() if len(parts) == 4 else "euler"
    expected = f"--compare={text!r}: expected NAME=DIR:STEPS:GUIDANCE or NAME=DIR:STEPS:GUIDANCE:SOLVER"
    if not name or len(parts) != 3:
        raise UserError(expected)
    if solver not in get_args(Solver):
        raise UserError(f"--compare={text!r}: solver is {solver!r}, expected one of {', '.join(get_args(Solver))}")
    try:
        return Entry(name, parts[0], int(parts[1]), float(parts[2]), solver)
    except ValueError as error:
        raise UserError(f"{expected} ({error})") from error


def entries(given: argparse.Namespace) -> list[Entry]:
    """The rows that the command line asks for."""
    guidance = given.guidance
    if guidance is None:
        guidance = read_config(given.phase1).get("sample_guidance", 1.0) if given.phase1 else 1.0
    teacher = "teacher" if given.phase1 or given.phase2 or given.compare else "model"
    rows = [Entry(teacher, given.model, given.steps, guidance)]
    if given.steps > 1:
        rows.append(Entry(teacher + NAIVE, given.model, 1, 1.0))
    phases = ("phase 1", given.phase1, 1), ("phase 2", given.phase2, 1), ("phase 2, four steps", given.phase2, 4)
    rows += [Entry(name, str(workdir / "model"), steps, 1.0) for name, workdir, steps in phases if workdir]
    rows += [parse_entry(text) for text in given.compare]
    names = [row.name for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two rows are called {name!r}; give each its own name")
    return rows


def read_config(workdir: Path) -> dict[str, Any]:
    """A run's config as plain values. Raises `UserError` when there was no run."""
    path = workdir / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{workdir} holds no run ({path.name} is missing); train the phase first")
    return json.loads(path.read_text())


def read_run(name: str, workdir: Path) -> Run:
    """A phase's curves and settings, and what its guard decided."""
    config, path = read_config(workdir), workdir / guard.FILE
    decided = json.loads(path.read_text()) if path.is_file() and config["guard"]["enabled"] else {}
    note = f"Guard: {decided['reason']}." if "reason" in decided else ""
    return Run(name, read_metrics(workdir), config, note)


def load(rows: list[Entry], dtype: str) -> dict[str, Pipeline]:
    """Every model directory that the rows name, once. Raises `UserError` for one that makes other clips than these."""
    pipelines = {row.model: load_pipeline(row.model, jnp.dtype(dtype)) for row in rows}
    for model, pipeline in pipelines.items():
        made = pipeline.defaults
        check_size(model, made.num_frames, made.height, made.width)
        if not pipeline.takes_image:
            raise UserError(f"{model} makes videos from text alone; the rows need a model that takes a first frame too")
    return pipelines


def evaluate(
    rows: list[Entry], pipelines: Mapping[str, Pipeline], evaluation: DigitEvaluation, batch: int
) -> list[Row]:
    """Scores every row."""
    done = []
    for row in rows:
        generator = Generator(pipelines[row.model], row, batch)
        shown: dict[str, Clips] = {}

        def predict(request: Request, generator: Generator = generator, shown: dict[str, Clips] = shown) -> Clips:
            clips = generator(request)
            shown.setdefault("t2v" if request.pictures is None else "i2v", clips[:SHOWN])
            return clips

        scores = dict(evaluation.run(predict))
        settings = {"model": row.model, "steps": row.steps, "guidance": row.guidance, "solver": row.solver}
        seconds = generator.seconds, generator.diffusion_seconds
        done.append(Row(row.name, row.evaluations, scores, shown, settings, *seconds))
        print(f"{row.name}: {generator.seconds:.3g} s a clip, KVD {scores['t2v/kvd']:.1f} / {scores['i2v/kvd']:.1f}")
        sys.stdout.flush()
    return done


def versions() -> dict[str, str]:
    """What the numbers depend on besides the models."""
    names = ("jax", "flax", "numpy", "scikit-learn")
    found = {name: importlib.metadata.version(name) for name in names}
    device = jax.devices()[0]
    return {"python": platform.python_version(), **found, "device": f"{len(jax.devices())} x {device.device_kind}"}


def main(argv: list[str]) -> None:
    given = parser().parse_args(argv)
    asked = entries(given)
    phases = (("phase 1", given.phase1), ("phase 2", given.phase2))
    runs = [read_run(name, workdir) for name, workdir in phases if workdir]
    if given.batch < 1:
        raise UserError(f"--batch={given.batch}: expected at least 1")
    output = given.output
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file; name a folder")
    pipelines = load(asked, given.dtype)
    evaluation = DigitEvaluation(given.count)
    rows = evaluate(asked, pipelines, evaluation, given.batch)
    shown = {half: evaluation.clips[:SHOWN] for half in evaluation.halves}
    real = Row("real", None, dict(evaluation.real()), shown)
    output.mkdir(parents=True, exist_ok=True)
    fps = pipelines[given.model].defaults.fps
    write_samples(output / "samples", [real, *rows], fps)
    facts = {"command": shlex.join(["python", "-m", "vpae_jax.evaluate", *argv]), **versions()}
    write_metrics(output / "metrics.json", METRICS, real, rows, given.count, facts)
    captions = {half: list(evaluation.request(half, count=SHOWN).captions) for half in evaluation.halves}
    report = Report(
        title="One evaluation instead of many",
        summary="Moving handwritten digits, made by a many-step video model and by its one-step students, for captions "
        "and first frames that no training saw.",
        headline=headline(rows),
        metrics=METRICS,
        real=real,
        rows=rows,
        captions=captions,
        count=given.count,
        fps=fps,
        runs=runs,
        facts={**facts, **{row.name: ", ".join(f"{k} {v}" for k, v in row.settings.items()) for row in rows}},
    )
    write_report(output / "report.html", report)
    print(f"\n{table(METRICS, [real, *rows])}\n\n{output / 'metrics.json'}\n{output / 'report.html'}")


if __name__ == "__main__":
    cli.run(main)
