"""Which models are evaluated, and how each is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from vpae_jax.files import local_path
from vpae_jax.flow.sampler import Sampler, Solver, Steps, parse_steps
from vpae_jax.types import UserError
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.filenames import PRODUCT
from vpae_jax.weights.find import find_model
from vpae_jax.weights.parts import makes_from_image
from vpae_jax.weights.settings import read_scheduler


@dataclass(frozen=True)
class Entry:
    """One row: a model directory and how it is sampled.

    Attributes:
      name: of the row.
      model: the directory.
      steps, guidance, solver: None for the directory's own.
      lora: a LoRA file to merge into its transformer; None for none.

    Raises:
      UserError: settings that no sampler supports.
    """

    name: str
    model: str
    steps: Steps | None = None
    guidance: float | None = None
    solver: Solver | None = None
    lora: Path | None = None

    def __post_init__(self) -> None:
        for steps in self.steps if isinstance(self.steps, tuple) else (self.steps,):
            Sampler.even(
                1 if steps is None else steps,
                guidance=1.0 if self.guidance is None else self.guidance,
                solver=self.solver or "euler",
            )

    def find(self) -> ModelDirectory:
        """Its model. Raises `UserError` for one that is missing or incomplete."""
        model = find_model(self.model)
        model.require_whole()
        return model

    def sampler(self, model: ModelDirectory) -> Sampler:
        """The sampler of its clips. Raises `UserError` for settings that the model does not support."""
        image = makes_from_image({name: part.config for name, part in model.parts.items()})
        return read_scheduler(model.folder, image).sampler(self.steps, self.guidance, self.solver)


def parse_entry(text: str, flag: str = "--compare", what: str = "DIR") -> Entry:
    """Parses a row of the command line: NAME=DIR, NAME=DIR:STEPS:GUIDANCE or NAME=DIR:STEPS:GUIDANCE:SOLVER.

    Args:
      text: the flag's value.
      flag: its name, for messages.
      what: what stands after the equals sign, for messages.

    Raises:
      UserError: it is malformed.
    """
    name, _, rest = text.partition("=")
    model, *how = rest.split(":")
    solver = how.pop() if len(how) == 3 else None
    forms = f"NAME={what}, NAME={what}:STEPS:GUIDANCE or NAME={what}:STEPS:GUIDANCE:SOLVER"
    expected = f"{flag}={text!r}: expected {forms}"
    if not name or not model or len(how) not in (0, 2):
        raise UserError(expected)
    if solver is not None and solver not in get_args(Solver):
        raise UserError(f"{flag}={text!r}: solver is {solver!r}, expected one of {', '.join(get_args(Solver))}")
    if not how:
        return Entry(name, model)
    try:
        return Entry(name, model, parse_steps(how[0], "steps"), float(how[1]), cast(Solver | None, solver))
    except (ValueError, UserError) as error:
        raise UserError(f"{expected} ({error})") from error


def parse_run(text: str) -> tuple[Entry, Path]:
    """Parses --run: the row of the model that a run wrote, and its workdir. Raises `UserError` as `parse_entry`."""
    row = parse_entry(text, "--run", "WORKDIR")
    workdir = local_path(row.model)
    return Entry(row.name, str(workdir / PRODUCT), row.steps, row.guidance, row.solver), workdir


def parse_lora(text: str, model: str) -> Entry:
    """Parses --lora: the row of a LoRA file, merged into a model. Raises `UserError` as `parse_entry`, and for a
    missing file."""
    row = parse_entry(text, "--lora", "FILE")
    file = local_path(row.model)
    if not file.is_file():
        raise UserError(f"--lora={text!r}: {file}: no such file")
    return Entry(row.name, model, row.steps, row.guidance, row.solver, file)


def check_names(rows: list[Entry]) -> None:
    """Raises `UserError` if two rows have the same name."""
    names = [row.name for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two rows are named {name!r}; give each its own name")
