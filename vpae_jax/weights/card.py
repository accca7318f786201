"""The model card of a written model directory: what it is, where it comes from, how to sample it, how well it does."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import vpae_jax
from vpae_jax.weights.comfyui import IMAGE_ENCODER, TEXT_ENCODER, VAE
from vpae_jax.weights.merging import LoraFile
from vpae_jax.weights.origin import CARD_FILE, Origin
from vpae_jax.weights.settings import Defaults, Scheduler

_REPACKAGED = "of `Comfy-Org/Wan_2.1_ComfyUI_repackaged`"
TAGS = ["wan", "video", "vpae_jax"]
SAMPLES = "samples"  # the folder of what a card shows
LISTED = 16  # timesteps; a card leaves longer lists out


@dataclass(frozen=True)
class Provenance:
    """Where weights come from.

    Attributes:
      source: the model or run that was converted.
      facts: more of it, by name: the phase, its step, the weights chosen.
      scores: numbers that were measured, by name.
      origin: the published model that they descend from.
      samples: pictures and videos that were made while training, to be shown.
    """

    source: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)
    samples: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Card:
    """What a card tells.

    Attributes:
      form: the layout.
      image: whether the model makes videos from a first frame.
      whole: whether nothing of a pipeline is missing.
      parts: what was written.
      scheduler, defaults: how it is sampled, and which clip it makes.
      provenance: where it comes from.
      boundary: time between two experts; None for one transformer.
      lora: name of the LoRA file that makes the model that was trained this one; None for none.
      base, base_loras: the model that was trained, and the LoRA files that were merged into it first.
      name: of the directory.
      workflow: name of the ComfyUI workflow in it; None for none.
    """

    form: str
    image: bool
    whole: bool
    parts: tuple[str, ...]
    scheduler: Scheduler
    defaults: Defaults
    provenance: Provenance
    boundary: float | None = None
    lora: str | None = None
    base: str = ""
    base_loras: tuple[LoraFile, ...] = ()
    name: str = ""
    workflow: str | None = None

    @property
    def causal(self) -> bool:
        """Whether the model makes a clip chunk by chunk, each from those before it."""
        return self.scheduler.chunks is not None

    @property
    def in_diffusers(self) -> bool:
        """Whether Diffusers makes its clips."""
        return self.form == "diffusers" and not self.causal


def write_card(folder: Path, card: Card) -> None:
    """Writes README.md, with the hub's header."""
    scheduler, clip = card.scheduler, card.defaults
    task = "image-to-video" if card.image else "text-to-video"
    library = {"library_name": "diffusers"} if card.in_diffusers else {}
    head = {**card.provenance.origin.header(), "pipeline_tag": task, **library, "tags": TAGS}
    facts = {
        "written by": f"vpae_jax {vpae_jax.__version__}",
        "source": card.provenance.source,
        **card.provenance.facts,
        "layout": "vpae_jax" if card.causal and card.form == "diffusers" else card.form,
        "clip": f"{clip.num_frames} frames of {clip.height}x{clip.width} at {clip.fps:g} a second",
        **sampling_facts(scheduler),
        "parts": ", ".join(card.parts),
    }
    if (chunks := scheduler.chunks) is not None:
        first = f", {chunks.first} in the first" if chunks.first not in (0, chunks.size) else ""
        seen = f"the {chunks.window} before it" if chunks.window else "all before it"
        sink = f" and the first {chunks.sink}" if chunks.sink else ""
        facts["chunks"] = f"{chunks.size} latent frame{'s' if chunks.size > 1 else ''}{first}; each sees {seen}{sink}"
    if card.boundary is not None:
        facts["experts"] = f"transformer from t = {card.boundary:g} on, transformer_2 below"
    kind = f"{'causal ' if card.causal else ''}Wan 2.1 {task} model"
    title = f"A {kind}" if card.whole else f"Parts of a {kind}"
    lines = [*top(head, title, facts), *([] if not card.whole else ["", "## Use", "", *_use(card)])]
    if card.workflow is not None:
        lines += ["", "## ComfyUI", "", *_comfyui_use(card)]
    lines += end(card.provenance)
    (folder / CARD_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def top(head: Mapping[str, Any], title: str, facts: Mapping[str, Any]) -> list[str]:
    """How a card begins: the hub's header, a title, and a table."""
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", "", f"# {title}", ""]
    return [*lines, "| | |", "|---|---|", *(f"| {cell(key)} | {cell(value)} |" for key, value in facts.items())]


def end(provenance: Provenance) -> list[str]:
    """How a card ends: samples and scores."""
    lines = []
    if provenance.samples:
        lines += ["", "## Samples", "", "Clips on held-out conditions, made while training.", ""]
        for name in (f"{SAMPLES}/{path.name}" for path in provenance.samples):
            lines += [f"![{name}]({name})" if name.endswith(".png") else f"[{name}]({name})", ""]
        lines.pop()
    if provenance.scores:
        lines += ["", "## Scores", "", "| | |", "|---|---|"]
        lines += [f"| {cell(name)} | {value:.4g} |" for name, value in provenance.scores.items()]
    return lines


def sampling_facts(scheduler: Scheduler) -> dict[str, str]:
    """How a model is sampled: the rows of a card's table."""
    steps = f"{scheduler.steps} step{'s' if scheduler.steps > 1 else ''}" + (" a chunk" if scheduler.chunks else "")
    times = ", ".join(f"{t:.4g}" for t in scheduler.times)
    how = f"times {times}" if times else f"shift {scheduler.shift:g}"
    facts = {"sampling": f"{scheduler.solver}, {steps}, guidance {scheduler.guidance:g}, {how}"}
    timesteps = scheduler.told()["timesteps"]
    return facts | ({"timesteps": ", ".join(f"{t:g}" for t in timesteps)} if len(timesteps) <= LISTED else {})


def _use(card: Card) -> list[str]:
    """How to make a clip: with this package, and where Diffusers reads the folder with it."""
    scheduler = card.scheduler
    steps, guidance = scheduler.steps, scheduler.guidance
    picture = " --image=FIRST_FRAME.png" if card.image else ""
    lines = ["```", f"python -m vpae_jax.sample --model=. --prompt=...{picture} --output=out.mp4", "```"]
    if card.causal:
        return [*lines, *_causal_use(card)]
    if card.form != "diffusers":
        return lines
    size = {"num_frames": card.defaults.num_frames, "height": card.defaults.height, "width": card.defaults.width}
    given = ['image=load_image("FIRST_FRAME.png")'] if card.image else []
    given += ['prompt="..."', *(f"{key}={value}" for key, value in size.items())]
    given += [f"num_inference_steps={steps}", f"guidance_scale={guidance}"]
    lines += [
        "",
        "```python",
        *(["from functools import partial", "", "import numpy"] if scheduler.bound_times else []),
        "from diffusers import DiffusionPipeline",
        *(["from diffusers.utils import load_image"] if card.image else []),
        "",
        'pipe = DiffusionPipeline.from_pretrained(".")',
        *binding(scheduler),
    ]
    lines += [f"frames = pipe({', '.join(given)}).frames[0]", "```"]
    return [*lines, *_remarks(card)]


def binding(scheduler: Scheduler) -> list[str]:
    """What gives Diffusers' scheduler times that its settings do not make; nothing where they do."""
    bound = scheduler.bound_times
    if not bound:
        return []
    return [
        "# No settings of the scheduler make the times of this model.",
        f"times = numpy.array([{', '.join(f'{t:.9g}' for t in bound)}])",
        "pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, sigmas=times)",
    ]


def _comfyui_use(card: Card) -> list[str]:
    """Which file belongs where, for ComfyUI."""
    rows = {f"diffusion_models/{card.name}.safetensors": "`diffusion_pytorch_model.safetensors`, under this name"}
    rows |= {f"text_encoders/{TEXT_ENCODER}": _REPACKAGED, f"vae/{VAE}": _REPACKAGED}
    rows |= {f"clip_vision/{IMAGE_ENCODER}": _REPACKAGED} if "image_encoder" in card.parts else {}
    return [
        f"Drag `{card.workflow}` into ComfyUI. It loads these files of `ComfyUI/models`:",
        "",
        "| | |",
        "|---|---|",
        *(f"| `{name}` | {what} |" for name, what in rows.items()),
    ]


def _causal_use(card: Card) -> list[str]:
    """What else one should know who uses a causal model."""
    scheduler, clip = card.scheduler, card.defaults
    lines = [
        "",
        "This model is causal: it makes a clip in chunks, each of which sees those before it. Diffusers' and Wan's own "
        "pipelines let all frames see each other, for which it was not trained; Diffusers does not load this folder.",
        "",
        f"`--num_frames` may be more than {clip.num_frames}: with `--window=N` a chunk sees the latest N latent frames "
        "alone, and with `--sink=M` the first M besides.",
    ]
    if scheduler.solver == "consistency" and scheduler.steps > 1:
        more = f"--steps={scheduler.steps},1"
        lines += [
            "",
            f"It takes fewer steps, too: `--steps=1`, or `{more}` for {scheduler.steps} of the first chunk and one "
            "of each later one.",
        ]
    command = "python -m vpae_jax.convert . ../student.pt --format=self_forcing"
    return [*lines, "", f"`{command}` writes a checkpoint for Self-Forcing's and CausVid's programs."]


def _remarks(card: Card) -> list[str]:
    """What else one should know who uses it with Diffusers."""
    scheduler, lines = card.scheduler, []
    if scheduler.solver != "unipc" and scheduler.steps > 1:
        lines += [
            "",
            f"The scheduler's settings are for {scheduler.steps} steps. In one step, set its `shift_terminal` to null.",
        ]
    if card.lora is not None:
        beside = ", beside what was merged into that before" if card.base_loras else ""
        lines += [
            "",
            f"`{card.lora}` is what training changed, for `load_lora_weights` on the model that this one started "
            f"from{beside}. The transformer here has it already.",
            *(_beside(card) if card.base_loras else ()),
        ]
    return lines


def _beside(card: Card) -> list[str]:
    """How Diffusers loads a student's LoRA with those that its teacher had."""
    names = [f"teacher_{i}" for i, _ in enumerate(card.base_loras)]
    files = dict(zip(names, card.base_loras, strict=True))
    strengths = [file.strength for file in card.base_loras]
    return [
        "",
        "```python",
        f"pipe = DiffusionPipeline.from_pretrained({card.base!r})",
        *(f"pipe.load_lora_weights({str(file.path)!r}, adapter_name={name!r})" for name, file in files.items()),
        f'pipe.load_lora_weights(".", weight_name={card.lora!r}, adapter_name="student")',
        f"pipe.set_adapters({[*names, 'student']}, {[*strengths, 1.0]})",
        "```",
    ]


def cell(value: Any) -> str:
    """A table cell: plain text, with no line ends, no bars, no HTML and no links."""
    text = value if isinstance(value, str) else json.dumps(value)
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("[", "\\[")
