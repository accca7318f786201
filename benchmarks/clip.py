"""Times a one-step image-to-video clip from prompt and image to a file, by stage: ours, an earlier version, Diffusers.

    python benchmarks/clip.py [--model=tiny] [--num_frames=N] [--height=N] [--width=N] [--dtype=...] [--vae_dtype=...]
        [--devices=1] [--before=CHECKOUT] [--rounds=5] [--markdown=docs/benchmarks.md]

Each side is a process of its own, which generates the clip once and then runs single stages on request, alternating
with the other sides. `--before` is a checkout of this repository, for example `git worktree add ../before 2f28e86`. The
last line combines the previous three as in practice: ours decodes piece by piece, and copies and writes pieces at the
same time; Diffusers' frames are written by our writer. Without PyTorch, or if it sees no accelerator but JAX does,
Diffusers is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import theirs
from report import machine, paste, progress, ratios, table
from rounds import PAUSE, Times

from vpae_jax import cli, load_pipeline, sharding  # these names are those of earlier versions, too
from vpae_jax.config import MeshConfig
from vpae_jax.flow.draws import noise_of_seed
from vpae_jax.flow.sampler import ONE_STEP
from vpae_jax.inference.pictures import first_frames
from vpae_jax.media import write_stream, write_video
from vpae_jax.types import UserError
from vpae_jax.weights.find import find_model

BEGIN = "<!-- made by benchmarks/clip.py -->"
PROMPT = "a three moves up"
OURS, BEFORE, THEIRS = "ours", "before", "Diffusers"
TEXT, IMAGE, FIRST, NETWORK = "text encoder", "image encoder", "first frame", "transformer"
DECODE, HOST, WRITE = "decode", "to host", "writing"
PIECES = "decode, to host and writing"
STAGES = (TEXT, IMAGE, FIRST, NETWORK, DECODE, HOST, WRITE, PIECES)
Stages = Mapping[str, Callable[[], Any]]


def ours(given: argparse.Namespace, folder: Path) -> Stages:
    """Our stages, each on the results of the previous ones; of whichever version of this package is imported."""
    mesh = None
    if given.devices > 1:
        mesh = sharding.make_mesh(MeshConfig(fsdp=1, context=given.devices), jax.local_devices()[: given.devices])
    options: dict[str, Any] = {} if given.vae_dtype is None else {"vae_dtype": jnp.dtype(given.vae_dtype)}
    pipe = load_pipeline(given.model, jnp.dtype(given.dtype), mesh, **options)
    if not pipe.takes_image:
        raise UserError(f"--model={given.model}: is a text-to-video model; give an image-to-video model")
    picture, sizes = _picture(given, pipe), (given.num_frames, given.height, given.width)
    noise, key = noise_of_seed(0, pipe.latent_shape(1, *sizes))
    first, condition = first_frames(picture, *_size(given, pipe)), pipe.condition([PROMPT], picture, *sizes)
    latents = jax.block_until_ready(pipe.sample(noise, condition, None, ONE_STEP, key[None]))
    frames, shown = pipe.decode(latents), np.asarray(pipe.decode(latents))[0]
    fps = pipe.defaults.fps

    def copied() -> Any:
        return np.asarray(frames + 0)  # a new array, whose host copy is not cached yet

    def pieces() -> None:
        if hasattr(pipe, "pieces"):
            from vpae_jax.inference.streaming import decoded

            write_stream(folder / "clip.mp4", decoded(pipe.vae, latents), fps)
        else:
            write_video(folder / "clip.mp4", np.asarray(pipe.decode(latents))[0], fps)

    ready = jax.block_until_ready
    return {
        TEXT: lambda: ready(pipe.encode_prompt([PROMPT])),
        IMAGE: lambda: ready(pipe.encode_image(picture)),
        FIRST: lambda: ready(pipe.condition_frames(first, given.num_frames)),
        NETWORK: lambda: ready(pipe.sample(noise, condition, None, ONE_STEP, key[None])),
        DECODE: lambda: ready(pipe.decode(latents)),
        HOST: copied,
        WRITE: lambda: write_video(folder / "clip.mp4", shown, fps),
        PIECES: pieces,
    }


def diffusers(given: argparse.Namespace, folder: Path) -> Stages:
    """The stages of Diffusers' pipeline, in the order of its call."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
    from PIL import Image

    source, device = find_model(given.model).path, theirs.device()
    dtype = getattr(torch, given.dtype)
    coder = AutoencoderKLWan.from_pretrained(source / "vae", torch_dtype=getattr(torch, given.vae_dtype or "float32"))
    pipe: Any = WanImageToVideoPipeline.from_pretrained(source, torch_dtype=dtype, vae=coder).to(device)
    own = load_pipeline(given.model, with_transformer=False)
    (height, width), frames = _size(given, own), given.num_frames or own.defaults.num_frames
    shape, length = (16, height, width, frames), pipe.tokenizer.model_max_length
    picture = Image.fromarray(_picture(given, own)[0])
    first = pipe.video_processor.preprocess(picture, height=height, width=width).to(device, torch.float32)
    mean, deviation = (
        torch.tensor(v).view(1, -1, 1, 1, 1).to(device, coder.dtype)
        for v in (coder.config["latents_mean"], coder.config["latents_std"])
    )

    def encode_text() -> Any:
        return pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False, max_sequence_length=length)[0].to(dtype)

    def encode_first() -> Any:
        return pipe.prepare_latents(first, 1, *shape, dtype=torch.float32, device=device)

    def encode_image() -> Any:
        return pipe.encode_image(picture, device).to(dtype)

    def network() -> Any:
        return pipe.transformer(
            hidden_states=torch.cat([noise, condition], 1).to(dtype),
            timestep=torch.tensor([1000.0], device=device),
            encoder_hidden_states=text,
            encoder_hidden_states_image=image,
            return_dict=False,
        )[0]

    def decode() -> Any:
        return coder.decode(latents.to(coder.dtype) * deviation + mean, return_dict=False)[0]

    def waited(work: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                result = work()
            theirs.synchronise()
            return result

        return run

    text, image, (noise, condition) = waited(encode_text)(), waited(encode_image)(), waited(encode_first)()
    latents = noise - waited(network)()
    video = waited(decode)()

    def to_host() -> Any:
        return _shown(pipe, video)

    shown = to_host()
    work = {TEXT: encode_text, IMAGE: encode_image, FIRST: encode_first, NETWORK: network, DECODE: decode}
    work |= {HOST: to_host, WRITE: lambda: write_video(folder / "clip.mp4", shown, own.defaults.fps)}
    work[PIECES] = lambda: write_video(folder / "clip.mp4", _shown(pipe, decode()), own.defaults.fps)
    return {name: waited(one) for name, one in work.items()}


def _shown(pipe: Any, video: Any) -> Any:
    return (pipe.video_processor.postprocess_video(video, output_type="np")[0] * 255).round().astype("uint8")


def _size(given: argparse.Namespace, pipe: Any) -> tuple[int, int]:
    return given.height or pipe.defaults.height, given.width or pipe.defaults.width


def _picture(given: argparse.Namespace, pipe: Any) -> Any:
    return np.random.default_rng(0).integers(0, 256, (1, *_size(given, pipe), 3), np.uint8)


def serve(stages: Stages) -> None:
    """Runs the stage named by each line of standard input, and prints its times."""
    for run in stages.values():
        run()
    print(json.dumps([*stages]), flush=True)
    for line in sys.stdin:
        time.sleep(PAUSE)
        cpu, start = time.process_time(), time.perf_counter()
        stages[line.strip()]()
        print(json.dumps([time.perf_counter() - start, time.process_time() - cpu]), flush=True)


class Side:
    """A process that runs the stages of one side (`serve`)."""

    def __init__(self, name: str, argv: Sequence[str], checkout: Path | None):
        self.name = name
        root = Path(__file__).resolve().parent.parent if checkout is None else checkout.resolve()
        variables = {"PYTHONPATH": str(root), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        command = [sys.executable, str(Path(__file__).resolve()), *argv, f"--side={name}"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env={**os.environ, **variables}, **pipes)
        self.stages: list[str] = self._read()

    def took(self, stage: str) -> tuple[float, float]:
        """Wall-clock and CPU seconds of one run."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{stage}\n")
        self._process.stdin.flush()
        seconds, cpu = self._read()
        return seconds, cpu

    def end(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("["):
                return json.loads(line)
        raise UserError(f"the process for {self.name} ended with status {self._process.wait()}; see its output above")


def measure(sides: Sequence[Side], rounds: int) -> dict[str, dict[str, Times]]:
    """Times by stage and side; every other round runs in reverse order."""
    found = {stage: {side.name: Times() for side in sides if stage in side.stages} for stage in STAGES}
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        for stage in STAGES:
            for side in sides[:: 1 if number % 2 == 0 else -1]:
                if stage in side.stages:
                    seconds, cpu = side.took(stage)
                    found[stage][side.name].seconds.append(seconds)
                    found[stage][side.name].cpu.append(cpu)
    return found


def rows(found: Mapping[str, Mapping[str, Times]], names: Sequence[str]) -> list[list[str]]:
    """Lines of the table: seconds of each side, then ratios of ours to the others in wall-clock and CPU time."""
    lines = []
    for stage, times in found.items():
        line = [stage, *(f"{statistics.median(times[name].seconds):.4f}" if name in times else "" for name in names)]
        for name in names[1:]:
            for key in ("seconds", "cpu"):
                pair = [getattr(times[one], key) for one in (OURS, name) if one in times]
                line.append(ratios(*pair) if len(pair) == 2 and min(pair[1]) > 0 else "")
        lines.append(line)
    return lines


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser("python benchmarks/clip.py", __doc__)
    add = parser.add_argument
    add("--model", default="tiny", help="an image-to-video model in Diffusers' layout")
    add("--num_frames", type=int, help="the model's own by default")
    add("--height", type=int, help="the model's own by default")
    add("--width", type=int, help="the model's own by default")
    add("--dtype", choices=cli.DTYPES, default="float32", help="of the networks")
    add("--vae_dtype", choices=cli.DTYPES, help="of the autoencoder; float32 by default")
    add("--devices", type=int, default=1, help="number of devices for our side")
    add("--before", type=Path, help="a checkout of an earlier version")
    add("--rounds", type=int, default=5, help="number of rounds")
    add("--markdown", type=Path, help="file for the table; replaces the text between its marks, if any")
    add("--side", choices=(OURS, BEFORE, THEIRS), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    given = _arguments(argv)
    if given.side is not None:
        with tempfile.TemporaryDirectory() as folder:
            serve((diffusers if given.side == THEIRS else ours)(given, Path(folder)))
        return
    names = [OURS] if given.before is None else [OURS, BEFORE]
    if theirs.installed() and (jax.default_backend() == "cpu" or theirs.device() == "cuda"):
        names.append(THEIRS)
    sides = []
    for name in names:
        progress(f"{name}: the first clip")
        sides.append(Side(name, argv, given.before if name == BEFORE else None))
    found = measure(sides, given.rounds)
    for side in sides:
        side.end()
    progress("")
    head = ["seconds", *names]
    for name in names[1:]:
        head += [f"ours / {name}", "CPU time"]
    size = "x".join(str(one) for one in (given.num_frames, given.height, given.width) if one) or "default clip"
    load = ", ".join(f"{one:.0f}" for one in os.getloadavg())
    about = f"{given.model}, {size}, {given.dtype}; {given.devices} x {jax.devices()[0].device_kind}; "
    about += f"{machine('jax', 'torch', 'diffusers')}; {given.rounds} rounds, load average {load}."
    text = "\n".join(("", about, "", *table(head, rows(found, names)), ""))
    print(text)
    if given.markdown is not None:
        paste(given.markdown, text, BEGIN)


if __name__ == "__main__":
    cli.run(main)
