"""ComfyUI workflows that sample a model as it was trained to be sampled.

A workflow is written in ComfyUI's API format, `{id: {"class_type": ..., "inputs": {...}}}`, in which inputs have names.
ComfyUI's page opens it by drag and drop as it does its own format (the page calls a file of this form a prompt and lays
the nodes out itself: Comfy-Org/ComfyUI pull request 1932; `isApiJson` in Comfy-Org/ComfyUI_frontend), and its server
takes it at `/prompt`. The page's own format lists a node's values without names, in the order of its widgets, which
changes from release to release.

KSampler's noise levels. ModelSamplingSD3 makes a table of 1000 levels with the shift s (`ModelSamplingDiscreteFlow` in
comfy/model_sampling.py), of which the scheduler "simple" takes N (`simple_scheduler` in comfy/samplers.py, both of
Comfy-Org/ComfyUI, at 2fd2083 and 311c014):

    (1)  T_k = s u_k / (1 + (s - 1) u_k)        u_k = k / 1000,  k = 1, ..., 1000
    (2)  t_i = T_{1000 - floor(1000 i / N)}     i = 0, ..., N - 1;  then 0

These are a student's even times, u_i = 1 - i / N shifted by s (`flow.schedule` Eq. 8), where N divides 1000: for 1, 2,
4, 5, 8 or 10 steps, not for 3 or 6. One step is at t = 1 whatever the shift. Where they are other times, ManualSigmas
lists the student's own, and SamplerCustomAdvanced samples them.

What the samplers do (comfy/k_diffusion/sampling.py at 02159d8, `CONST` in comfy/model_sampling.py): with x0 = x - t v,
"euler" continues along (x - x0) / t = v, and "lcm" with (1 - t) x0 + t eps of fresh noise. These are our "euler" and
"consistency". The network is told 1000 t, and at cfg 1 the negative prompt is not evaluated. ComfyUI's "uni_pc" takes
its steps in log t, ours in log (t / (1 - t)): the timesteps are the same, the clip is not. It cannot take one step, in
which all solvers agree; that is written as "euler".
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from vpae_jax.files import write_text
from vpae_jax.flow.sampler import Solver
from vpae_jax.flow.schedule import shift as shifted
from vpae_jax.weights.settings import Defaults, Scheduler

SUFFIX = ".workflow.json"
# The files that ComfyUI's own examples for Wan 2.1 load (huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged), and the
# folders of ComfyUI/models that they belong into.
TEXT_ENCODER, VAE, IMAGE_ENCODER = (
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    "wan_2.1_vae.safetensors",
    "clip_vision_h.safetensors",
)
FOLDERS = {"model": "diffusion_models", "lora": "loras", "text": "text_encoders", "vae": "vae", "image": "clip_vision"}
_WAN = re.compile(r"Wan2\.1-(T2V|I2V)-(1\.3B|14B)(?:-(480P|720P))?(?:-Diffusers)?")
_SAMPLERS: dict[Solver, str] = {"euler": "euler", "consistency": "lcm", "unipc": "uni_pc"}
LEVELS = 1000
MAX_SHIFT, SHIFT_STEP, MAX_CFG = 100.0, 0.01, 100.0  # of the nodes' widgets
_SAME = 1e-6
PROMPT = "What the video shows, and how it moves."

Link = list[str | int]  # the id of a node, and which of its outputs


@dataclass(frozen=True)
class Sampling:
    """How ComfyUI takes a sampler's steps.

    Attributes:
      name: the sampler's.
      shift: of ModelSamplingSD3, for the scheduler "simple"; None where the levels are listed.
      sigmas: the levels, from 1 to 0.
    """

    name: str
    shift: float | None
    sigmas: tuple[float, ...]


def simple_sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """Eq. 2: the levels of KSampler's scheduler "simple", `steps + 1` numbers that end with 0."""
    table = np.asarray(shifted(np.arange(1, LEVELS + 1) / LEVELS, shift))
    return *(float(table[-(1 + int(i * (LEVELS / steps)))]) for i in range(steps)), 0.0


def sampling(scheduler: Scheduler) -> Sampling:
    """How ComfyUI samples what a scheduler samples."""
    sampler = scheduler.sampler()
    name = "euler" if sampler.steps == 1 else _SAMPLERS[sampler.solver]
    steps = scheduler.shift / SHIFT_STEP
    fits = scheduler.shift <= MAX_SHIFT and abs(steps - round(steps)) < _SAME
    if fits and name != "uni_pc":  # for which KSampler adds a level, and then drops the last but one
        levels = simple_sigmas(sampler.steps, scheduler.shift)
        # The first time of UniPC is just below 1, and stands for it.
        if sampler.steps == 1 or np.allclose(levels, sampler.times, rtol=0, atol=_SAME):
            return Sampling(name, scheduler.shift, levels)
    return Sampling(name, None, sampler.times)


def obstacle(scheduler: Scheduler, boundary: float | None) -> str | None:
    """Why there is no workflow for a model; None where there is one.

    Args:
      boundary: between two experts; None for one transformer.
    """
    if scheduler.chunks is not None:
        return "the model is causal, and ComfyUI's samplers let all frames see each other"
    if boundary is not None:
        return "the model has two experts"
    if scheduler.guidance > MAX_CFG:
        return f"its guidance is {scheduler.guidance:g}, and ComfyUI's cfg is at most {MAX_CFG:g}"
    return None


def model_file(base: str) -> str:
    """What the file of a model is called in ComfyUI's folder: of Wan's models as it is published there, of a single
    file its own name, of a folder the folder's name."""
    name = PurePath(base.partition("@")[0]).name
    if (match := _WAN.fullmatch(name)) is not None:
        task, size, resolution = match.groups()
        between = f"_{resolution.lower()}" if resolution else ""
        return f"wan2.1_{task.lower()}{between}_{size}_fp16.safetensors"
    return name if name.endswith(".safetensors") else f"{name}.safetensors"


def write_workflow(path: Path, graph: dict[str, Any]) -> None:
    """Writes a workflow. Raises `UserError` where the system does not let us."""
    write_text(path, json.dumps(graph, indent=2, ensure_ascii=False) + "\n")


def workflow(
    scheduler: Scheduler,
    clip: Defaults,
    model: str,
    *,
    image: bool = False,
    image_encoder: bool = False,
    lora: str | None = None,
) -> dict[str, Any]:
    """A workflow from a prompt, and a first frame if the model takes one, to a video file.

    Args:
      scheduler: how the model is sampled; see `obstacle`.
      clip: the clip that it makes, and what its guidance moves away from.
      model: name of its file in `diffusion_models`.
      image: whether it makes videos from a first frame.
      image_encoder: whether it looks at that frame through an image encoder, too (Wan 2.1, not Wan 2.2).
      lora: name of a file in `loras` that makes `model` the one to be sampled; None for none.
    """
    graph = _Graph()
    network = graph("UNETLoader", unet_name=model, weight_dtype="default")
    if lora is not None:
        network = graph("LoraLoaderModelOnly", model=network, lora_name=lora, strength_model=1.0)
    text = graph("CLIPLoader", clip_name=TEXT_ENCODER, type="wan", device="default")
    vae = graph("VAELoader", vae_name=VAE)
    negative = clip.negative_prompt if scheduler.guidance > 1 else ""
    prompts = (
        graph("CLIPTextEncode", "Prompt", text=PROMPT, clip=text),
        graph("CLIPTextEncode", "Negative prompt (without effect at cfg 1)", text=negative, clip=text),
    )
    size = {"width": clip.width, "height": clip.height, "length": clip.num_frames, "batch_size": 1}
    if image:
        frame = graph("LoadImage", "First frame", image="first_frame.png")
        seen: dict[str, Any] = {"start_image": frame}
        if image_encoder:
            encoder = graph("CLIPVisionLoader", clip_name=IMAGE_ENCODER)
            seen["clip_vision_output"] = graph("CLIPVisionEncode", clip_vision=encoder, image=frame, crop="center")
        positive, negated = prompts
        made = graph("WanImageToVideo", positive=positive, negative=negated, vae=vae, **size, **seen)
        prompts, latent = (made, _output(made, 1)), _output(made, 2)
    else:
        latent = graph("EmptyHunyuanLatentVideo", **size)
    sampled = _sample(graph, scheduler, network, prompts, latent)
    frames = graph("VAEDecode", samples=sampled, vae=vae)
    graph("SaveWEBM", images=frames, filename_prefix="video/vpae_jax", codec="vp9", fps=clip.fps, crf=20.0)
    return graph.nodes


def _sample(graph: _Graph, scheduler: Scheduler, network: Link, prompts: Sequence[Link], latent: Link) -> Link:
    """From noise to a latent clip."""
    how, (positive, negative) = sampling(scheduler), prompts
    if how.shift is not None:
        return graph(
            "KSampler",
            model=graph("ModelSamplingSD3", model=network, shift=how.shift),
            seed=0,
            steps=scheduler.steps,
            cfg=scheduler.guidance,
            sampler_name=how.name,
            scheduler="simple",
            positive=positive,
            negative=negative,
            latent_image=latent,
            denoise=1.0,
        )
    guider = graph("CFGGuider", model=network, positive=positive, negative=negative, cfg=scheduler.guidance)
    return graph(
        "SamplerCustomAdvanced",
        noise=graph("RandomNoise", noise_seed=0),
        guider=guider,
        sampler=graph("KSamplerSelect", sampler_name=how.name),
        sigmas=graph("ManualSigmas", sigmas=", ".join(f"{t:.9f}" for t in how.sigmas)),
        latent_image=latent,
    )


@dataclass(frozen=True)
class _Graph:
    """Nodes by id; calling it adds one and returns its first output."""

    nodes: dict[str, Any] = field(default_factory=dict)

    def __call__(self, kind: str, title: str = "", /, **inputs: Any) -> Link:
        name = str(len(self.nodes) + 1)
        self.nodes[name] = {"class_type": kind, "inputs": inputs, **({"_meta": {"title": title}} if title else {})}
        return [name, 0]


def _output(link: Link, number: int) -> Link:
    """Another output of a node."""
    return [link[0], number]
