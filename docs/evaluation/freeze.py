"""A student trained on clips that stand still, and judged by clips of a film that move: "A student trained to freeze"
in docs/evaluation.md.

    python docs/evaluation/freeze.py write --film=bbb.mp4 --output=runs/freeze/videos    # measure.py: where the film is
    for clips in moving frozen held_out; do
        python -m vpae_jax.encode --videos=runs/freeze/videos/$clips --min_motion=0 --batch=16 \\
            --output=runs/freeze/$clips
    done
    python -m vpae_jax.main --config=configs/teacher.py --config.model.path=tiny --config.method.init=previous \\
        --config.previous.workdir=vpae_jax/assets/tiny --config.method.steps=1 --config.method.guidance=1. \\
        --config.method.t.kind=list '--config.method.t.values=(1.,)' --config.method.image_dropout=0. \\
        --config.method.text_dropout=0. --config.method.ema=0. --config.optimizers.generator.warmup_steps=10 \\
        --config.optimizers.generator.decay_steps=0 --config.data.records=runs/freeze/frozen \\
        --config.data.held_out_records=runs/freeze/held_out --config.steps=76 --config.batch_size=8 \\
        --config.score_every=25 --config.model.remat=none --workdir=runs/freeze/student
    python docs/evaluation/freeze.py look runs/freeze/moving runs/freeze/frozen

The student is the tiny model, image-to-video in one evaluation, by flow matching at t = 1 alone: it learns the mean of
the clips that begin with the given frame. Those that it is shown repeat it.

`write` makes folders of .mp4 files, a caption beside each: two thirds of the clips in `moving`, the first frame of each
of them, repeated, in `frozen`, and the other third in `held_out`, to judge by. `look` prints how much clips of records
move as the VAE decodes them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from measure import FILM, cut, frames_of, frozen

from vpae_jax.data.records import LatentRecords
from vpae_jax.inference.pipeline import load_pipeline
from vpae_jax.media import write_video
from vpae_jax.metrics import judge
from vpae_jax.metrics.base import Clips

CLIPS, FRAMES = 384, 25  # FRAMES at 24 a second are the tiny model's 9 at 8 a second
CAPTION = "a rabbit"  # few letters: the tiny tokenizer takes most of them one by one, and 16 at most
LOOKED_AT = range(0, 96, 4)


def write(folder: Path, clips: Clips, fps: float) -> None:
    """Writes clips, and a caption beside each."""
    for number, clip in enumerate(clips):
        write_video(folder / f"{number:03d}.mp4", clip, fps)
        (folder / f"{number:03d}.txt").write_text(CAPTION)
    print(f"{folder}: {len(clips)} clips")


def look(folders: list[Path]) -> None:
    """Prints speed of edges and optical flow of records' clips, which the tiny model decodes."""
    pipeline = load_pipeline("tiny", with_transformer=False)
    for folder in folders:
        records = LatentRecords(folder)
        latents = np.stack([records[i]["latents"] for i in LOOKED_AT]).astype(np.float32)
        found = judge.measure(np.asarray(pipeline.decode(jnp.asarray(latents))), False)
        flow = 100 * pipeline.defaults.fps * found["magnitude"].mean()
        print(f"{folder}: speed {found['speed'].mean():.2f}, flow {flow:.2f} % of the width a second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("--film", type=Path, required=True)
    writing.add_argument("--output", type=Path, required=True)
    commands.add_parser("look").add_argument("records", type=Path, nargs="+")
    given = parser.parse_args()
    if given.command == "look":
        return look(given.records)
    fps, frames = frames_of(given.film)
    clips = cut(frames, FILM[0], (FILM[1] - FILM[0]) // CLIPS, CLIPS, FRAMES)
    trained = clips[[i for i in range(len(clips)) if i % 3]]
    write(given.output / "moving", trained, fps)
    write(given.output / "frozen", frozen(trained), fps)
    write(given.output / "held_out", clips[::3], fps)


if __name__ == "__main__":
    main()
