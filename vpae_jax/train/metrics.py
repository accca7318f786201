"""Where numbers go: a JSONL file, TensorBoard, and the terminal.

`metrics.jsonl` is the record that the report is drawn from: one object a logged step, `{"step": 10, "generator/loss":
...}`. A restart drops the lines of steps that are run again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from vpae_jax.files import write_text
from vpae_jax.runtime.processes import is_first

JSONL = "metrics.jsonl"


class MetricsLog:
    """Writes scalars of a run; of several processes, the first one alone does.

    Args:
      workdir: the run's folder.
      start: the step that the run continues from; later records of an interrupted run are dropped.
      steps: the last step, for the progress bar.
    """

    def __init__(self, workdir: Path, start: int, steps: int):
        self.writes, self.file = is_first(), workdir / JSONL
        if not self.writes:
            return
        kept = [record for record in read_metrics(workdir) if record["step"] <= start] if start else []
        write_text(self.file, "".join(json.dumps(record) + "\n" for record in kept))
        self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start)
        self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty())

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records one step's scalars everywhere; the terminal shows the losses."""
        if not self.writes:
            return
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")
        for name, value in scalars.items():
            self.board.add_scalar(name, value, step)
        losses = {n.removesuffix("/loss"): v for n, v in scalars.items() if n.endswith("/loss")}
        text = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
        if self.bar.disable:
            print(f"step {step}/{self.bar.total}  {text}  {scalars.get('seconds_per_step', 0):.3g} s/step", flush=True)
        else:
            self.bar.set_postfix_str(text)

    def advance(self) -> None:
        """One more step is done."""
        if self.writes:
            self.bar.update()

    def close(self) -> None:
        if self.writes:
            self.bar.close()
            self.board.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The records of a run, in order; a last line cut short by a kill is left out."""
    file = workdir / JSONL
    if not file.exists():
        return []
    lines = file.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
