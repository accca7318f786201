"""Clips of thick digits, to train a style LoRA of the tiny model on; and how much ink a model's clips have.

python docs/style/thick_digits.py write FOLDER [COUNT]      # .mp4 files, their captions beside them in .txt files
python docs/style/thick_digits.py ink MODEL [MODEL ...]     # folders of models, or "tiny"; each sampled as it says
"""

import sys
from pathlib import Path

import numpy as np
from scipy.ndimage import grey_dilation

import vpae_jax
from vpae_jax.media import write_video
from vpae_jax.tasks.digits.clips import MovingDigits

FPS = 8.0  # the tiny model's
ASKED = 32  # clips of text-to-video; their captions are those of digits that are not in the training clips
BRIGHT = 128  # of 0 to 255


def thick(video: np.ndarray) -> np.ndarray:
    """A clip whose strokes are a pixel wider on every side."""
    return grey_dilation(video, size=(1, 3, 3, 1))


def ink(video: np.ndarray) -> float:
    """The share of a clip's pixels that are bright."""
    return float((video >= BRIGHT).mean())


def write(folder: Path, count: int) -> None:
    """Writes clips of the digits that are trained on, and prints how much ink they have, before and after."""
    clips = MovingDigits("train", count)
    found = []
    for clip in (clips[i] for i in range(count)):
        video = thick(clip["video"])
        write_video(folder / f"{clip['id']}.mp4", video, FPS)
        (folder / f"{clip['id']}.txt").write_text(clip["caption"])
        found.append((ink(clip["video"]), ink(video)))
    plain, made = np.mean(found, axis=0)
    print(f"{folder}: {count} clips with {made:.2%} ink, which were {plain:.2%} as they are")


def measure(model: str) -> None:
    """Prints how much ink the clips of a model have, and its error."""
    pipe = vpae_jax.load_pipeline(model)
    clips = MovingDigits("eval", ASKED)
    found = [ink(pipe(clips[i]["caption"], seed=i)) for i in range(ASKED)]
    error = np.std(found) / np.sqrt(ASKED)
    scheduler = pipe.scheduler
    print(
        f"{model}: {np.mean(found):.2%} +- {error:.2%} ink, {scheduler.steps} steps at guidance {scheduler.guidance:g}"
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write", where]:
            write(Path(where), 512)
        case ["write", where, number]:
            write(Path(where), int(number))
        case ["ink", *models] if models:
            for name in models:
                measure(name)
        case _:
            sys.exit(__doc__)
