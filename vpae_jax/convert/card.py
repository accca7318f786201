"""The model card of a written model directory: what it is, where it comes from, how to sample it, how well it does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import vpae_jax
from vpae_jax.convert.settings import Defaults, Scheduler

FILE = "README.md"


@dataclass(frozen=True)
class Provenance:
    """Where weights come from.

    Attributes:
      source: the model or run that was converted.
      facts: more of it, by name: the phase, its step, the weights chosen.
      scores: numbers that were measured, by name.
    """

    source: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)


def write_card(
    folder: Path,
    form: str,
    image: bool,
    configs: Mapping[str, Any],
    scheduler: Scheduler,
    defaults: Defaults,
    provenance: Provenance,
) -> None:
    """Writes README.md, with the hub's header."""
    task = "image-to-video" if image else "text-to-video"
    head = {"pipeline_tag": task, "library_name": "diffusers", "tags": ["wan", "video", "vpae_jax"]}
    steps = f"{scheduler.steps} step{'s' if scheduler.steps > 1 else ''}"
    facts = {
        "written by": f"vpae_jax {vpae_jax.__version__}",
        "source": provenance.source,
        **provenance.facts,
        "layout": form,
        "clip": f"{defaults.num_frames} frames of {defaults.height}x{defaults.width} at {defaults.fps:g} a second",
        "sampling": f"{scheduler.solver}, {steps}, guidance {scheduler.guidance:g}, shift {scheduler.shift:g}",
        "parts": ", ".join(configs),
    }
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in head.items()),
        "---",
        "",
        f"# A Wan 2.1 {task} model",
        "",
        "| | |",
        "|---|---|",
        *(f"| {_cell(key)} | {_cell(value)} |" for key, value in facts.items()),
        "",
        "## Use",
        "",
        *_use(form, image, scheduler, defaults),
    ]
    if provenance.scores:
        lines += ["", "## Scores", "", "| | |", "|---|---|"]
        lines += [f"| {_cell(name)} | {value:.4g} |" for name, value in provenance.scores.items()]
    (folder / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _use(form: str, image: bool, scheduler: Scheduler, defaults: Defaults) -> list[str]:
    """How to make a clip: with this package, and where Diffusers reads the folder with it."""
    picture = " --image=FIRST_FRAME.png" if image else ""
    command = (
        f"python -m vpae_jax.sample --model=. --prompt=...{picture} --steps={scheduler.steps} "
        f"--guidance={scheduler.guidance:g} --output=out.mp4"
    )
    lines = ["```", command, "```"]
    if form != "diffusers":
        return lines
    size = {"num_frames": defaults.num_frames, "height": defaults.height, "width": defaults.width}
    arguments = [f"{key}={value}" for key, value in size.items()]
    arguments += [f"num_inference_steps={scheduler.steps}", f"guidance_scale={scheduler.guidance}"]
    loaded = ["from diffusers.utils import load_image", ""] if image else [""]
    given = 'image=load_image("FIRST_FRAME.png"), prompt="..."' if image else 'prompt="..."'
    return [
        *lines,
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        *loaded,
        'pipe = DiffusionPipeline.from_pretrained(".")',
        f"frames = pipe({given}, {', '.join(arguments)}).frames[0]",
        "```",
    ]


def _cell(value: Any) -> str:
    """A table cell: no line ends and no bars."""
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.split()).replace("|", "\\|")
