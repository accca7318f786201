"""Generates one video with a model directory.

    python -m vpae_jax.sample --model=DIR --prompt=... [--image=FILE] [--steps=N|N,M] [--guidance=W] [--seed=0] \\
        [--devices=N] [--decoder=FILE] [--stream] --output=out.mp4

The output is an .mp4, or a .png that shows every frame. By default, a model is sampled as its directory specifies: a
student in the steps that it was trained for, a teacher in many steps and with guidance. If --steps differs, a note on
standard error gives the directory's setting.

With --devices=8, eight devices generate the video together: each holds an eighth of the transformer's weights, and
processes an eighth of the tokens and of the rows of frames.

For a causal model, which generates a clip chunk by chunk, --steps=4,1 uses four steps for the first chunk and one for
each later chunk. Its clips may be longer than those that it was trained on: --num_frames=N, with a sliding --window of
latent frames. With --stream, frames are written as they are generated; the last line reports the latency of the first
frame and the rate of the others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import cast

import numpy as np

from vpae_jax import cli
from vpae_jax.config import MeshConfig
from vpae_jax.flow.draws import check_seed
from vpae_jax.flow.sampler import SOLVERS, Sampler, Solver, parse_steps, typed
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.inference.pipeline import Pipeline
from vpae_jax.media import Frames, Picture, read_image, write_contact_sheet, write_stream
from vpae_jax.runtime.platforms import compute_dtype
from vpae_jax.runtime.progress import working
from vpae_jax.sharding import make_mesh
from vpae_jax.types import UserError


def parser() -> cli.Parser:
    """The command line."""
    result = cli.Parser("python -m vpae_jax.sample", __doc__)
    add = result.add_argument
    add(
        "--model",
        default="tiny",
        help="model: folder or file in any layout, 'tiny', or OWNER/NAME of the Hugging Face hub",
    )
    add("--prompt", required=True, help="description of the video")
    add("--negative_prompt", help="what guidance above 1 moves away from; the model's own by default")
    add("--image", type=Path, help="first frame of the video, an image file")
    add(
        "--steps",
        type=partial(parse_steps, name="--steps"),
        metavar="N|N,M",
        help="sampling steps, each with one network evaluation, two with guidance; for a causal model, per chunk, or "
        "for the first chunk and each later one; the model's own by default",
    )
    add("--guidance", type=float, help="w of v_u + w (v_c - v_u), 1 for none; the model's own by default")
    add("--seed", type=int, default=0, help="determines the noise; 0 by default")
    add("--solver", choices=SOLVERS, help="sampling solver; the model's own by default")
    add("--shift", type=float, help="shift of evenly spaced timesteps, if steps > 1; the model's own by default")
    add("--dtype", choices=cli.DTYPES, help=cli.DTYPE_HELP)
    add("--devices", type=int, default=1, help="number of this process's devices to use together; 1 by default")
    add(
        "--decoder",
        help="small decoder to use instead of the VAE's: TAEHV's taew2_1, or a run of configs/decoder.py",
    )
    add("--num_frames", type=int, help="frames of the video; the model's own by default")
    add(
        "--window",
        type=int,
        help="number of latest latent frames that a causal model's chunk sees, 0 for all; its own by default",
    )
    add(
        "--sink",
        type=int,
        help="number of first latent frames that it also sees, with a window; its own by default",
    )
    add("--height", type=int, help="pixels; by default from the image's aspect ratio, or the model's own")
    add("--width", type=int, help="pixels; by default from the image's aspect ratio, or the model's own")
    add("--stream", action="store_true", help="for a causal model: write the .mp4 while frames are being generated")
    add("--output", type=Path, required=True, help="file to write: .mp4 or .png")
    return result


def advised_window(pipeline: Pipeline, num_frames: int | None) -> int:
    """The window, in latent frames, with which a causal model looks back as far as in clips of its own length; 0 if no
    window is needed."""
    chunks = pipeline.sampler().chunks
    if chunks is None or chunks.window or num_frames is None or num_frames <= pipeline.defaults.num_frames:
        return 0
    return pipeline.latent_shape(1)[1] - chunks.size


def main(argv: list[str]) -> None:
    given = parser().parse_args(argv)
    output = given.output
    kind = output.suffix.lower()
    if kind not in (".mp4", ".png"):
        raise UserError(f"--output={output}: expected a name that ends in .mp4 or .png")
    if given.stream and kind != ".mp4":
        raise UserError(f"--output={output}: --stream writes .mp4 only, since a .png needs all frames at once")
    check_seed(given.seed, "--seed")
    image = None if given.image is None else read_image(given.image)
    devices = cli.local_devices(given.devices)
    mesh = make_mesh(MeshConfig(fsdp=1, context=len(devices)), devices) if len(devices) > 1 else None
    with working(f"reading {given.model}"):
        dtype = given.dtype or compute_dtype()
        pipeline = load_pipeline(given.model, dtype, mesh, vae_dtype=dtype, decoder=given.decoder)
    advised, own = pipeline.sampler(), pipeline.defaults
    if given.steps not in (None, advised.asked):
        advice = f"--steps={typed(advised.asked)} --guidance={advised.guidance}"
        print(f"note: this model's own setting is {advice}", file=sys.stderr)
    if (window := advised_window(pipeline, given.num_frames)) and given.window is None:
        print(
            f"note: this model was trained for {own.num_frames} frames; --window={window} limits how far it looks back",
            file=sys.stderr,
        )
    if image is not None and given.height is None and given.width is None:
        height, width = pipeline.fit(*image.shape[:2])
        if (height, width) != (own.height, own.width):
            print(
                f"note: the video is {height}x{width}, to match the image's aspect ratio; --height={own.height} "
                f"--width={own.width} gives the model's own size",
                file=sys.stderr,
            )
    if given.stream:
        asked = (given.steps, given.guidance, given.solver, given.shift, given.window, given.sink)
        sampler = pipeline.sampler(*asked)
        stream(pipeline, sampler, image, given)
        return
    with working("compiling, and making the video"), _writable(output):
        pieces = pipeline.pieces(
            given.prompt,
            image=image,
            steps=given.steps,
            guidance=given.guidance,
            seed=given.seed,
            negative_prompt=given.negative_prompt,
            solver=cast(Solver | None, given.solver),
            shift=given.shift,
            num_frames=given.num_frames,
            height=given.height,
            width=given.width,
            window=given.window,
            sink=given.sink,
        )
        if kind == ".mp4":
            count, height, width = _written(output, pieces, own.fps)
        else:
            frames = np.concatenate([*pieces])
            write_contact_sheet(output, frames)
            count, height, width, _ = frames.shape
    print(f"{output}: {_counted(count)} of {height}x{width}")


def _written(output: Path, pieces: Iterator[Frames], fps: float) -> tuple[int, int, int]:
    """Writes a video while later frames are being decoded; returns the number of frames, their height and width."""
    shapes = []

    def watched() -> Iterator[Frames]:
        for frames in pieces:
            shapes.append(frames.shape)
            yield frames

    write_stream(output, watched(), fps)
    return sum(shape[0] for shape in shapes), *shapes[0][1:3]


def stream(pipeline: Pipeline, sampler: Sampler, image: Picture | None, given: argparse.Namespace) -> None:
    """Writes a video while it is generated, and prints latency and frame rate.

    Args:
      pipeline: of a causal model.
      sampler: with `chunks`.
      image: the video's first frame, or None.
      given: the command line.
    """

    def chunks() -> Iterator[Frames]:
        clip = (given.seed, given.negative_prompt, given.num_frames, given.height, given.width)
        return pipeline.stream(given.prompt, image, sampler, *clip)

    with working("compiling, and making the first frames as a warm-up"):
        for _ in islice(chunks(), 2):  # compiles all programs: later chunks use the same ones as the second
            pass
    shapes, times, begun = [], [], perf_counter()

    def watched() -> Iterator[Frames]:
        for frames in chunks():
            shapes.append(frames.shape)
            times.append(perf_counter() - begun)
            yield frames

    with _writable(given.output), working("making and writing the video"):
        write_stream(given.output, watched(), pipeline.defaults.fps)
    count, (first, height, width, _) = sum(shape[0] for shape in shapes), shapes[0]
    pace = f"the first after {times[0]:.2f} s"
    if count > first:
        pace += f", then {(count - first) / (times[-1] - times[0]):.1f} frames/s"
    print(f"{given.output}: {_counted(count)} of {height}x{width}; {pace}")


@contextmanager
def _writable(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written: {error}; choose another place") from error


def _counted(frames: int) -> str:
    return f"{frames} frame{'s' if frames > 1 else ''}"


if __name__ == "__main__":
    cli.run(main)
