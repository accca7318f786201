"""Clips of a film, and the same clips frozen, to train a student on that stands still: "The guard of motion" in
docs/evaluation.md.

    python docs/evaluation/freeze.py --film=bbb.mp4 --output=runs/freeze/videos     # measure.py says whence the film is
    for set in moving frozen held_out; do
        python -m vpae_jax.encode --videos=runs/freeze/videos/$set --min_motion=0 --batch=16 \\
            --output=runs/freeze/$set
    done

Writes three folders of .mp4 files, their caption beside them: two thirds of the clips in `moving`, those with their
first frame repeated in `frozen`, and the other third in `held_out`, to judge by.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from measure import FILM, cut, frames_of, frozen

from vpae_jax.media import write_video
from vpae_jax.metrics.base import Clips

CLIPS, FRAMES = 384, 25  # FRAMES at 24 a second are the tiny model's 9 at 8 a second
CAPTION = "a rabbit"  # few letters: the tiny tokenizer takes most of them one by one, and 16 at most


def write(folder: Path, clips: Clips, fps: float) -> None:
    """Writes clips, and a caption beside each."""
    for number, clip in enumerate(clips):
        write_video(folder / f"{number:03d}.mp4", clip, fps)
        (folder / f"{number:03d}.txt").write_text(CAPTION)
    print(f"{folder}: {len(clips)} clips")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--film", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    fps, frames = frames_of(given.film)
    clips = cut(frames, FILM[0], (FILM[1] - FILM[0]) // CLIPS, CLIPS, FRAMES)
    trained = [i for i in range(len(clips)) if i % 3]
    write(given.output / "moving", clips[trained], fps)
    write(given.output / "frozen", frozen(clips[trained]), fps)
    write(given.output / "held_out", clips[::3], fps)


if __name__ == "__main__":
    main()
