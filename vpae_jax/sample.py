"""Makes one video from a model directory.

    python -m vpae_jax.sample --model=DIR --prompt=... [--image=FILE] [--steps=1] [--guidance=1] [--seed=0] \\
        --output=out.mp4

The output is an .mp4, or a .png that shows every frame.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import jax.numpy as jnp
from absl import flags

from vpae_jax import cli
from vpae_jax.data.video import read_image, write_contact_sheet, write_video
from vpae_jax.pipeline import load_pipeline
from vpae_jax.sampling import Solver
from vpae_jax.types import UserError

MODEL = flags.DEFINE_string("model", "tiny", "Model directory in the Diffusers layout, or 'tiny'.")
PROMPT = flags.DEFINE_string("prompt", None, "What the video shows.")
NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", "", "What guidance above 1 moves away from.")
IMAGE = flags.DEFINE_string("image", None, "First frame of the video, an image file.")
STEPS = flags.DEFINE_integer("steps", 1, "Network evaluations; twice as many with guidance.")
GUIDANCE = flags.DEFINE_float("guidance", 1.0, "Guidance w of v_u + w (v_c - v_u); 1 is none.")
SEED = flags.DEFINE_integer("seed", 0, "Decides the noise.")
SOLVER = flags.DEFINE_enum("solver", "euler", ["euler", "consistency", "unipc"], "How the steps are taken.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Precision of the networks.")
NUM_FRAMES = flags.DEFINE_integer("num_frames", None, "Frames of the video; the model's own by default.")
HEIGHT = flags.DEFINE_integer("height", None, "Pixels; the model's own by default.")
WIDTH = flags.DEFINE_integer("width", None, "Pixels; the model's own by default.")
OUTPUT = flags.DEFINE_string("output", None, "File to write: .mp4 or .png.")


def main(argv: list[str]) -> None:
    del argv
    output = Path(str(OUTPUT.value))
    if output.suffix not in (".mp4", ".png"):
        raise UserError(f"--output={output}: expected a name that ends in .mp4 or .png")
    image = None if IMAGE.value is None else read_image(Path(IMAGE.value))
    pipeline = load_pipeline(MODEL.value, jnp.dtype(DTYPE.value))
    frames = pipeline(
        str(PROMPT.value),
        image=image,
        steps=STEPS.value,
        guidance=GUIDANCE.value,
        seed=SEED.value,
        negative_prompt=NEGATIVE_PROMPT.value,
        solver=cast(Solver, SOLVER.value),
        num_frames=NUM_FRAMES.value,
        height=HEIGHT.value,
        width=WIDTH.value,
    )
    if output.suffix == ".mp4":
        write_video(output, frames, pipeline.defaults.fps)
    else:
        write_contact_sheet(output, frames)
    print(f"{output}: {len(frames)} frames of {frames.shape[1]}x{frames.shape[2]}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["prompt", "output"])
    cli.launch(main)
